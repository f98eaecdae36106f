"""The plan: pure in content, precise in what a change touches, exact on disk."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagebench.config import Config, load_config
from stagebench.errors import PlanError
from stagebench.plan import SHARD_FORMAT, Plan, build_plan, extraction_spec, trie

MODELS = {
    "eventgpt": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"},
    "video_llava": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
}


def config(root: Path, **over: object) -> Config:
    base: dict[str, object] = {
        "study": "s",
        "datasets": {"d": {"root": str(root), "sensor": [48, 64]}},
        "models": MODELS,
        "shards": {"max_clips": 2},
        "timing": {"max_samples": 4},
    }
    return load_config({**base, **over})


def entry(n: int, question: str = "What is there?") -> dict[str, object]:
    return {
        "id": f"id{n}",
        "split": "test",
        "event_data": f"seq/{n:06d}.npy",
        "mp4_data": f"seq/{n:06d}.mp4",
        "conversations": [{"from": "human", "value": f"<event>\n{question}"}],
    }


def write(root: Path, entries: list[dict[str, object]]) -> Path:
    """A dataset whose files hold their own names: planning reads bytes, not video."""
    root.mkdir(parents=True, exist_ok=True)
    for e in entries:
        for folder, key in (("event_npy", "event_data"), ("mp4", "mp4_data")):
            path = root / folder / str(e[key])
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(f"{folder} {e[key]}")
    (root / "EventGPT_Instruction_Subset.json").write_text(json.dumps(entries))
    return root


def names(plan: Plan) -> set[str]:
    return {s.name for s in plan.shards}


def paths(plan: Plan) -> set[str]:
    return {j.path for j in plan.jobs}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data", [entry(n) for n in range(12)])


# --- trie -------------------------------------------------------------------------------------------------------------------------------

KEYS = st.sets(st.text(min_size=1, max_size=8), min_size=0, max_size=60)


def leaves(keys: set[str], limit: int) -> dict[str, frozenset[str]]:
    places = trie.sort_keys(keys)
    return {trie.bucket_name(bits): frozenset(k for _, k in places[a:b]) for bits, a, b in trie.cut(places, [1] * len(places), limit)}


@given(KEYS, st.integers(1, 9))
def test_leaves_hold_every_key_once_and_are_as_high_as_they_can_be(keys: set[str], limit: int) -> None:
    found = leaves(keys, limit)
    assert sorted(k for leaf in found.values() for k in leaf) == sorted(keys)
    for bucket, leaf in found.items():
        bits = trie.prefix(bucket)
        assert 0 < len(leaf) <= limit
        assert all(trie.below(k, bits) for k in leaf)
        if bits:  # its parent was too big
            assert sum(trie.below(k, bits[:-1]) for k in keys) > limit


@given(KEYS, st.text(min_size=1, max_size=8), st.integers(1, 9))
def test_a_new_key_touches_one_leaf_or_splits_it(keys: set[str], new: str, limit: int) -> None:
    before, after = leaves(keys - {new}, limit), leaves(keys | {new}, limit)
    gone = {b for b in before if before[b] != after.get(b)}
    assert len(gone) <= 1
    come = {b: leaf for b, leaf in after.items() if leaf != before.get(b)}
    assert frozenset().union(*come.values()) == frozenset().union({new}, *(before[b] for b in gone))


@given(KEYS, st.integers(1, 9))
def test_find_gives_the_leaf_that_holds_the_key(keys: set[str], limit: int) -> None:
    found = leaves(keys, limit)
    assert all(k in found[trie.find(k, found.__contains__) or ""] for k in keys)


def test_a_key_heavier_than_the_limit_is_a_node_of_its_own() -> None:
    places = trie.sort_keys(["a", "b"])
    assert [b - a for _, a, b in trie.cut(places, [9, 9], 4)] == [1, 1]


# --- a dataset's changes ----------------------------------------------------------------------------------------------------------------


def test_the_order_of_the_index_and_the_ids_do_not_matter(data: Path, tmp_path: Path) -> None:
    entries = [entry(n) for n in range(12)]
    before = build_plan(config(data), tmp_path / "cache")
    random.Random(0).shuffle(entries)
    write(data, [{**e, "id": f"fresh-{n}"} for n, e in enumerate(entries)])
    after = build_plan(config(data), tmp_path / "cache")
    assert (names(before), paths(before)) == (names(after), paths(after))


def test_a_changed_video_touches_its_frame_shard_and_its_block_only(data: Path, tmp_path: Path) -> None:
    before = build_plan(config(data), tmp_path / "cache")
    path = data / "mp4/seq/000003.mp4"
    kept = path.read_bytes()
    path.write_text("another film")
    after = build_plan(config(data), tmp_path / "cache")
    (gone,) = names(before) - names(after)
    (come,) = names(after) - names(before)
    assert gone.startswith("frames/") and come.rpartition("-")[0] == gone.rpartition("-")[0]
    assert "seq/000003" in next(s for s in after.shards if s.name == come).clips
    (job,) = [j for j in after.jobs if j.path in paths(after) - paths(before)]
    assert job.model == "video_llava" and "seq/000003" in {k.partition("#")[0] for k in job.block.samples}
    path.write_bytes(kept)
    assert build_plan(config(data), tmp_path / "cache") == before


@settings(max_examples=15, deadline=None)
@given(present=st.sets(st.integers(0, 40), min_size=1, max_size=24), clip=st.integers(0, 40))
def test_a_clip_that_comes_or_goes_touches_one_leaf_or_splits_it(
    present: set[int], clip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp = tmp_path_factory.mktemp("plan")
    without, with_ = sorted(present - {clip}) or [41], sorted(present | {clip})
    plans = [build_plan(config(write(tmp / "data", [entry(n) for n in ns])), tmp / "cache") for ns in (without, with_)]
    for kind in ("frames", "events"):
        small, big = ({s.name: set(s.clips) for s in plan.shards if s.kind == kind} for plan in plans)
        gone, come = small.keys() - big.keys(), big.keys() - small.keys()
        if without == [41]:
            continue
        assert len(gone) <= 1
        assert set().union(*(big[n] for n in come)) == set().union(*(small[n] for n in gone), {f"seq/{clip:06d}"})


def test_touching_copying_and_moving_change_nothing(data: Path, tmp_path: Path) -> None:
    before = build_plan(config(data), tmp_path / "cache")
    for path in data.rglob("*"):
        os.utime(path)
    assert names(build_plan(config(data), tmp_path / "cache")) == names(before)
    shutil.copytree(data, tmp_path / "elsewhere")
    moved = build_plan(config(tmp_path / "elsewhere"), tmp_path / "cache")
    assert (names(moved), paths(moved)) == (names(before), paths(before))


def test_a_change_that_keeps_size_and_mtime_is_seen(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagebench.digests.SETTLED_NS", -(10**18))  # remember files however young
    before = build_plan(config(data), tmp_path / "cache")
    path = data / "mp4/seq/000003.mp4"
    stat = path.stat()
    path.write_text(path.read_text().upper())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(names(build_plan(config(data), tmp_path / "cache")) - names(before)) == 1


def test_a_missing_file_is_planned_and_planned_anew_once_it_is_there(data: Path, tmp_path: Path) -> None:
    path = data / "mp4/seq/000003.mp4"
    kept = path.read_bytes()
    path.unlink()
    plan = build_plan(config(data), tmp_path / "cache")
    (shard,) = [s for s in plan.shards if s.kind == "frames" and "seq/000003" in s.clips]
    assert plan.source_digest("d", "seq/000003", "frames") == "mp4:missing"
    path.write_bytes(kept)
    assert shard.name not in names(build_plan(config(data), tmp_path / "cache"))


def test_a_folder_of_frames_counts_by_names_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "data/video/seq/a"
    folder.mkdir(parents=True)
    for n in range(3):
        (folder / f"{n}.png").write_text(str(n))
    e = {"id": "a", "video_data": "seq/a", "conversations": [{"from": "human", "value": "Q?"}]}
    (tmp_path / "data/EventGPT_Instruction_Subset.json").write_text(json.dumps([e]))
    c = config(tmp_path / "data", models={"video_llava": MODELS["video_llava"]})
    seen = {next(iter(names(build_plan(c, tmp_path / "cache"))))}
    (folder / ".DS_Store").write_text("not a frame")
    assert names(build_plan(c, tmp_path / "cache")) == seen
    (folder / "1.png").rename(folder / "9.png")
    seen |= names(build_plan(c, tmp_path / "cache"))
    (folder / "2.png").write_text("other")
    seen |= names(build_plan(c, tmp_path / "cache"))
    assert len(seen) == 3


def test_a_changed_question_touches_timing_and_no_shard(data: Path, tmp_path: Path) -> None:
    before = build_plan(config(data), tmp_path / "cache")
    write(data, [entry(n, "And now?" if n == 3 else "What is there?") for n in range(12)])
    after = build_plan(config(data), tmp_path / "cache")
    assert names(before) == names(after)
    assert sorted(j.model for j in after.jobs if j.path not in paths(before)) == ["eventgpt", "video_llava"]


# --- configuration ----------------------------------------------------------------------------------------------------------------------


def test_frame_count_touches_frames_only(data: Path, tmp_path: Path) -> None:
    before = build_plan(config(data), tmp_path / "cache")
    after = build_plan(config(data, frames={"count": 4}), tmp_path / "cache")
    assert {n for n in names(before) if n.startswith("events")} == {n for n in names(after) if n.startswith("events")}
    assert not {n for n in names(before) & names(after) if n.startswith("frames")}
    assert {j.model for j in after.jobs if j.path not in paths(before)} == {"video_llava"}


def test_only_shards_that_are_read_are_planned(data: Path, tmp_path: Path) -> None:
    assert {s.kind for s in build_plan(config(data, frames={"source": "mp4"}), tmp_path / "cache").shards} == {"events"}
    only = config(data, models={"video_llava": MODELS["video_llava"]})
    assert {s.kind for s in build_plan(only, tmp_path / "cache").shards} == {"frames"}


def test_files_that_no_model_reads_are_not_hashed(data: Path, tmp_path: Path) -> None:
    c = config(data, models={"video_llava": MODELS["video_llava"]})
    before = build_plan(c, tmp_path / "cache")
    (data / "event_npy/seq/000003.npy").write_text("changed")
    assert build_plan(c, tmp_path / "cache") == before


def test_axes_multiply_and_each_model_takes_its_own_sources(data: Path, tmp_path: Path) -> None:
    c = config(data, variants={"frames": [1, 4], "source": ["cache", "mp4", "npy"], "batch": [1, 2]})
    plan = build_plan(c, tmp_path / "cache")
    for model, sources in (("eventgpt", {"cache", "npy"}), ("video_llava", {"cache", "mp4"})):
        variants = {j.variant.name: j.variant.settings for j in plan.jobs if j.model == model}
        assert len(variants) == 8
        assert {(v["source"], v["frames"], v["batch"]) for v in variants.values()} == {
            (s, f, b) for s in sources for f in (1, 4) for b in (1, 2)
        }
    assert {plan.specs[s.spec_id].get("count", plan.specs[s.spec_id].get("parts")) for s in plan.shards} == {1, 4}


def test_a_live_block_changes_with_what_it_reads(data: Path, tmp_path: Path) -> None:
    c = config(data, frames={"source": "mp4"})
    before = build_plan(c, tmp_path / "cache")
    (data / "mp4/seq/000003.mp4").write_text("another film")
    after = build_plan(c, tmp_path / "cache")
    assert [j.model for j in after.jobs if j.path not in paths(before)] == ["video_llava"]
    assert all(not j.block.shards for j in after.jobs if j.model == "video_llava")


def test_packed_events_are_stored_once_however_they_are_rendered(data: Path, tmp_path: Path) -> None:
    events = {"representation": "clip", "parts": 5}
    before = build_plan(config(data, events=events), tmp_path / "cache")
    after = build_plan(config(data, events={**events, "policy": "negative_on_top"}, variants={"frames": [1, 5]}), tmp_path / "cache")
    kept = {n for n in names(before) if n.startswith("events")}
    assert kept == {n for n in names(after) if n.startswith("events")}
    assert not {j.path for j in before.jobs if j.model == "eventgpt"} & paths(after)
    job = next(j for j in after.jobs if j.model == "eventgpt" and j.variant.settings["frames"] == 1)
    assert after.specs[job.block.spec_id]["parts"] == 1 and after.specs[job.block.spec_id]["policy"] == "negative_on_top"


def test_blocks_hold_every_sample_once_in_whole_shards_and_within_the_limit(data: Path, tmp_path: Path) -> None:
    plan = build_plan(config(data), tmp_path / "cache")
    for model in MODELS:
        blocks = [j.block for j in plan.jobs if j.model == model]
        assert sorted(k for b in blocks for k in b.samples) == sorted(s.key for s in plan.datasets["d"].samples)
        for block in blocks:
            assert len(block.samples) <= 4
            held = {c for s in plan.shards if s.name in block.shards for c in s.clips}
            assert held == {k.partition("#")[0] for k in block.samples}


def test_a_leaf_with_more_questions_than_a_job_takes_is_cut_by_clip(tmp_path: Path) -> None:
    entries = [{**entry(n, q), "id": f"{n}{q}"} for n in range(2) for q in ("a?", "b?", "c?")]
    plan = build_plan(config(write(tmp_path / "data", entries), timing={"max_samples": 3}), tmp_path / "cache")
    blocks = [j.block for j in plan.jobs if j.model == "eventgpt"]
    assert sorted(len(b.samples) for b in blocks) == [3, 3] and len({b.shards for b in blocks}) == 1
    assert len({b.name for b in blocks}) == 2


def test_params_change_with_what_is_measured_and_not_with_how_jobs_are_cut(data: Path, tmp_path: Path) -> None:
    def params(**over: object) -> str:
        plan = build_plan(config(data, **over), tmp_path / "cache")
        return plan.timing_params(next(j for j in plan.jobs if j.model == "eventgpt"))

    base = params()
    assert json.loads(base)["versions"]["transformers"]
    assert params(timing={"max_samples": 5, "reuse": False}) == base
    assert params(timing={"warmup": 3}) != base
    assert params(models={**MODELS, "eventgpt": {**MODELS["eventgpt"], "weights": "dummy:1"}}) != base
    assert params(models={**MODELS, "llava": MODELS["video_llava"]}) == base


def test_what_a_merge_says_depends_on_the_order_of_an_axis(data: Path, tmp_path: Path) -> None:
    """Variants are held against an axis's first value: turned round, nothing is timed anew, and all is merged again."""

    def planned(**over: object) -> Plan:
        return build_plan(config(data, **over), tmp_path / "cache")

    one, other = planned(variants={"batch": [1, 4]}), planned(variants={"batch": [4, 1]})
    assert paths(one) == paths(other) and one.merge_params() != other.merge_params()
    assert planned().merge_params() != planned(shards={"max_failed": 0.5}).merge_params(), "it decides whether a study is VALID"
    assert set(json.loads(planned().merge_params())) == {"study", "compare", "models"}, "studies as they were are not merged again"


def _denied(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_the_basis_of_a_merge_changes_with_jobs_and_their_settings_and_with_nothing_else(data: Path, tmp_path: Path) -> None:
    def planned(root: Path = data, **over: object) -> Plan:
        return build_plan(config(root, **over), tmp_path / "cache")

    plan = planned()
    for over in (
        {"timing": {"repeats": 5, "max_samples": 4}},
        {"models": {"eventgpt": MODELS["eventgpt"]}},
        {"compare": {"resamples": 500}},
    ):
        assert planned(**over).basis != plan.basis, over
    assert planned(report={"title": "other"}).basis == plan.basis
    moved = shutil.copytree(data, tmp_path / "moved")
    assert planned(moved).basis == plan.basis
    write(moved, [entry(n) for n in range(13)])
    assert planned(moved).basis != plan.basis

    results = tmp_path / "results"
    (results / "basis-0000.json").parent.mkdir()
    (results / "basis-0000.json").touch()
    file = results / plan.basis
    texts = set()
    for _ in range(2):
        plan.write_basis(results)
        texts.add(file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.replace", _denied)
        plan.write_basis(results)
        with pytest.raises(PlanError, match="cannot be written"):
            planned(compare={"resamples": 500}).write_basis(results)
    assert file.read_bytes() in texts, "who may only look at a study that is not merged yet may plan it"
    (results / "summary.json").touch()
    written = file.stat()
    plan.write_basis(results)
    assert len(texts) == 2, "as long as nothing is merged, none is like one that stands in Snakemake's records"
    assert file.stat() == written and len(list(results.iterdir())) == 3, "another plan's is left to the run that may be at work with it"
    with pytest.raises(PlanError, match=r"basis-0000\.json: stands for another plan"):
        plan.take_basis(results, "basis-0000.json")
    plan.take_basis(results, plan.basis)
    assert file.stat() == written and list(results.glob("basis-*")) == [file]
    plan.write(results / "plan.json")
    assert Plan.read(results / "plan.json").basis == plan.basis


def test_weights_count_by_content(data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_text("w")
    models = {"video_llava": {"adapter": "hf", "input": "frames", "weights": str(weights)}}

    def params() -> str:
        plan = build_plan(config(data, models=models), tmp_path / "cache")
        return plan.timing_params(plan.jobs[0])

    base = params()
    os.utime(weights / "model.safetensors")
    (weights / "notes.log").write_text("not a weight")
    assert params() == base
    (weights / "model.safetensors").write_text("v")
    assert params() != base


def test_a_drafts_weights_count_by_content_where_it_guesses(data: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.safetensors").write_text("w")
    models = {"video_llava": {**MODELS["video_llava"], "draft": {"weights": str(draft)}}}

    def params() -> dict[str, str]:
        plan = build_plan(config(data, models=models, variants={"engine": ["generate", "speculative"]}), tmp_path / "cache")
        return {job.variant.settings["engine"]: plan.timing_params(job) for job in plan.jobs}

    base = params()
    (draft / "model.safetensors").write_text("v")
    now = params()
    assert now["speculative"] != base["speculative"] and now["generate"] == base["generate"]


# --- on disk ----------------------------------------------------------------------------------------------------------------------------


def test_a_plan_reads_back_equal_and_is_not_rewritten(data: Path, tmp_path: Path) -> None:
    plan = build_plan(config(data), tmp_path / "cache")
    file = tmp_path / "results/plan.json"
    plan.write(file)
    before = file.stat().st_mtime_ns
    again = Plan.read(file)
    assert again == plan and again.config == plan.config
    assert (again.shards, again.blocks, again.jobs) == (plan.shards, plan.blocks, plan.jobs)
    for ours, theirs in zip(plan.jobs, again.jobs, strict=True):
        assert theirs.block.samples == tuple(ours.block.samples)
        assert again.timing_params(theirs) == plan.timing_params(ours)
        assert again.sample("d", theirs.block.samples[0]) == plan.sample("d", ours.block.samples[0])
    plan.write(file)
    assert file.stat().st_mtime_ns == before


def test_the_leaves_of_the_plan_before_are_kept_for_running_jobs_and_no_others(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "results/plan.json"
    for n in (12, 11, 10):
        build_plan(config(write(data, [entry(i) for i in range(n)])), tmp_path / "cache").write(file)
    assert len(list(file.parent.glob("plan-*.jsonl"))) == 2
    assert len(list(Plan.read(file).datasets["d"].samples)) == 10


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[:-20], "not JSON"),
        (lambda text: text.replace('"format":1,', '"format":7,'), "format 7, expected 1"),
        (lambda text: text.replace('"series":', '"serie":'), "serie"),
    ],
)
def test_a_damaged_plan_is_refused(data: Path, tmp_path: Path, damage, says: str) -> None:
    file = tmp_path / "plan.json"
    build_plan(config(data), tmp_path / "cache").write(file)
    file.write_text(damage(file.read_text()))
    with pytest.raises(PlanError, match=says):
        Plan.read(file)


def test_what_is_not_in_the_plan_is_named(data: Path, tmp_path: Path) -> None:
    plan = build_plan(config(data), tmp_path / "cache")
    with pytest.raises(PlanError, match="no plan there"):
        Plan.read(tmp_path / "none.json")
    for call in (
        lambda: plan.shard("frames", "x", "0", "0" * 16),
        lambda: plan.job("d", "eventgpt", "v", "root-0"),
        lambda: plan.clip("d", "seq/999999"),
        lambda: plan.sample("d", "seq/000001#00000000"),
        lambda: plan.verify_job("verify/none.json"),
    ):
        with pytest.raises(PlanError, match="run snakemake again"):
            call()


def test_a_study_registers_its_shards(data: Path, tmp_path: Path) -> None:
    plan = build_plan(config(data), tmp_path / "cache")
    plan.write(tmp_path / "results/plan.json")
    (note,) = (tmp_path / "cache/studies").glob("*.json")
    assert set(json.loads(note.read_text())["shards"]) == names(plan)


def test_earlier_shards_are_of_the_leaf_and_of_its_parents_and_children(data: Path, tmp_path: Path) -> None:
    plan = build_plan(config(data), tmp_path / "cache")
    shard = next(s for s in plan.shards if len(s.bucket) >= 2)
    other = ("1" if shard.bucket[0] == "0" else "0") + shard.bucket[1:]
    folder = shard.path(tmp_path / "cache").parent
    folder.mkdir(parents=True)
    wanted = {f"{b}-{'a' * 16}.parquet" for b in ("root", shard.bucket[:1], shard.bucket, shard.bucket + "0")}
    for name in (*wanted, f"{other}-{'a' * 16}.parquet", shard.path(tmp_path / "cache").name):
        (folder / name).touch()
    assert {p.name for p in shard.earlier(tmp_path / "cache")} == wanted


def test_a_proof_reads_live_so_that_no_shard_makes_it_run_again(data: Path, tmp_path: Path) -> None:
    plan = build_plan(config(data, variants={"attention": ["sdpa", "eager"]}), tmp_path / "cache")
    assert set(plan.verify_paths) == {f"verify/{m}{a}.json" for m in MODELS for a in ("", "@eager")}
    for path, source in (("verify/eventgpt@eager.json", "npy"), ("verify/video_llava.json", "mp4")):
        job = plan.verify_job(path)
        assert job.variant.settings["source"] == source and not job.block.shards and len(job.block.samples)
    (data / "mp4/seq/000003.mp4").write_text("another film")
    after = build_plan(plan.config, tmp_path / "cache")
    assert [after.verify_params(p) for p in after.verify_paths] == [plan.verify_params(p) for p in plan.verify_paths]


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    from stagebench.errors import StagebenchError

    with pytest.raises(StagebenchError, match="empty|no sample"):
        build_plan(config(write(tmp_path / "data", [])), tmp_path / "cache")


def test_a_shard_says_which_format_its_store_has() -> None:
    from stagebench.store import FORMAT_VERSION

    assert extraction_spec(config(Path("x")), "frames")["format"] == SHARD_FORMAT == FORMAT_VERSION


def test_planning_imports_nothing_heavy(data: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, pathlib, stagebench.plan as p, stagebench.config as c, json\n"
        f"p.build_plan(c.load_config(json.loads({config(data).model_dump_json()!r})), pathlib.Path({str(tmp_path / 'cache')!r}))\n"
        "print(sorted({'torch', 'transformers', 'numba', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_study_to_copy_sets_every_key_and_is_valid(repo: Path) -> None:
    import yaml

    raw = yaml.safe_load((repo / "config/dsec_1s.yaml").read_text())
    full = load_config(raw).model_dump(mode="json")
    for section, values in full.items():
        if section not in ("study", "datasets", "models", "timing"):
            assert set(raw[section]) == set(values), section
    assert set(raw["timing"]) == set(full["timing"])
    assert set(raw["datasets"]["dsec_1s"]) == set(full["datasets"]["dsec_1s"])


def test_an_axis_or_key_that_a_later_version_adds_renames_and_reruns_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stagebench.config as module

    before = build_plan(config(data), tmp_path / "cache")

    class Later(module.VariantsConfig):
        novelty: tuple[float, ...] = (1.0,)

    class Model(module.ModelConfig):
        novelty: str | None = None

    class Whole(module.Config):
        variants: Later = Later()
        models: dict[str, Model]  # type: ignore[assignment]

    monkeypatch.setattr("stagebench.plan.specs.VariantsConfig", Later)
    raw = config(data).model_dump(mode="json", exclude_defaults=True)
    after = build_plan(Whole.model_validate(raw), tmp_path / "cache")
    after.__dict__["config"] = Whole.model_validate(raw)
    assert paths(after) == paths(before)
    assert [after.timing_params(j) for j in after.jobs] == [before.timing_params(j) for j in before.jobs]
    two = build_plan(Whole.model_validate({**raw, "variants": {"novelty": [1.0, 0.5]}}), tmp_path / "cache")
    assert paths(before) < paths(two) and all("novelty0.5" in path for path in paths(two) - paths(before))
