"""kill -9 at any moment: nothing half-written under a final name, nothing measured twice, nothing lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import yaml

from clip_study import extract
from reliability.conftest import Killable, small
from stagebench.extract import extract_shard
from stagebench.plan import build_plan
from stagebench.store import Shard

EXTRACT = """
from pathlib import Path
from stagebench.extract import extract_shard
from stagebench.plan import Plan
import av, stagebench.sources.video
plan, cache = Plan.read(Path(sys.argv[1])), Path(sys.argv[2])
shard = list(plan.shards)[0]
"""


def test_extraction_killed_at_20_random_moments(clips: Path, tmp_path: Path) -> None:
    """Each time: the shard is whole or not there, the other shard is untouched, and the rerun makes what is missing."""
    cache = tmp_path / "cache"
    plan = build_plan(small(clips, shards={"max_clips": 4}), cache)
    plan.write(tmp_path / "plan.json")
    first, *others = plan.shards
    assert others, "two shards are needed"
    for other in others:
        extract_shard(plan, other, other.path(cache), cache=cache)
    before = {other.path(cache): other.path(cache).stat() for other in others}
    program = Killable(EXTRACT, "extract_shard(plan, shard, shard.path(cache), cache=cache)", tmp_path / "plan.json", cache)
    path = first.path(cache)
    rng = random.Random(7)
    begun = time.perf_counter()
    assert program.run() == 0
    needed = time.perf_counter() - begun
    whole = path.read_bytes()
    killed = 0
    for _ in range(20):
        path.unlink(missing_ok=True)
        killed += program.run(rng.uniform(0.0, 0.9 * needed)) == signal.SIGKILL
        if path.exists():
            Shard.open(path).close()
            assert path.read_bytes() == whole
    assert killed >= 10
    path.unlink(missing_ok=True)
    assert program.run() == 0
    program.close()
    assert path.read_bytes() == whole
    assert {p: p.stat() for p in before} == before
    left = [p.name for p in path.parent.iterdir() if p.suffix != ".parquet"]
    assert not left, f"litter of killed writers: {left}"


TIMING = """
from pathlib import Path
import torch
torch.set_num_threads(1)
from stagebench.plan import Plan
from stagebench.session import run_job
import stagebench.models.hf, transformers
plan, cache, output = Plan.read(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
job = list(plan.jobs)[0]
def slow(done, total): time.sleep(0.05)
"""


def test_timing_killed_again_and_again(clips: Path, tmp_path: Path) -> None:
    """After each kill the next process measures the rest only; in the end each sample has its rows once, and they say `resumed`."""
    cache = tmp_path / "cache"
    plan = build_plan(small(clips), cache)
    plan.write(tmp_path / "plan.json")
    extract(plan, cache)
    output = tmp_path / "rows.parquet"
    journal = tmp_path / "rows.parquet.journal"
    body = "run_job(plan, job, output, cache=cache, device='cpu', threads=1, progress=slow)"
    program = Killable(TIMING, body, tmp_path / "plan.json", cache, output)

    def groups() -> int:
        return journal.read_bytes().count(b'{"group"') if journal.exists() else 0

    for wanted in (1, 4):
        assert program.run(until=lambda n=wanted: groups() >= n) == signal.SIGKILL
        assert not output.exists()
    kept = groups()
    assert program.run() == 0
    program.close()
    rows = pl.read_parquet(output)
    assert sorted(rows["sample"]) == sorted(next(iter(plan.jobs)).block.samples) and set(rows["status"]) == {"ok"}
    assert rows["codes"].list.contains("resumed").all()
    per_process = dict(rows.group_by("job").len().iter_rows())
    assert sum(per_process.values()) == 6 and len(rows.filter(pl.col("order") < 0)) == 0 and 4 <= kept <= 6
    assert not journal.exists() and not list(tmp_path.glob(".*.part"))


def test_the_lock_of_a_results_folder_dies_with_its_process(tmp_path: Path) -> None:
    program = Killable(
        "from pathlib import Path\nfrom stagebench._ownership import Ownership",
        "held = Ownership(Path(sys.argv[1]))\nPath(sys.argv[1], 'held').touch()\ntime.sleep(60)",
        tmp_path,
    )
    from stagebench._ownership import Ownership

    assert program.run(until=(tmp_path / "held").exists) == signal.SIGKILL
    program.close()
    Ownership(tmp_path).release()


def test_snakemake_killed_and_interrupted(clips: Path, tmp_path: Path, repo: Path) -> None:
    """kill -9: `--unlock`, as the README says, and the next run makes what is missing. Ctrl-C: the next run alone."""
    dataset = {"root": str(clips), "index": "index.json", "sensor": [48, 64], "max_samples": 4}
    config = small(clips, datasets={"d": dataset}, shards={"max_clips": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    plan = build_plan(config, tmp_path / "cache")
    targets = [f"cache/{shard.name}.parquet" for shard in plan.shards]
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(repo / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--resources", "gpu=1", "--configfile", str(tmp_path / "config.yaml"), "--nocolor", "--cores", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shards = [tmp_path / target for target in targets]

    def begin_and_end(number: int, done: int) -> None:
        process = subprocess.Popen(
            [*command, *targets], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while sum(path.exists() for path in shards) < done and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None
        os.killpg(process.pid, number)
        process.wait(timeout=60)
        for path in shards:
            if path.exists():
                Shard.open(path).close()

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=120)

    begin_and_end(signal.SIGKILL, 1)
    refused = call(*targets)
    assert refused.returncode != 0 and "--unlock" in refused.stdout + refused.stderr
    assert call("--unlock").returncode == 0
    begin_and_end(signal.SIGINT, 3)  # Snakemake has noted all but the last of them as finished, or the one that it had to make again
    times = {path: path.stat().st_mtime_ns for path in shards if path.exists()}
    done = call(*targets)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.exists() for path in shards)
    assert any(path.stat().st_mtime_ns == when for path, when in times.items()), "finished shards were made again"
