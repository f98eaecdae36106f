"""A plan that is taken over equals one made from nothing, whatever was done to dataset, weights, configuration and the files beside it."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stagebench.dataset
import stagebench.digests
from stagebench.config import Config, load_config
from stagebench.errors import UnsafePathError
from stagebench.plan import Plan, build_plan, reuse

INDEX = "EventGPT_Instruction_Subset.json"
SETTLED_S = 0.02
"""In place of 2 s: above the coarseness of this machine's file times (a kernel's tick)."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stagebench.digests, "SETTLED_NS", int(SETTLED_S * 1e9))


class Study:
    """A dataset of ten clips (eight of two files, two folders of frames), local weights, a list of questions, and a configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "data"
        self.numbers = 0
        self.entries = [self.entry(n) for n in range(8)]
        self.entries += [{"id": f"f{n}", "video_data": f"seq/f{n}", "conversations": turn("What?")} for n in range(2)]
        for entry in self.entries:
            self.make(entry)
        for name in ("weights/model.safetensors", "weights/config.json", "draft/model.safetensors"):
            self.put(folder / name)
        (folder / "questions.txt").write_text("One?\nTwo?\n")
        self.config: dict[str, Any] = {
            "study": "s",
            "datasets": {"d": {"root": str(self.root), "sensor": [48, 64]}},
            "models": {
                "eventgpt": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"},
                "local": {
                    "adapter": "hf",
                    "input": "frames",
                    "weights": str(folder / "weights"),
                    "draft": {"weights": str(folder / "draft")},
                },
            },
            "shards": {"max_clips": 2},
            "timing": {"max_samples": 4},
        }
        self.write()

    @property
    def plan_file(self) -> Path:
        return self.folder / "results/plan.json"

    @property
    def loaded(self) -> Config:
        return load_config(self.config)

    def entry(self, n: int) -> dict[str, Any]:
        return {"id": f"i{n}", "event_data": f"seq/{n}.npy", "mp4_data": f"seq/{n}.mp4", "conversations": turn("What?")}

    def put(self, path: Path) -> None:
        """A file of new content and of the size that all have."""
        self.numbers += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{self.numbers:08d}")

    def make(self, entry: dict[str, Any]) -> None:
        for folder, key in (("event_npy", "event_data"), ("mp4", "mp4_data")):
            if key in entry and not (self.root / folder / entry[key]).exists():
                self.put(self.root / folder / entry[key])
        if "video_data" in entry:
            for n in range(3):
                self.put(self.root / "video" / entry["video_data"] / f"{n}.png")

    def write(self) -> None:
        (self.root / INDEX).write_text(json.dumps(self.entries))

    def files(self) -> list[Path]:
        """What the plan reads by content, sorted."""
        return sorted(p for p in (*self.root.rglob("*"), *(self.folder / "weights").iterdir()) if p.is_file() and p.name != INDEX)

    def settle(self) -> None:
        time.sleep(1.5 * SETTLED_S)

    def plan(self) -> Plan:
        """As a dry run does."""
        return build_plan(self.loaded, self.folder / "cache", earlier=self.plan_file)

    def anew(self) -> Plan:
        """With nothing remembered."""
        cache = self.folder / f"cache-{time.monotonic_ns()}"
        try:
            return build_plan(self.loaded, cache)
        finally:
            shutil.rmtree(cache)


def turn(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<event>\n{question}"}]


def assert_equal(a: Plan, b: Plan) -> None:
    """In all that a job or a rule may ask of a plan."""
    assert a == b
    assert (a.shards, a.blocks, a.jobs, a.verify_paths) == (b.shards, b.blocks, b.jobs, b.verify_paths)
    assert [list(s.clips) for s in a.shards] == [list(s.clips) for s in b.shards]
    assert [list(j.block.samples) for j in a.jobs] == [list(j.block.samples) for j in b.jobs]
    assert [a.timing_params(j) for j in a.jobs] == [b.timing_params(j) for j in b.jobs]
    assert [a.verify_params(p) for p in a.verify_paths] == [b.verify_params(p) for p in b.verify_paths]
    assert (a.merge_params(), a.report_params(), a.config) == (b.merge_params(), b.report_params(), b.config)


# --- edits ------------------------------------------------------------------------------------------------------------------------------

Edit = Callable[[Study, random.Random], object]
EDITS: dict[str, Edit] = {}


def edit(change: Edit) -> Edit:
    EDITS[change.__name__] = change
    return change


@edit
def nothing(study: Study, pick: random.Random) -> None:
    pass


@edit
def touch(study: Study, pick: random.Random) -> None:
    os.utime(pick.choice(study.files()))


@edit
def touch_all(study: Study, pick: random.Random) -> None:
    for path in (*study.files(), study.root / INDEX):
        os.utime(path)


@edit
def change(study: Study, pick: random.Random) -> None:
    study.put(pick.choice(study.files()))


@edit
def change_behind_an_old_time(study: Study, pick: random.Random) -> None:
    path = pick.choice(study.files())
    was = path.stat()
    study.put(path)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


@edit
def swap_two(study: Study, pick: random.Random) -> None:
    one, other = pick.sample(study.files(), 2)
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


@edit
def copy_over(study: Study, pick: random.Random) -> None:
    one, other = pick.sample(study.files(), 2)
    shutil.copy2(one, other)


@edit
def remove_file(study: Study, pick: random.Random) -> None:
    pick.choice(study.files()).unlink()


@edit
def bring_back(study: Study, pick: random.Random) -> None:
    for entry in study.entries:
        study.make(entry)


@edit
def link_inside(study: Study, pick: random.Random) -> None:
    one, other = pick.sample([p for p in study.files() if p.is_relative_to(study.root) and not p.is_symlink()], 2)
    if one.parent.name != "weights":
        one.unlink()
        one.symlink_to(os.path.relpath(other, one.parent))


@edit
def folder_in_place_of_a_file(study: Study, pick: random.Random) -> None:
    path = pick.choice(sorted((study.root / "mp4").rglob("*.mp4")) or study.files())
    path.unlink() if not path.is_dir() else shutil.rmtree(path)
    path.mkdir()
    study.put(path / "inner")


@edit
def unreadable(study: Study, pick: random.Random) -> None:
    path = pick.choice(study.files())
    path.unlink()
    path.symlink_to(path.name)


@edit
def another_frame(study: Study, pick: random.Random) -> None:
    study.put(study.root / f"video/seq/f{pick.randrange(2)}/{pick.randrange(9)}.png")


@edit
def hidden_file(study: Study, pick: random.Random) -> None:
    study.put(study.root / "video/seq/f0/.DS_Store")


@edit
def another_weight(study: Study, pick: random.Random) -> None:
    study.put(study.folder / f"weights/{pick.randrange(4)}.safetensors")


@edit
def another_draft(study: Study, pick: random.Random) -> None:
    study.put(study.folder / "draft/model.safetensors")


@edit
def weight_below(study: Study, pick: random.Random) -> None:
    """As a vision tower's settings, which `revision()` counts too."""
    study.put(study.folder / f"weights/tower{pick.randrange(2)}/config.json")


@edit
def linked_tower(study: Study, pick: random.Random) -> None:
    """A folder below the weights that is a link, into which the loader looks; and one back up, into which nothing should for ever."""
    study.put(study.folder / "clip/config.json")
    for name, to in (("tower2", study.folder / "clip"), ("up", study.folder / "weights")):
        if not (study.folder / "weights" / name).is_symlink():
            (study.folder / "weights" / name).symlink_to(to)


@edit
def name_of_other_bytes(study: Study, pick: random.Random) -> None:
    Path(os.fsdecode(os.fsencode(study.root / "video/seq/f0") + b"/\xff\n.png")).write_text(str(pick.random()))


@edit
def no_weight(study: Study, pick: random.Random) -> None:
    shutil.rmtree(study.folder / "weights")
    (study.folder / "weights").mkdir()


@edit
def add(study: Study, pick: random.Random) -> None:
    entry = study.entry(pick.randrange(100, 10**6))
    study.make(entry)
    study.entries.append(entry)
    study.write()


@edit
def remove(study: Study, pick: random.Random) -> None:
    if len(study.entries) > 3:
        study.entries.pop(pick.randrange(len(study.entries)))
        study.write()


@edit
def rename_clip(study: Study, pick: random.Random) -> None:
    entry = pick.choice([e for e in study.entries if "mp4_data" in e] or [study.entry(0)])
    entry["mp4_data"] = entry["event_data"] = f"seq/{pick.randrange(10**6)}.mp4"
    study.make(entry)
    study.write()


@edit
def new_ids(study: Study, pick: random.Random) -> None:
    for entry in study.entries:
        entry["id"] = str(pick.random())
    pick.shuffle(study.entries)
    study.write()


@edit
def other_question(study: Study, pick: random.Random) -> None:
    pick.choice(study.entries)["conversations"] = turn(f"{pick.random()}?")
    study.write()


@edit
def other_root(study: Study, pick: random.Random) -> None:
    moved = study.folder / f"data{pick.random()}"
    pick.choice([shutil.copytree, lambda a, b, symlinks: a.rename(b)])(study.root, moved, symlinks=True)
    study.root = moved
    study.config["datasets"]["d"]["root"] = str(moved)


@edit
def other_settings(study: Study, pick: random.Random) -> None:
    section, key, value = pick.choice(
        [
            ("shards", "max_clips", pick.randrange(1, 9)),
            ("timing", "max_samples", pick.randrange(1, 9)),
            ("timing", "seed", pick.randrange(9)),
            ("frames", "count", pick.randrange(1, 9)),
            ("frames", "source", pick.choice(["cache", "mp4"])),
            ("events", "representation", pick.choice(["frames", "clip"])),
            ("variants", "batch", [1, pick.randrange(2, 4)]),
            ("report", "title", str(pick.random())),
        ]
    )
    study.config.setdefault(section, {})[key] = value


@edit
def other_samples(study: Study, pick: random.Random) -> None:
    options = {"query": [None, "Same?"], "max_samples": [None, 3, 5], "questions_file": [None, str(study.folder / "questions.txt")]}
    dataset = study.config["datasets"]["d"]
    key = pick.choice(sorted(options))
    dataset[key] = pick.choice(options[key])
    if dataset.get("query") and dataset.get("questions_file"):
        dataset["query"] = None


@edit
def other_questions(study: Study, pick: random.Random) -> None:
    (study.folder / "questions.txt").write_text(f"{pick.random()}?\n")


@edit
def other_model(study: Study, pick: random.Random) -> None:
    models = study.config["models"]
    if models.pop("more", None) is None:
        models["more"] = {**models["eventgpt"], "weights": f"dummy:{pick.randrange(3)}"}


@edit
def other_order(study: Study, pick: random.Random) -> None:
    """The first model is the one that others are compared with."""
    study.config["models"] = dict(reversed(study.config["models"].items()))


@settings(max_examples=25, deadline=None)
@given(edits=st.lists(st.tuples(st.sampled_from(sorted(EDITS)), st.booleans()), min_size=1, max_size=8), seed=st.integers(0, 2**32))
def test_a_plan_by_reuse_equals_a_plan_from_nothing(
    edits: list[tuple[str, bool]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After each edit of a random history, some of them followed by a run (which writes its plan), some not."""
    study, pick = Study(tmp_path_factory.mktemp("study")), random.Random(seed)
    study.settle()
    study.plan().write(study.plan_file)
    for name, runs in edits:
        EDITS[name](study, pick)
        study.settle()
        plan = study.plan()
        assert_equal(plan, study.anew())
        if runs:
            plan.write(study.plan_file)
            assert_equal(Plan.read(study.plan_file), plan)


@pytest.mark.parametrize("name", sorted(EDITS))
def test_each_edit_alone_is_seen_and_its_plan_taken_over_next_time(name: str, tmp_path: Path, loads: list[str]) -> None:
    """Some edits are drawn more often than others: here each is done once to a study whose plan could be taken over."""
    study, pick = Study(tmp_path), random.Random(name)
    study.settle()
    study.plan().write(study.plan_file)
    EDITS[name](study, pick)
    study.settle()
    plan = study.plan()
    assert_equal(plan, study.anew())
    plan.write(study.plan_file)
    loads.clear()
    assert_equal(study.plan(), plan)
    assert bool(loads) == (name in ("link_inside", "unreadable")), "planned from nothing only where times cannot tell"


# --- when it is taken over, and when not ------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Datasets that are planned from nothing."""
    seen: list[str] = []
    true = stagebench.dataset.load_dataset
    monkeypatch.setattr(stagebench.dataset, "load_dataset", lambda name, config: (seen.append(name), true(name, config))[1])
    return seen


@pytest.fixture
def study(tmp_path: Path, loads: list[str]) -> Study:
    """Planned and written."""
    study = Study(tmp_path)
    study.settle()
    study.plan().write(study.plan_file)
    loads.clear()
    return study


def test_an_unchanged_study_is_not_planned_again(study: Study, loads: list[str]) -> None:
    files = {p: p.stat().st_mtime_ns for p in study.plan_file.parent.iterdir()}
    plan = study.plan()
    plan.write(study.plan_file)
    assert loads == [] and files == {p: p.stat().st_mtime_ns for p in study.plan_file.parent.iterdir()}
    plan.write(study.folder / "elsewhere/plan.json")
    assert_equal(Plan.read(study.folder / "elsewhere/plan.json"), study.anew())


def test_a_touched_dataset_is_planned_again_once_by_a_dry_run(study: Study, loads: list[str]) -> None:
    EDITS["touch_all"](study, random.Random(0))
    study.settle()
    study.plan()
    assert loads == ["d"]
    study.plan()
    assert loads == ["d"], "its plan is the one on disk: noted without a run"


def test_a_changed_dataset_is_planned_again_until_it_is_run(study: Study, loads: list[str]) -> None:
    study.put(study.files()[0])
    study.settle()
    for _ in range(2):
        plan = study.plan()
    assert loads == ["d", "d"], "the plan on disk is another one"
    plan.write(study.plan_file)
    study.plan()
    assert loads == ["d", "d"]


def test_other_questions_are_planned(study: Study, loads: list[str]) -> None:
    study.config["datasets"]["d"]["questions_file"] = str(study.folder / "questions.txt")
    study.plan().write(study.plan_file)
    study.plan()
    assert loads == ["d"]
    EDITS["other_questions"](study, random.Random(0))
    plan = study.plan()
    assert loads == ["d", "d"]
    assert_equal(plan, study.anew())


def test_young_files_are_no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]) -> None:
    monkeypatch.setattr(stagebench.digests, "SETTLED_NS", 10**12)
    study = Study(tmp_path)
    study.plan().write(study.plan_file)
    assert not study.plan_file.with_suffix(".stamps").exists()
    study.plan()
    assert loads == ["d", "d"]


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swapped(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: damaged(s.plan_file.with_suffix(".stamps")),
        lambda s: s.plan_file.with_suffix(".stamps").write_bytes(b""),
        lambda s: s.plan_file.with_suffix(".stamps").write_bytes(b"\xff\n[]"),
        lambda s: s.plan_file.with_suffix(".stamps").unlink(),
        lambda s: swapped(s.plan_file.with_suffix(".stamps"), b'"mp4/seq":', b'"mp4/set":'),  # a folder that is not there holds no links
        lambda s: damaged(s.plan_file),
        lambda s: swapped(s.plan_file, b"dummy:0", b"dummy:1"),
        lambda s: swapped(s.plan_file, Plan.read(s.plan_file).shards[0].digest.encode(), b"0" * 16),
        lambda s: s.plan_file.unlink(),
        lambda s: damaged(next(s.plan_file.parent.glob("*.jsonl"))),
        lambda s: next(s.plan_file.parent.glob("*.jsonl")).unlink(),
        lambda s: (s.folder / "cache/digests.parquet").unlink(),
    ],
)
def test_what_lies_on_disk_is_not_believed(study: Study, loads: list[str], damage: Callable[[Study], object]) -> None:
    damage(study)
    plan = study.plan()
    assert loads == ["d"]
    assert_equal(plan, study.anew())


def test_a_plan_that_another_study_wrote_there_meanwhile_is_not_taken(study: Study, loads: list[str]) -> None:
    """Its own evidence still lies there: the two files are renamed one after the other."""
    stamps = study.plan_file.with_suffix(".stamps")
    kept = stamps.read_bytes()
    mine = study.loaded
    study.config["shards"]["max_clips"] = 3
    study.plan().write(study.plan_file)
    stamps.write_bytes(kept)
    loads.clear()
    assert build_plan(mine, study.folder / "cache", earlier=study.plan_file).config == mine and loads == ["d"]


@pytest.mark.parametrize(("where", "changed"), [("study.code_digest", "other"), ("reuse.versions", {"torch": "9"})])
def test_other_code_or_versions_plan_anew(
    study: Study, loads: list[str], monkeypatch: pytest.MonkeyPatch, where: str, changed: object
) -> None:
    monkeypatch.setattr(f"stagebench.plan.{where}", lambda: changed)
    study.plan()
    assert loads == ["d"]


def test_another_version_of_an_adapters_package_plans_anew(study: Study, loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    info = study.folder / "site/theirs-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[stagebench.adapters]\ntheirs = no_such_module:Thing\n")
    monkeypatch.syspath_prepend(study.folder / "site")
    study.config["models"]["eventgpt"]["adapter"] = "theirs"
    study.plan().write(study.plan_file)
    loads.clear()
    study.plan()
    assert loads == []
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 2\n")
    study.plan()
    assert loads == ["d"]


def test_the_code_that_counts_is_that_which_plans(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "stagebench"
    shutil.copytree(repo / "src/stagebench", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(reuse, "__file__", str(package / "plan/reuse.py"))
    before = reuse.code_digest.__wrapped__()
    (package / "report/page.py").write_text("another page")
    assert reuse.code_digest.__wrapped__() == before
    for path in ("plan/trie.py", "dataset/index.py", "dataset/guard.py", "digests.py", "config.py"):
        (package / path).write_text((package / path).read_text() + "\n")
        after = reuse.code_digest.__wrapped__()
        assert after != before
        before = after


@pytest.mark.parametrize("what", ["mp4/seq/3.mp4", "mp4/seq", "video/seq/f1"])
def test_a_link_out_of_the_root_is_refused_as_ever(study: Study, what: str) -> None:
    path = study.root / what
    outside = study.folder / "outside"
    path.rename(outside)
    path.symlink_to(outside)  # sizes and times of the files behind it are what they were
    with pytest.raises(UnsafePathError, match="outside the dataset's root"):
        study.plan()


def twins(study: Study, *files: Path) -> None:
    """Files of one size and the same times, to the nanosecond."""
    for path in files:
        study.put(path)
    for _ in range(1000):
        for path in files * 2:  # Linux gives a file a finer time when it has been looked at since the last one
            os.utime(path)
        one, other = (path.stat() for path in files)
        if (one.st_mtime_ns, one.st_ctime_ns) == (other.st_mtime_ns, other.st_ctime_ns):
            return
    pytest.skip("this machine's clock gives no two files the same times")


@pytest.mark.parametrize("where", ["data", "data/mp4/seq"])
def test_a_folder_that_gives_way_to_a_link_to_its_twin_is_planned_again(tmp_path: Path, loads: list[str], where: str) -> None:
    study = Study(tmp_path)
    place = tmp_path / where
    shutil.copytree(place, place.with_name("twin"))
    for path in place.rglob("*.mp4" if where != "data" else "*"):
        if path.is_file() and path.name != INDEX:
            twins(study, path, place.with_name("twin") / path.relative_to(place))
    study.settle()
    study.plan().write(study.plan_file)
    place.rename(place.with_name("was"))
    place.symlink_to("twin")
    loads.clear()
    plan = study.plan()
    assert loads == ["d"]
    assert_equal(plan, study.anew())


def test_twin_folders_that_change_places_are_seen(tmp_path: Path) -> None:
    """A rename leaves the times of what is in a folder alone; only inodes tell one twin from the other."""
    study = Study(tmp_path)
    one, other = (study.root / f"video/seq/f{n}" for n in range(2))
    for path in one.iterdir():
        twins(study, path, other / path.name)
    study.settle()
    before = study.plan()
    before.write(study.plan_file)
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)
    plan = study.plan()
    assert plan != before
    assert_equal(plan, study.anew())


def test_the_order_of_models_outlives_the_disk(study: Study) -> None:
    study.config["models"] = {name: study.config["models"][name] for name in ("local", "eventgpt")}
    study.plan().write(study.plan_file)
    for plan in (Plan.read(study.plan_file), study.plan()):
        assert list(plan.config.models) == ["local", "eventgpt"], "compare.reference: null takes the first"
        assert plan.merge_params() == study.anew().merge_params()


def test_a_folder_that_is_linked_below_the_weights_counts(study: Study) -> None:
    EDITS["linked_tower"](study, random.Random(0))
    study.settle()
    before = study.plan()
    before.write(study.plan_file)
    study.put(study.folder / "clip/config.json")
    study.settle()
    assert study.plan() != before


def test_weights_below_the_home_folder_count(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader takes ~ for it."""
    monkeypatch.setenv("HOME", str(study.folder))
    study.config["models"]["local"]["weights"] = "~/weights"
    study.plan().write(study.plan_file)
    study.put(study.folder / "weights/model.safetensors")
    study.settle()
    plan = study.plan()
    assert [plan.timing_params(job) for job in plan.jobs] != [Plan.read(study.plan_file).timing_params(job) for job in plan.jobs]


@pytest.mark.parametrize("where", ["data/mp4/seq/0.mp4", "data/mp4/seq", "data/video/seq/f0/0.png", "weights/model.safetensors"])
def test_a_link_led_to_a_file_of_the_same_size_and_times_is_seen(tmp_path: Path, where: str) -> None:
    """As files have that one tool wrote in one tick of the clock. A clip, a folder on the way to it, an image of a clip, weights."""
    study = Study(tmp_path)
    files = [study.root / f"mp4/{name}/0.mp4" for name in ("a", "b")]
    twins(study, *files)
    link = tmp_path / where
    shutil.rmtree(link) if link.is_dir() else link.unlink()

    def lead(file: Path) -> Plan:
        link.unlink(missing_ok=True)
        link.symlink_to(file if link.suffix else file.parent)
        study.settle()
        plan = study.plan()
        plan.write(study.plan_file)
        assert_equal(plan, study.anew())
        return plan

    plans = [lead(file) for file in (*files, files[0])]
    assert plans[0] != plans[1] and plans[0] == plans[2]


def test_a_missing_file_is_another_thing_than_an_empty_folder(study: Study, loads: list[str]) -> None:
    """Neither has a size or a time that could tell."""
    path = study.root / "mp4/seq/3.mp4"
    path.unlink()
    study.settle()
    study.plan().write(study.plan_file)
    study.plan()
    assert loads == ["d"]
    path.mkdir()
    assert_equal(study.plan(), study.anew())
    assert loads == ["d"] * 3


def test_a_disk_that_takes_no_evidence_stops_nothing(study: Study, loads: list[str]) -> None:
    stamps = study.plan_file.with_suffix(".stamps")
    stamps.unlink()
    stamps.mkdir()
    for _ in range(2):
        study.plan().write(study.plan_file)
    assert loads == ["d", "d"]
