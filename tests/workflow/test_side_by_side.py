"""Four GPUs in one machine, timing.exclusive: false. The GPUs are made up; their locks, the jobs and Snakemake's scheduling are real."""

import json
import os
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq

from stagebench.session.output import read_metadata

from .conftest import MODELS, Run, Study

GPUS = 4
FAKES = """
# Imported by each Python of the run: a timing job is offered four GPUs, locks one as it would a real one, and works on the CPU.
import json, os, time
from pathlib import Path
import stagebench.machine as machine
from stagebench.machine.devices import lock_one

FOLDER = Path(os.environ["FAKE_GPUS"])

def pick_device(requested=None, *, folder=None, wait_s=600.0):
    lease = lock_one({f"cuda:{n}": f"GPU-{n}" for n in range(4)}, FOLDER, wait_s)
    os.environ["CUDA_VISIBLE_DEVICES"] = lease.device.removeprefix("cuda:")
    (FOLDER / f"held-{lease.device}").touch()
    # the first four wait for one another: they can all be there at one time, or not
    begun = time.monotonic()
    while len(list(FOLDER.glob("held-*"))) < 4 and time.monotonic() - begun < 240:
        time.sleep(0.05)
    with (FOLDER / "log").open("a") as log:
        log.write(json.dumps([lease.device, os.getpid(), time.monotonic() - begun]) + "\\n")
    lease.device = "cpu"
    return lease

machine.pick_device = pick_device
"""


def test_four_jobs_at_a_time_each_on_a_gpu_of_its_own(finished: tuple[Study, Run], tmp_path: Path) -> None:
    study = finished[0].copy(tmp_path / "study")
    study.configure(
        lambda c: (
            c["timing"].update(exclusive=False, max_samples=2),
            c.update(models={name: MODELS[name] for name in ("eventgpt", "video_llava")}),
        )
    )
    fakes, path = tmp_path / "fakes", os.environ.get("PYTHONPATH", "")
    fakes.mkdir()
    (fakes / "sitecustomize.py").write_text(FAKES)
    run = study.run(
        *("--cores", str(GPUS), "--resources", f"gpu={GPUS}", "--retries", "1"),
        FAKE_GPUS=str(fakes),
        PYTHONPATH=f"{fakes}:{path}" if path else str(fakes),
    )
    taken = [json.loads(line) for line in (fakes / "log").read_text().splitlines()]
    jobs = [read_metadata(path)["job"] for path in (study.results / "timings").rglob("*.parquet") if _side_by_side(path)]
    assert run.rules["timing"] == len(taken) == len(jobs) > GPUS
    assert {device for device, *_ in taken} == {f"cuda:{n}" for n in range(GPUS)}
    assert max(waited for *_, waited in taken) < 240, "four jobs were never there at one time"

    spans: dict[str, list[tuple[datetime, datetime]]] = {}
    for job in jobs:
        assert job["threads"] == 1, "a fair part of the cores"
        span = (datetime.fromisoformat(job["started"]), datetime.fromisoformat(job["finished"]))
        spans.setdefault(job["host"]["cuda_visible_devices"], []).append(span)
    assert set(spans) == {str(n) for n in range(GPUS)}
    for mine in spans.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(mine))), "two jobs on one GPU at a time"
    summary = json.loads((study.results / "summary.json").read_text())
    assert "warn_side_by_side" in {warning["code"] for warning in summary["warnings"]}
    for name in ("stages", "comparison"):
        assert "side by side (timing.exclusive: false" in (study.results / f"tables/{name}.md").read_text()


def _side_by_side(path: Path) -> bool:
    """Whether it is one of this study's files: those of the study that was copied had the machine to themselves."""
    found = pq.ParquetFile(path).read(columns=["codes"]).to_pylist()
    return all("warn_side_by_side" in row["codes"] for row in found)
