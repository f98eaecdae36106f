"""Which jobs run: once for real, then for each change of data, settings and code by a dry run on a copy of the finished study."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagebench.plan import Plan, trie

from .conftest import MODELS, REPO, Run, Study

INDEX = "EventGPT_Instruction_Subset.json"


def read_plan(study: Study) -> Plan:
    return Plan.read(study.results / "plan.json")


def clip_keys(study: Study) -> list[str]:
    return [s.clip for s in sorted(read_plan(study).datasets["demo"].samples, key=lambda s: s.key)]


def leaf_of(study: Study, clip: str) -> str:
    plan = read_plan(study)
    return trie.find(clip, plan.datasets["demo"].leaves.__contains__) or ""


def extracted(run: Run) -> list[tuple[str, str]]:
    """(kind, bucket) of each shard that is made."""
    found = [Path(output) for rule, output in run.jobs if rule == "extract"]
    return sorted((p.parts[-3], p.stem.rpartition("-")[0]) for p in found)


def timed(run: Run) -> list[str]:
    """Model of each timing job."""
    return sorted(Path(output).parts[-3] for rule, output in run.jobs if rule == "timing")


def others(run: Run) -> dict[str, int]:
    return {rule: n for rule, n in run.rules.items() if rule not in ("extract", "timing")}


SUMMED = {"merge": 1, "report": 1}


def test_a_full_run_makes_every_shard_proof_block_table_and_the_report(finished: tuple[Study, Run]) -> None:
    study, run = finished
    leaves = len(read_plan(study).datasets["demo"].leaves)
    assert leaves >= 3
    assert run.rules == {"extract": 2 * leaves, "merge": 1, "report": 1, "timing": 3, "verify": 3}
    assert (study.results / "report.html").stat().st_size > 1000
    rows = (study.results / "tables/stages.csv").read_text()
    assert all(model in rows for model in MODELS)
    with (study.results / "tables/failures.csv").open() as file:
        assert {row["status"] for row in csv.DictReader(file)} <= {"ok"}  # a busy host may have a residual discarded


def test_every_job_leaves_a_log_and_a_benchmark(finished: tuple[Study, Run]) -> None:
    study, run = finished
    for folder, suffix in (("logs", ".log"), ("benchmarks", ".tsv")):
        assert len(list((study.results / folder).rglob(f"*{suffix}"))) == len(run.jobs)


def test_a_second_run_runs_no_job(finished: tuple[Study, Run]) -> None:
    again = finished[0].run()
    assert again.jobs == [] and "Nothing to be done" in again.text


# --- what must run nothing ---------------------------------------------------------------------------------------------------------------


def touch_all(study: Study) -> None:
    for path in study.data.rglob("*"):
        os.utime(path)


def copy_over(study: Study) -> None:
    study.data.rename(study.folder / "before")
    shutil.copytree(study.folder / "before", study.data, copy_function=shutil.copy)


def move_root(study: Study) -> None:
    study.data.rename(study.folder / "elsewhere")
    study.configure(lambda c: c["datasets"]["demo"].update(root="elsewhere"))


def change_and_revert(study: Study) -> None:
    path = next(study.data.rglob("*.mp4"))
    kept = path.read_bytes()
    path.write_bytes(kept + b"\0")
    assert study.plan().jobs
    path.write_bytes(kept)


def shuffle_index(study: Study) -> None:
    path = study.data / INDEX
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([{**e, "id": f"fresh-{n}"} for n, e in enumerate(reversed(entries))]))


def delete_a_shard(study: Study) -> None:
    next((study.folder / "cache/frames").rglob("*.parquet")).unlink()


def recut_and_reuse(study: Study) -> None:
    study.configure(lambda c: c["timing"].update(reuse=False, max_samples=100))


@pytest.mark.parametrize("change", [touch_all, copy_over, move_root, change_and_revert, shuffle_index, delete_a_shard, recut_and_reuse])
def test_what_changes_no_content_runs_nothing(study: Study, change: Any) -> None:
    change(study)
    assert study.plan().jobs == []


def test_a_fresh_checkout_runs_nothing(study: Study, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("rules", "scripts", "profiles", "envs"):
        shutil.copytree(REPO / name, checkout / name, copy_function=shutil.copyfile)
    shutil.copyfile(REPO / "Snakefile", checkout / "Snakefile")
    assert study.run("--dry-run", snakefile=checkout / "Snakefile").jobs == []


# --- what must run, and nothing else ------------------------------------------------------------------------------------------------------


def test_a_changed_video(study: Study) -> None:
    path = next(study.data.rglob("*.mp4"))
    clip = path.relative_to(study.data / "mp4").with_suffix("").as_posix()
    path.write_bytes(path.read_bytes() + b"\0")
    run = study.plan()
    assert extracted(run) == [("frames", leaf_of(study, clip))]
    assert timed(run) == ["llava", "video_llava"]
    assert others(run) == SUMMED


def test_a_changed_event_file(study: Study) -> None:
    path = next(study.data.rglob("*.npy"))
    clip = path.relative_to(study.data / "event_npy").with_suffix("").as_posix()
    path.write_bytes(path.read_bytes() + b"\0")
    run = study.plan()
    assert extracted(run) == [("events", leaf_of(study, clip))]
    assert timed(run) == ["eventgpt"]
    assert others(run) == SUMMED


def test_a_removed_sample(study: Study) -> None:
    """Chosen so that its leaf does not join its neighbour: then its own leaf is all that is made, or nothing if it held no other."""
    before = read_plan(study).datasets["demo"].leaves
    gone = clip_keys(study)[0]
    rest = sorted(set(clip_keys(study)) - {gone})
    index = study.data / INDEX
    index.write_text(json.dumps([e for e in json.loads(index.read_text()) if gone not in e["mp4_data"]]))
    run = study.plan()
    come = _leaves(rest) - {(b, tuple(before[b].clips)) for b in before}
    assert len(come) <= 1
    assert extracted(run) == sorted((kind, bucket) for bucket, _ in come for kind in ("events", "frames"))
    assert timed(run) == sorted(MODELS)
    assert others(run) == SUMMED


def test_an_added_sample(study: Study) -> None:
    from stagebench.demo import write_demo

    before = read_plan(study).datasets["demo"].leaves
    keys = set(clip_keys(study))
    write_demo(study.data, clips=7, seconds=0.5, size=(64, 96))
    run = study.plan()
    new = {Path(p).relative_to(study.data / "mp4").with_suffix("").as_posix() for p in study.data.rglob("*.mp4")} - keys
    assert len(new) == 1
    come = _leaves(sorted(keys | new)) - {(b, tuple(before[b].clips)) for b in before}
    touched = {clip for _, clips in come for clip in clips}
    assert new <= touched and len(touched) <= 3  # its own leaf, split if that was full
    assert extracted(run) == sorted((kind, bucket) for bucket, _ in come for kind in ("events", "frames"))
    assert timed(run) == sorted(MODELS)
    assert others(run) == SUMMED


def _leaves(keys: list[str]) -> set[tuple[str, tuple[str, ...]]]:
    places = trie.sort_keys(keys)
    return {(trie.bucket_name(bits), tuple(sorted(k for _, k in places[a:b]))) for bits, a, b in trie.cut(places, [1] * len(places), 2)}


def test_frames_count(study: Study) -> None:
    study.configure(lambda c: c["frames"].update(count=4))
    run = study.plan()
    assert extracted(run) == sorted(("frames", bucket) for bucket in read_plan(study).datasets["demo"].leaves)
    assert timed(run) == ["llava", "video_llava"]
    assert others(run) == {**SUMMED, "verify": 2}


def test_a_question(study: Study) -> None:
    study.configure(lambda c: c["datasets"]["demo"].update(query="Is it night?"))
    run = study.plan()
    assert (extracted(run), timed(run), others(run)) == ([], sorted(MODELS), SUMMED)


def test_one_models_weights(study: Study) -> None:
    study.configure(lambda c: c["models"]["llava"].update(weights="dummy:1"))
    run = study.plan()
    assert (extracted(run), timed(run), others(run)) == ([], ["llava"], {**SUMMED, "verify": 1})


def test_another_model(study: Study) -> None:
    study.configure(lambda c: c["models"].update(second={**MODELS["llava"], "architecture": "llava", "weights": "dummy:7"}))
    run = study.plan()
    assert (extracted(run), timed(run), others(run)) == ([], ["second"], {**SUMMED, "verify": 1})


def test_another_engine(study: Study) -> None:
    study.configure(lambda c: c.update(variants={"engine": ["generate", "static"]}))
    run = study.plan()
    assert (extracted(run), timed(run)) == ([], sorted(MODELS))
    assert all("/static-" in output for rule, output in run.jobs if rule == "timing")
    assert others(run) == SUMMED


def test_the_comparison_s_settings(study: Study) -> None:
    study.configure(lambda c: c["compare"].update(reference="llava"))
    assert study.plan().rules == SUMMED


def test_warmup(study: Study) -> None:
    study.configure(lambda c: c["timing"].update(warmup=2))
    run = study.plan()
    assert (extracted(run), timed(run), others(run)) == ([], sorted(MODELS), SUMMED)


def test_a_new_shard_format(study: Study) -> None:
    run = study.run("--dry-run", prelude="import stagebench.plan.specs as s; s.SHARD_FORMAT = 99")
    assert len(extracted(run)) == 2 * len(read_plan(study).datasets["demo"].leaves)
    assert (timed(run), others(run)) == (sorted(MODELS), SUMMED)


# --- for real ----------------------------------------------------------------------------------------------------------------------------


def test_a_missing_video_is_a_failed_row_and_its_return_takes_the_old_shard(study: Study) -> None:
    path = next(study.data.rglob("*.mp4"))
    path.rename(study.folder / "kept.mp4")
    run = study.run()
    assert run.rules == {"extract": 1, "merge": 1, "report": 1, "timing": 2}
    failures = (study.results / "tables/failures.csv").read_text()
    assert path.stem in failures
    (study.folder / "kept.mp4").rename(path)
    assert study.plan().rules == SUMMED  # the old shard and rows are there under their old names


def test_a_dry_run_leaves_the_plan_of_a_running_study_alone(study: Study) -> None:
    before = (study.results / "plan.json").read_bytes()
    study.configure(lambda c: c["frames"].update(count=4))
    assert study.plan().jobs
    assert (study.results / "plan.json").read_bytes() == before


def test_a_wrong_key_is_refused_by_name(study: Study) -> None:
    study.configure(lambda c: c["timing"].update(warmpu=2))
    run = study.run("--dry-run", check=False)
    assert run.status and "timing.warmpu: unknown key" in run.text


def test_a_job_without_a_gpu_to_hand_out_is_refused(study: Study) -> None:
    shutil.rmtree(study.results / "verify")
    run = study.run("results/demo/verify/llava.json", "--resources", "gpu=0", check=False)
    assert run.status and "resources.gpu of this job is 0, expected 1" in run.text
    log = (study.results / "logs/verify/llava.log").read_text()
    assert log.splitlines()[-1].startswith("ConfigError: ") and "Traceback" not in log


def test_paths_are_pathvars(study: Study) -> None:
    study.configure(lambda c: c.update(pathvars={"results": "out/here", "cache": "out/shards"}))
    outputs = [output for _, output in study.plan().jobs]
    assert outputs and all(output.startswith(("out/here/", "out/shards/")) for output in outputs)


def test_another_workflow_uses_this_one_as_a_module(study: Study) -> None:
    config = yaml.safe_dump(study.config)
    (study.folder / "module.yaml").write_text(config)
    snakefile = study.folder / "Snakefile"
    snakefile.write_text(
        "import yaml\n"
        f"module bench:\n    snakefile: {str(REPO / 'Snakefile')!r}\n"
        "    config: yaml.safe_load(open('module.yaml'))\n"
        "    pathvars:\n        results='mine/out',\n        cache='mine/cache',\n\n"
        "use rule * from bench as bench_*\n\n"
        "rule all:\n    default_target: True\n    input: 'mine/out/report.html'\n"
    )
    run = study.run("--dry-run", "--workflow-profile", "none", snakefile=snakefile)
    rules = {name.removeprefix("bench_"): n for name, n in run.rules.items()}
    assert rules["timing"] == 3 and rules["verify"] == 3
    assert all(output.startswith(("mine/out/", "mine/cache/")) for rule, output in run.jobs if rule != "bench_all")
