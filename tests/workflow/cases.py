"""What a user may do between two runs, and exactly which jobs that is worth. Each case changes a finished study and says what must run."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagebench.plan import Plan, trie

from .conftest import MODELS, REPO, Run, Study

INDEX = "EventGPT_Instruction_Subset.json"
MAX_CLIPS = 2
SUMMED = {"merge": 1, "report": 1}
ALL = sorted(MODELS)
ON_VIDEO = ["llava", "video_llava"]


@dataclass(frozen=True)
class Expected:
    """The jobs of one dry run."""

    extract: list[tuple[str, str]] = field(default_factory=list)
    """(kind, bucket) of each shard, sorted."""
    timing: list[str] = field(default_factory=list)
    """Model of each timing job, sorted."""
    others: dict[str, int] = field(default_factory=dict)
    """All other rules, with their number of jobs."""
    how: dict[str, Any] = field(default_factory=dict)
    """Arguments of Study.run besides --dry-run."""


NOTHING = Expected()


def jobs_of(run: Run) -> Expected:
    """What a run did, or would do, in the words of `Expected`."""
    return Expected(extracted(run), timed(run), {rule: n for rule, n in run.rules.items() if rule not in ("extract", "timing")})


def extracted(run: Run) -> list[tuple[str, str]]:
    found = [Path(output) for rule, output in run.jobs if rule == "extract"]
    return sorted((p.parts[-3], p.stem.rpartition("-")[0]) for p in found)


def timed(run: Run) -> list[str]:
    return sorted(Path(output).parts[-3] for rule, output in run.jobs if rule == "timing")


def read_plan(study: Study) -> Plan:
    return Plan.read(study.results / "plan.json")


def clip_keys(study: Study) -> list[str]:
    return sorted(s.clip for s in read_plan(study).datasets["demo"].samples)


def buckets(study: Study) -> list[str]:
    return list(read_plan(study).datasets["demo"].leaves)


def _a_file(study: Study, suffix: str) -> tuple[Path, str]:
    """One raw file, and its clip's bucket."""
    path = min(study.data.rglob(f"*{suffix}"))
    clip = Path(*path.relative_to(study.data).parts[1:]).with_suffix("").as_posix()
    return path, trie.find(clip, read_plan(study).datasets["demo"].leaves.__contains__) or ""


def _moved_leaves(study: Study, keys: list[str]) -> list[tuple[str, str]]:
    """(kind, bucket) of the leaves that the study would have with these clips and has not. At most three: a clip's own leaf, split or
    joined."""
    had = {(bucket, tuple(leaf.clips)) for bucket, leaf in read_plan(study).datasets["demo"].leaves.items()}
    places = trie.sort_keys(keys)
    cut = trie.cut(places, [1] * len(places), MAX_CLIPS)
    has = {(trie.bucket_name(bits), tuple(sorted(key for _, key in places[a:b]))) for bits, a, b in cut}
    assert len(has - had) <= 3
    return sorted((kind, bucket) for bucket, _ in has - had for kind in ("events", "frames"))


# --- nothing that counts has changed -----------------------------------------------------------------------------------------------------


def touch_a_video(study: Study) -> Expected:
    os.utime(_a_file(study, ".mp4")[0])
    return NOTHING


def touch_all(study: Study) -> Expected:
    for path in study.data.rglob("*"):
        os.utime(path)
    return NOTHING


def copy_the_dataset(study: Study) -> Expected:
    study.data.rename(study.folder / "before")
    shutil.copytree(study.folder / "before", study.data, copy_function=shutil.copy)
    return NOTHING


def move_the_dataset_to_another_root(study: Study) -> Expected:
    study.data.rename(study.folder / "elsewhere")
    study.configure(lambda c: c["datasets"]["demo"].update(root="elsewhere"))
    return NOTHING


def revert_a_change(study: Study) -> Expected:
    path, _ = _a_file(study, ".mp4")
    kept = path.read_bytes()
    path.write_bytes(kept + b"\0")
    assert study.plan().jobs
    path.write_bytes(kept)
    return NOTHING


def shuffle_the_index_and_draw_new_ids(study: Study) -> Expected:
    path = study.data / INDEX
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([{**e, "id": f"fresh-{n}"} for n, e in enumerate(reversed(entries))]))
    return NOTHING


def delete_one_shard(study: Study) -> Expected:
    """All that was made from it is there."""
    min((study.folder / "cache/frames").rglob("*.parquet")).unlink()
    return NOTHING


def cut_blocks_otherwise_and_take_nothing_over(study: Study) -> Expected:
    study.configure(lambda c: c["timing"].update(reuse=False, max_samples=100))
    return NOTHING


def fresh_git_checkout(study: Study) -> Expected:
    """A clone of a commit that holds what this checkout holds: other folder, other times."""
    origin, clone = study.folder.parent / "origin", study.folder.parent / "clone"
    for name in ("rules", "scripts", "profiles", "envs", "config"):
        shutil.copytree(REPO / name, origin / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(REPO / "Snakefile", origin / "Snakefile")
    who = ("-c", "user.name=tester", "-c", "user.email=tester@example.org", "-c", "init.defaultBranch=main")
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "the workflow"), ("clone", "-q", str(origin), str(clone))):
        subprocess.run(["git", *who, *command], cwd=origin, check=True, capture_output=True)
    return Expected(how={"snakefile": clone / "Snakefile"})


def raise_the_plan_format(study: Study) -> Expected:
    """How a plan is written is nobody's result."""
    return Expected(how={"prelude": "import stagebench.plan.file as f; f.PLAN_FORMAT = 99"})


# --- the dataset -------------------------------------------------------------------------------------------------------------------------


def change_a_video(study: Study) -> Expected:
    path, bucket = _a_file(study, ".mp4")
    path.write_bytes(path.read_bytes() + b"\0")
    return Expected([("frames", bucket)], ON_VIDEO, SUMMED)


def change_an_event_file(study: Study) -> Expected:
    path, bucket = _a_file(study, ".npy")
    path.write_bytes(path.read_bytes() + b"\0")
    return Expected([("events", bucket)], ["eventgpt"], SUMMED)


def add_a_clip(study: Study) -> Expected:
    from stagebench.demo import write_demo

    old = clip_keys(study)
    write_demo(study.data, clips=7, seconds=0.5, size=(64, 96))
    keys = sorted(p.relative_to(study.data / "mp4").with_suffix("").as_posix() for p in study.data.rglob("*.mp4"))
    assert len(set(keys) - set(old)) == 1
    return Expected(_moved_leaves(study, keys), ALL, SUMMED)


def remove_a_clip(study: Study) -> Expected:
    gone, *rest = clip_keys(study)
    index = study.data / INDEX
    index.write_text(json.dumps([e for e in json.loads(index.read_text()) if gone not in e["mp4_data"]]))
    return Expected(_moved_leaves(study, rest), ALL, SUMMED)


def rename_a_clip(study: Study) -> Expected:
    """It is another clip: it goes from its leaf and comes to another."""
    old, *rest = clip_keys(study)
    new = f"{old}9"
    for folder, suffix in (("mp4", ".mp4"), ("event_npy", ".npy")):
        (study.data / folder / f"{old}{suffix}").rename(study.data / folder / f"{new}{suffix}")
    index = study.data / INDEX
    index.write_text(index.read_text().replace(old, new))
    return Expected(_moved_leaves(study, [new, *rest]), ALL, SUMMED)


def delete_one_shard_and_ask_anew(study: Study) -> Expected:
    """Of what jobs need now, only the shard that is gone is made again."""
    shard = min((study.folder / "cache/frames").rglob("*.parquet"))
    shard.unlink()
    study.configure(lambda c: c["datasets"]["demo"].update(query="Is it night?"))
    return Expected([("frames", shard.stem.rpartition("-")[0])], ALL, SUMMED)


# --- the settings ------------------------------------------------------------------------------------------------------------------------


def change_the_query(study: Study) -> Expected:
    study.configure(lambda c: c["datasets"]["demo"].update(query="Is it night?"))
    return Expected([], ALL, SUMMED)


def change_frames_count(study: Study) -> Expected:
    study.configure(lambda c: c["frames"].update(count=4))
    return Expected(sorted(("frames", bucket) for bucket in buckets(study)), ON_VIDEO, {**SUMMED, "verify": 2})


def change_the_seed_of_random_weights(study: Study) -> Expected:
    study.configure(lambda c: c["models"]["llava"].update(weights="dummy:1"))
    return Expected([], ["llava"], {**SUMMED, "verify": 1})


def change_a_models_weights_path(study: Study) -> Expected:
    """To a folder, whose files count by content: touching them is worth nothing more."""
    folder = study.folder / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (folder / "model.safetensors").write_bytes(b"one")
    study.configure(lambda c: c["models"]["llava"].update(weights=str(folder), preset=None))
    first = study.plan()
    os.utime(folder / "model.safetensors")
    assert study.plan().jobs == first.jobs
    return Expected([], ["llava"], {**SUMMED, "verify": 1})


def add_a_model(study: Study) -> Expected:
    study.configure(lambda c: c["models"].update(second={**MODELS["llava"], "architecture": "llava", "weights": "dummy:7"}))
    return Expected([], ["second"], {**SUMMED, "verify": 1})


def remove_a_model(study: Study) -> Expected:
    study.configure(lambda c: c["models"].pop("llava"))
    return Expected([], [], SUMMED)


def add_an_engine(study: Study) -> Expected:
    study.configure(lambda c: c.update(variants={"engine": ["generate", "static"]}))
    return Expected([], ALL, SUMMED)


def change_warmup(study: Study) -> Expected:
    study.configure(lambda c: c["timing"].update(warmup=2))
    return Expected([], ALL, SUMMED)


def change_the_reference(study: Study) -> Expected:
    study.configure(lambda c: c["compare"].update(reference="llava"))
    return Expected([], [], SUMMED)


def change_how_many_samples_may_fail(study: Study) -> Expected:
    """It decides whether a study is VALID, and nothing that was extracted or measured."""
    study.configure(lambda c: c.setdefault("shards", {}).update(max_failed=0.5))
    return Expected([], [], SUMMED)


def change_the_reports_title(study: Study) -> Expected:
    study.configure(lambda c: c.update(report={"title": "Another heading"}))
    return Expected([], [], {"report": 1})


# --- another version of stagebench -------------------------------------------------------------------------------------------------------


def raise_the_shard_format(study: Study) -> Expected:
    shards = sorted((kind, bucket) for kind in ("events", "frames") for bucket in buckets(study))
    return Expected(shards, ALL, SUMMED, {"prelude": "import stagebench.plan.specs as s; s.SHARD_FORMAT = 99"})


def raise_the_timing_version(study: Study) -> Expected:
    how = {"prelude": "import stagebench.plan.build as b; b.TIMING_VERSION = 99"}
    return Expected([], ALL, {**SUMMED, "verify": 3}, how)


def raise_the_row_format(study: Study) -> Expected:
    how = {"prelude": "import stagebench.rows as r; r.FORMAT_VERSION = 99"}
    return Expected([], ALL, {**SUMMED, "verify": 3}, how)


CASES: tuple[Callable[[Study], Expected], ...] = (
    *(touch_a_video, touch_all, copy_the_dataset, move_the_dataset_to_another_root, revert_a_change, shuffle_the_index_and_draw_new_ids),
    *(delete_one_shard, cut_blocks_otherwise_and_take_nothing_over, fresh_git_checkout, raise_the_plan_format),
    *(change_a_video, change_an_event_file, add_a_clip, remove_a_clip, rename_a_clip, delete_one_shard_and_ask_anew),
    *(change_the_query, change_frames_count, change_the_seed_of_random_weights, change_a_models_weights_path, add_a_model, remove_a_model),
    *(add_an_engine, change_warmup, change_the_reference, change_how_many_samples_may_fail, change_the_reports_title),
    *(raise_the_shard_format, raise_the_timing_version, raise_the_row_format),
)
