"""Which jobs run: once for real, then for each change of data, settings and code by a dry run on a copy of the finished study."""

import csv
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagebench.session.output import read_metadata

from .cases import ALL, CASES, SUMMED, Expected, jobs_of, read_plan, timed
from .conftest import MODELS, Run, Study


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


def test_the_first_model_is_what_others_are_compared_with_also_when_the_plan_is_taken_over(study: Study) -> None:
    def turn(config: dict[str, Any]) -> None:
        config["models"] = dict(reversed(config["models"].items()))
        config["compare"]["reference"] = None

    study.configure(turn)
    first = next(iter(study.config["models"]))
    assert first != min(MODELS)
    assert study.run().rules == SUMMED
    with (study.results / "tables/comparison.csv").open() as file:
        assert {row["reference"] for row in csv.DictReader(file)} == {first}
    for _ in range(2):
        time.sleep(2.5)  # a file that is younger is no evidence
        assert study.plan().jobs == []
    assert (study.results / "plan.stamps").exists()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_exactly_these_jobs_run(study: Study, case: Callable[[Study], Expected]) -> None:
    expected = case(study)
    found = jobs_of(study.run("--dry-run", **expected.how))
    assert (found.extract, found.timing, found.others) == (expected.extract, expected.timing, expected.others)


def test_another_engine_is_timed_beside_the_first(study: Study) -> None:
    study.configure(lambda c: c.update(variants={"engine": ["generate", "static"]}))
    assert all("/static-" in output for rule, output in study.plan().jobs if rule == "timing")


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


def test_another_title_is_on_the_page_and_costs_the_report_alone(study: Study) -> None:
    study.configure(lambda c: c.update(report={"title": "Night & <day>"}))
    assert study.run().rules == {"report": 1}
    assert "<h1>Night &amp; &lt;day&gt;</h1>" in (study.results / "report.html").read_text()
    assert study.plan().jobs == []


def test_killed_in_the_midst_of_a_timing_job_it_goes_on_there(study: Study) -> None:
    """kill -9 for all processes while the second of three jobs is at work: the first is not run again, the second not from its start."""
    study.configure(lambda c: c["timing"].update(repeats=12))
    before = {path: path.stat().st_mtime_ns for path in (study.results / "timings").rglob("*.parquet")}
    process = study.start()
    try:
        journal = _second_at_work(process, study, before)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    # a job is a process group of its own only on a cluster: here the whole session is gone
    assert journal.exists() and not journal.with_suffix("").exists(), "Snakemake removes a job's old output before it starts"
    assert study.run("--unlock").status == 0
    done = {path.parts[-3] for path, when in before.items() if path.exists() and path.stat().st_mtime_ns != when}
    assert len(done) == 1
    run = study.run()
    assert (timed(run), {rule: n for rule, n in run.rules.items() if rule != "timing"}) == (sorted(set(ALL) - done), SUMMED)
    resumed = {path.parts[-3]: read_metadata(path)["job"]["resumed"] for path in before}
    assert resumed[journal.parts[-3]] >= 1 and sum(n > 0 for n in resumed.values()) == 1
    assert study.plan().jobs == []


def _second_at_work(process: subprocess.Popen[bytes], study: Study, before: dict[Path, int]) -> Path:
    """The journal of the second timing job, once a finished sample stands in it."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended first"
        if any(path.exists() and path.stat().st_mtime_ns != when for path, when in before.items()):
            for journal in (study.results / "timings").rglob("*.journal"):
                if journal.read_bytes().count(b"\n") >= 2:
                    return journal
        time.sleep(0.02)
    raise AssertionError("no second timing job within 300 s")


def test_a_dry_run_leaves_the_plan_of_a_running_study_alone(study: Study) -> None:
    before = (study.results / "plan.json").read_bytes()
    study.configure(lambda c: c["frames"].update(count=4))
    assert study.plan().jobs
    assert (study.results / "plan.json").read_bytes() == before


def test_results_without_records_are_merged_again_for_another_plan_and_refused(study: Study) -> None:
    """As after `stagebench run`, or in another checkout: Snakemake has nothing to compare lengths with, which are in no file's name."""
    shutil.rmtree(study.folder / ".snakemake")
    assert study.plan().jobs == [], "the same plan: all is taken as it is"
    study.configure(lambda c: c["timing"].update(lengths=["natural", 3]))
    run = study.run(check=False)
    assert run.status and run.rules == {"merge": 1}
    end = run.text[run.text.index("stagebench: 1 job failed") :]
    assert "applied.timing.lengths: [" in end and "So 2 others:" in end and "give this study a name of its own" in end
    assert study.plan().rules == SUMMED, "a failed merge is not forgotten"
    shutil.rmtree(study.results / "timings")
    assert study.plan().rules == {"timing": 3, **SUMMED}


def test_jobs_that_all_failed_run_again(study: Study) -> None:
    """Snakemake notes a job's settings when it starts, so that a failed one's look unchanged, and what it would have made is no target."""
    study.configure(lambda c: c["timing"].update(lengths=["natural", 3]))
    failed = study.run("--resources", "gpu=0", check=False)
    assert failed.status and failed.rules == {"timing": 3}
    assert study.plan().rules == {"timing": 3, **SUMMED}


def test_what_another_checkout_merged_otherwise_is_merged_again(study: Study) -> None:
    """Both have records of their own, and those here say of each input, by name and checksum, that it has been merged."""
    records, away = study.folder / ".snakemake", study.folder / "records"
    records.rename(away)
    study.configure(lambda c: c["compare"].update(reference="llava"))
    assert study.run().rules == SUMMED, "there, of proofs and timings that are as planned"
    shutil.rmtree(records)
    away.rename(records)
    study.configure(lambda c: c["compare"].update(reference="video_llava"))
    assert study.plan().rules == SUMMED, "the tables are those of the other plan"


def test_a_plan_that_was_looked_at_during_a_merge_is_not_taken_for_merged(study: Study) -> None:
    """The dry run's file is older than the tables, which are not that plan's."""

    def refer_to(model: str) -> None:
        study.configure(lambda c: c["compare"].update(reference=model))

    refer_to("llava")
    assert study.plan().rules == SUMMED
    refer_to("video_llava")
    assert study.run("--forcerun", "merge").rules == SUMMED
    shutil.rmtree(study.folder / ".snakemake")
    refer_to("llava")
    assert study.plan().rules == SUMMED


def test_a_report_alone_is_asked_for_again_after_a_merge_that_failed(study: Study) -> None:
    """As a workflow does that uses this one as a module: the old page is there, and the merge's inputs are those that it failed with."""
    report = str(study.results.relative_to(study.folder) / "report.html")
    file = min((study.results / "timings").rglob("*.parquet"))
    file.write_bytes(b"no Parquet")
    failed = study.run(report, check=False)
    assert failed.status and failed.rules == {"merge": 1}
    assert study.run(report, "--dry-run").rules == SUMMED


@pytest.mark.parametrize("rule", ["timing", "report", "verify"])
def test_a_job_is_not_done_by_another_plan_than_it_was_made_with(study: Study, rule: str) -> None:
    """Its settings would be noted as those that it was done with."""

    def change(config: dict[str, Any]) -> None:
        if rule == "timing":
            config["timing"].update(warmup=2)
        elif rule == "report":
            config.update(report={"title": "Another"})
        else:
            config["models"]["llava"].update(weights="dummy:1")

    study.configure(change)
    run = study.run("--no-hooks", "--until", rule, check=False)
    assert run.status and run.rules == {rule: 3 if rule == "timing" else 1}
    assert "PlanError: results/demo/plan.json: not the plan that this job was made with" in run.text


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
    end = run.text[run.text.index("stagebench: 1 job failed") :]
    assert "  ConfigError: resources.gpu of this job is 0" in end, "the cause stands in the last lines, whatever ran in between"
    assert "verify results/demo/verify/llava.json (log: results/demo/logs/verify/llava.log)" in end


def test_paths_are_pathvars(study: Study) -> None:
    study.configure(lambda c: c.update(pathvars={"results": "out/here", "cache": "out/shards"}))
    outputs = [output for _, output in study.plan().jobs]
    assert outputs and all(output.startswith(("out/here/", "out/shards/")) for output in outputs)
