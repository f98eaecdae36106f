"""The demo through a real Slurm: where each job ran, on which GPU, and that a node that dies and a job that is preempted cost nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from stagebench.plan import Plan
from stagebench.session.output import read_metadata

from .conftest import Slurm

REPO = Path(__file__).resolve().parents[2]
CLIPS = 6
REPEATS = 12
WAIT_S = 240

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@dataclass
class Study:
    """A folder that all nodes see."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results/demo"

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Snakemake with profiles/slurm; what this toy cannot give (accounts, accounting, sixteen cores) is set otherwise."""
        return self._start(
            *("--profile", str(REPO / "profiles/slurm"), "--slurm-no-account", "--slurm-status-command", "squeue"),
            *("--slurm-init-seconds-before-status-checks", "2", "--default-resources", "slurm_partition=cpu", "mem_mb=500", "runtime=10"),
            *("--set-resources", "timing:slurm_partition=gpu", "verify:slurm_partition=gpu", "timing:mem_mb=1000", "verify:mem_mb=1000"),
            *options,
        )

    def start_generic(self, *options: str) -> subprocess.Popen[str]:
        """The same with profiles/generic, whose submit command is Slurm's."""
        return self._start(
            *("--profile", str(REPO / "profiles/generic"), "--cluster-generic-status-cmd", str(REPO / "profiles/generic/status.sh")),
            *(*options, "--set-resources", "timing:mem_mb=1000", "timing:submit_options=--partition=gpu --gpus=1"),
        )

    def _start(self, *options: str) -> subprocess.Popen[str]:
        command = [
            *(sys.executable, "-m", "snakemake", "--snakefile", str(REPO / "Snakefile"), "--directory", str(self.folder), "--nocolor"),
            *(
                "--configfile",
                str(self.folder / "config.yaml"),
                "--set-threads",
                "timing=1",
                "verify=1",
                "extract=1",
                "--latency-wait",
                "5",
            ),
            *options,
        ]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        env |= {"OMP_NUM_THREADS": "1", "PATH": path}
        env.pop("CUDA_VISIBLE_DEVICES", None)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

    def timings(self) -> dict[str, dict[str, Any]]:
        """What each timing file says of its job, by path."""
        found = (self.results / "timings").rglob("*.parquet")
        return {str(path.relative_to(self.results)): read_metadata(path)["job"] for path in found}

    def tokens(self) -> dict[tuple[str, str, str], set[tuple[int, ...]]]:
        """What each model said to each sample in each length mode, over all repeats."""
        said: dict[tuple[str, str, str], set[tuple[int, ...]]] = {}
        for path in (self.results / "timings").rglob("*.parquet"):
            for row in pq.ParquetFile(path).read().to_pylist():
                assert row["status"] in ("ok", "capped"), row
                said.setdefault((row["model"], row["sample"], row["length"]), set()).add(tuple(row["token_ids"]))
        return said


@dataclass
class Running:
    """A timing job seen at work, with a finished sample in its journal."""

    output: str
    job: str
    node: str


@dataclass
class Done:
    """A study that ran, and what was seen of it."""

    study: Study
    text: str
    killed: Running
    """Its node died."""
    preempted: Running
    """It was sent back into the queue."""
    jobs: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def done(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The study, run once; a timing job on g2 loses its node after a finished sample, one on g1 is preempted."""
    from stagebench.demo import write_demo

    study = Study(tmp_path_factory.mktemp("study"))
    write_demo(study.folder / "data", clips=CLIPS, seconds=0.5, size=(64, 96))
    (study.folder / "config.yaml").write_text(yaml.safe_dump(_settings()))
    process = study.start()
    hit: dict[str, Running] = {}
    try:
        while set(hit) != {"g1", "g2"}:
            found = _wait(process, lambda: _journaled(study, slurm, {"g1", "g2"} - set(hit)))
            hit[found.node] = found
            if found.node == "g2":
                slurm.kill_node("g2")
            else:
                # what PreemptMode=REQUEUE does: SIGTERM, a grace time, back into the queue
                subprocess.run(["scontrol", "update", f"jobid={found.job}", "Requeue=1"], check=True)
                subprocess.run(["scontrol", "requeue", found.job], check=True)
        text = process.communicate(timeout=WAIT_S)[0]
    finally:
        process.kill()
    assert process.returncode == 0, text[-6000:]
    return Done(study, text, killed=hit["g2"], preempted=hit["g1"], jobs=slurm.jobs())


def test_every_job_of_the_plan_ended_well(done: Done) -> None:
    plan = Plan.read(done.study.results / "plan.json")
    assert set(done.study.timings()) == {job.path for job in plan.jobs}
    assert (done.study.results / "report.html").stat().st_size > 1000
    said = done.study.tokens()
    assert len(said) == 2 * CLIPS * 2  # models, clips, length modes
    assert {len(ids) for ids in said.values()} == {1}, "greedy repeats disagree"


def test_extraction_ran_on_the_cpu_node_and_timing_on_the_gpu_nodes(done: Done) -> None:
    nodes: dict[str, set[str]] = {}
    for job in done.jobs.values():
        nodes.setdefault(job["rule"].removeprefix("rule_").split("_")[0], set()).add(job["node"])
    assert set(nodes) == {"extract", "verify", "timing"}, "merge and report are local"
    assert nodes["extract"] == {"c1"}
    assert nodes["timing"] | nodes["verify"] == {"g1", "g2"}


def test_each_timing_job_had_one_gpu_and_each_gpu_one_job_at_a_time(done: Done) -> None:
    uses: dict[tuple[str, str], list[tuple[datetime, datetime]]] = {}
    for job in done.study.timings().values():
        host = job["host"]
        assert host["node"] in ("g1", "g2")
        assert host["cuda_visible_devices"] in ({"g1": ("0", "1"), "g2": ("0",)}[host["node"]])
        span = (datetime.fromisoformat(job["started"]), datetime.fromisoformat(job["finished"]))
        uses.setdefault((host["node"], host["cuda_visible_devices"]), []).append(span)
    assert {("g1", "0"), ("g1", "1")} <= set(uses), "both GPUs of g1 were used"
    for spans in uses.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_a_job_whose_node_died_was_given_to_another_and_went_on_after_its_last_sample(done: Done) -> None:
    job = done.study.timings()[done.killed.output]
    assert job["host"]["node"] == "g1"
    assert job["host"]["scheduler_job"] != done.killed.job, "Snakemake's own retry, for the job was not to be requeued"
    assert job["resumed"] >= 1
    assert done.jobs[done.killed.job]["state"] == "NODE_FAIL"


def test_a_preempted_job_is_requeued_and_goes_on_after_its_last_sample(done: Done) -> None:
    job = done.study.timings()[done.preempted.output]
    assert job["host"]["scheduler_job"] == done.preempted.job, "the same Slurm job, started again"
    assert job["resumed"] >= 1


def test_no_journal_is_left(done: Done) -> None:
    assert not list((done.study.results / "timings").rglob("*.journal*"))


def test_another_scheduler_through_its_submit_command(done: Done, slurm: Slurm) -> None:
    before, said = slurm.jobs(), done.study.tokens()
    target = done.study.results / done.killed.output
    target.unlink()
    process = done.study.start_generic(str(target.relative_to(done.study.folder)))
    try:
        text = process.communicate(timeout=WAIT_S)[0]
    finally:
        process.kill()
    assert process.returncode == 0, text[-6000:]
    host = done.study.timings()[done.killed.output]["host"]
    assert host["scheduler_job"] not in before and host["node"] == "g1" and host["cuda_visible_devices"] in ("0", "1")
    assert done.study.tokens() == said, "the job that was retried said what one that ran through says"


def _settings() -> dict[str, Any]:
    return {
        "study": "demo",
        "datasets": {"demo": {"root": "data", "sensor": [64, 96]}},
        "shards": {"max_clips": 8},
        "models": {
            "eventgpt": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"},
            "video_llava": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
        },
        # long enough a sample for a node to die within a job
        "timing": {
            "max_samples": 4,
            "warmup": 1,
            "repeats": REPEATS,
            "lengths": ["natural", 16],
            "max_new_tokens": 16,
            "plain_share": 0,
            "exclusive": False,
        },
        "compare": {"reference": "video_llava", "resamples": 200},
    }


def _journaled(study: Study, slurm: Slurm, nodes: set[str]) -> Running | None:
    """A timing job on one of the nodes that has a finished sample in its journal and is not done."""
    for journal in (study.results / "timings").rglob("*.parquet.journal"):
        output = journal.with_suffix("")
        try:
            lines = journal.read_bytes().count(b"\n")
        except FileNotFoundError:  # the job ended meanwhile
            continue
        if lines < 2 or output.exists():
            continue
        for number, job in slurm.jobs().items():
            if job["state"] == "RUNNING" and job["node"] in nodes and output.stem in job["rule"] and output.parts[-3] in job["rule"]:
                return Running(str(output.relative_to(study.results)), number, job["node"])
    return None


def _wait(process: subprocess.Popen[str], found: Callable[[], Running | None]) -> Running:
    """Poll until something is found; what Snakemake said when it ends first."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if (it := found()) is not None:
            return it
        if process.poll() is not None:
            raise AssertionError(f"snakemake ended first: {process.communicate()[0][-6000:]}")
        time.sleep(0.1)
    raise AssertionError(f"nothing after {WAIT_S} s")
