"""A whole timing job on the demo dataset: from the plan to the file, killed and run again."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from clip_study import extracted
from stagebench.config import load_config
from stagebench.demo import write_demo
from stagebench.errors import TimingError
from stagebench.models.hf import HuggingFaceAdapter
from stagebench.plan import Plan
from stagebench.rows import SCHEMA, Code
from stagebench.session import run_job
from stagebench.session.output import read_metadata, write_rows
from timing_jobs import Killed, killed_after

torch.set_num_threads(1)


def study(root, **timing):
    return load_config(
        {
            "study": "t",
            "datasets": {"demo": {"root": str(root / "demo"), "sensor": [64, 96]}},
            "models": {"llava": {"adapter": "hf", "input": "frames", "frames_as": "grid", "weights": "dummy:0", "preset": "tiny"}},
            "timing": {"lengths": ["natural", 4], "max_new_tokens": 6, "repeats": 2, "warmup": 1} | timing,
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four clips, one of which has no video."""
    root = tmp_path_factory.mktemp("job")
    write_demo(root / "demo", clips=4, seconds=0.5, size=(64, 96))
    videos = sorted((root / "demo").rglob("*.mp4"))
    videos[2].write_bytes(b"not a video")
    config = load_config(study(root).model_dump(mode="json") | {"shards": {"max_failed": 0.5}})
    plan = extracted(config, root / "cache")
    plan.write(root / "plan.json")
    return root


@pytest.fixture
def plan(root):
    return Plan.read(root / "plan.json")


def timed(plan, root, output, **arguments):
    return run_job(plan, next(iter(plan.jobs)), output, cache=root / "cache", device="cpu", threads=1, **arguments)


@pytest.fixture(scope="module")
def first(root, tmp_path_factory):
    plan = Plan.read(root / "plan.json")
    output = tmp_path_factory.mktemp("first") / "a.parquet"
    return output, timed(plan, root, output)


def test_the_file_holds_every_sample_once_a_run(first, plan):
    output, report = first
    table = pq.read_table(output, page_checksum_verification=True, partitioning=None)
    assert table.schema.equals(SCHEMA, check_metadata=False)
    rows = pl.DataFrame(table)
    job = next(iter(plan.jobs))
    assert set(rows["sample"]) == set(job.block.samples)
    assert not rows.select("sample", "length", "repeat").is_duplicated().any()
    good = rows.filter(pl.col("status") != "skipped")
    assert len(good) == 3 * 2 * 2 and report.rows == len(rows) == 14
    assert (good["encoder_calls"] == 1).all() and (good["limit_ms"] > 0).all() and (good["harness_ms"] > 0).all()
    assert good["feature_hash"].n_unique() == 3
    skipped = rows.filter(pl.col("status") == "skipped")
    assert skipped["reason"].is_not_null().all() and skipped["total_ms"].is_null().all() and len(skipped) == 2
    assert not output.with_name("a.parquet.journal").exists()


def test_the_metadata_says_how_it_was_measured(first, plan):
    found = read_metadata(first[0])
    job, settings = found["job"], found["study"]
    assert set(job["anchors"]["before"]) == set(job["anchors"]["after"])
    assert job["first_call"]["total_ms"] > 0 and len(job["warmup"]) == 1
    assert job["harness_ms"]["total"] > 0 and job["bandwidth_gb_s"] > 0 and job["step_bytes"] > 0
    assert job["statuses"]["skipped"] == 2 and job["device"] == "cpu"
    cost = job["cost"]
    assert 0 < cost["samples_s"] <= job["measuring_s"] < cost["wall_s"] and cost["share"] == cost["samples_s"] / cost["wall_s"]
    assert settings["dtype"] == "float32" and settings["model"]["revision"] == "dummy:0/tiny"
    assert settings["timing"]["warmup"] == 1 and "max_samples" not in settings["timing"]
    assert found["machine"]["cpu"]["threads"] == 1 and "host" not in found["machine"]
    json.dumps(found, allow_nan=False)


def test_the_cost_of_a_job_is_its_wall_time_however_it_ends(root, tmp_path, monkeypatch):
    """A job among others in one process, one that goes on, one that takes all rows over, and one whose runs all fail."""
    plan = extracted(study(root), root / "cache")

    def cost_of(name):
        begin = time.monotonic()
        timed(plan, root, tmp_path / f"{name}.parquet")
        wall = time.monotonic() - begin
        cost = read_metadata(tmp_path / f"{name}.parquet")["job"]["cost"]
        assert sum(cost["parts"].values()) == pytest.approx(cost["wall_s"]) and 0.5 * wall < cost["wall_s"] <= wall
        assert "start" not in cost["parts"] and min(cost["parts"].values()) >= 0 and 0 <= cost["share"] <= 1
        return cost["parts"]

    with pytest.raises(Killed):
        timed(plan, root, tmp_path / "resumed.parquet", progress=killed_after(3))
    assert cost_of("resumed")["failed runs"] == 0
    assert cost_of("others")["samples"] >= 0

    def full(self, inputs):
        time.sleep(0.1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HuggingFaceAdapter, "encode", full)
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    parts = cost_of("failed")
    assert parts["samples"] == 0 and parts["failed runs"] >= 6 * 0.1 and parts["between samples"] < parts["failed runs"]


def test_a_killed_job_goes_on_and_says_so(plan, root, tmp_path):
    output = tmp_path / "a.parquet"
    with pytest.raises(Killed):
        timed(plan, root, output, progress=killed_after(2))
    assert not output.exists() and output.with_name("a.parquet.journal").exists()
    report = timed(plan, root, output)
    rows = pl.read_parquet(output)
    assert report.resumed == 1 and Code.RESUMED in {f.code for f in report.findings}
    assert len(rows) == 14 and not rows.select("sample", "length", "repeat").is_duplicated().any()
    measured = rows.filter(pl.col("status") != "skipped")
    assert measured["codes"].list.contains("resumed").all()
    assert measured["job"].n_unique() <= 2


def test_unchanged_samples_are_taken_over(plan, root, first, tmp_path):
    # without codes: a busy test machine can make a row suspect, which is then rightly measured again
    rows = [row | {"codes": []} for row in pq.read_table(first[0], partitioning=None).to_pylist()]
    write_rows(tmp_path / "earlier.parquet", rows, read_metadata(first[0]))
    report = timed(plan, root, tmp_path / "b.parquet")
    rows = pl.read_parquet(tmp_path / "b.parquet").filter(pl.col("status") != "skipped")
    assert report.reused == 3 and rows["codes"].list.contains("reused").all()
    assert set(rows["job"]) == {read_metadata(first[0])["job"]["id"]}


def test_reuse_false_times_every_sample_again(plan, root, first, tmp_path):
    """The rows that are taken over otherwise are there, and the setting is no part of what they must agree in."""
    rows = [row | {"codes": []} for row in pq.read_table(first[0], partitioning=None).to_pylist()]
    write_rows(tmp_path / "earlier.parquet", rows, read_metadata(first[0]))
    again = extracted(study(root, reuse=False), root / "cache")
    report = timed(again, root, tmp_path / "b.parquet")
    rows = pl.read_parquet(tmp_path / "b.parquet")
    assert report.reused == 0 and not rows["codes"].list.contains("reused").any()
    assert read_metadata(first[0])["job"]["id"] not in set(rows["job"])
    assert timed(extracted(study(root, reuse=True), root / "cache"), root, tmp_path / "c.parquet").reused == 3


def test_other_settings_take_nothing_over(root, first, tmp_path):
    config = study(root, warmup=0).model_dump(mode="json") | {"shards": {"max_failed": 0.5}}
    plan = extracted(load_config(config), root / "cache")
    (tmp_path / "earlier.parquet").write_bytes(first[0].read_bytes())
    assert timed(plan, root, tmp_path / "b.parquet").reused == 0


def test_a_device_that_is_not_there(plan, root, tmp_path):
    with pytest.raises(TimingError, match="no GPU|sees"):
        run_job(plan, next(iter(plan.jobs)), tmp_path / "a.parquet", cache=root / "cache", device="cuda:99")


_PROGRAM = """
import sys, time
from pathlib import Path
from stagebench.plan import Plan
from stagebench.session import run_job
from stagebench.errors import StagebenchError
root, output = Path(sys.argv[1]), Path(sys.argv[2])
plan = Plan.read(root / "plan.json")
def tell(done, total):
    print("done", done, flush=True)
    if done == 2:
        time.sleep(60)
try:
    run_job(plan, next(iter(plan.jobs)), output, cache=root / "cache", device="cpu", threads=1, progress=tell)
except StagebenchError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    raise SystemExit(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(plan, root, tmp_path, number, caplog):
    """SIGTERM says where the work is; after SIGKILL nothing can, and both runs are gone on with."""
    output = tmp_path / "a.parquet"
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(root), str(output)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("done 2"):
            time.sleep(0.2)
            process.send_signal(number)
            break
    rest = process.stdout.read()
    code = process.wait(timeout=60)
    if number == signal.SIGTERM:
        assert code == 1 and "SIGTERM" in rest and "a.parquet.journal" in rest
    else:
        assert code == -signal.SIGKILL
    assert not output.exists()
    assert [p.name for p in Path(tmp_path).iterdir()] == ["a.parquet.journal"]
    with caplog.at_level(logging.INFO):
        report = timed(plan, root, output)
    assert report.resumed == 1 and "going on after 1 finished" in caplog.text
    assert len(pl.read_parquet(output)) == 14
