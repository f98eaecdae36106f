"""What planning costs at scale: CPU and memory of `snakemake -n` with nothing to do, and of the plan of a million clips.

    .venv/bin/python benchmarks/plan_scale.py --jobs 10000            # a finished study of about that many jobs, then a dry run
    .venv/bin/python benchmarks/plan_scale.py --jobs 50000
    .venv/bin/python benchmarks/plan_scale.py --clips 1000000         # plan only: jobs, CPU, memory, size of plan.json
    .venv/bin/python benchmarks/plan_scale.py --clips 1000000 --files # the same with two (tiny) files a clip on disk: 2 M inodes

A study of three models (two on video, one on events). The clips of --jobs have files, their outputs are empty files made in the order
of the workflow; --records adds what Snakemake notes of finished jobs, which its checks of params and inputs read. CPU is user + system of
the command and its children; time on a shared machine says little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stagebench.plan import trie

REPO = Path(__file__).resolve().parents[1]
SETTINGS = {"clips": {"max_clips": 512, "max_samples": 1024}, "jobs": {"max_clips": 64, "max_samples": 256}}
"""For a million clips, as docs/scale.md has it; and the defaults."""


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    text: str


def measured(command: list[str], folder: Path) -> Cost:
    """Run it in the folder. cpu_s and peak_mib are those of this process and of what it waited for."""
    begin = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, text=True, env=env)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        output.seek(0)
        text = output.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(text[-3000:])
    return Cost(used.ru_utime + used.ru_stime, wall, used.ru_maxrss / 1024, text)


def clip_name(n: int) -> str:
    """Key of clip n: sequences of a thousand."""
    return f"seq_{n // 1000:05d}/{n % 1000:06d}"


def write_study(folder: Path, clips: int, *, files: bool, max_clips: int, max_samples: int) -> None:
    """An index of so many clips in sequences of a thousand, and the study's config."""
    root = folder / "data"
    entries = []
    for n in range(clips):
        name = clip_name(n)
        if files:
            for kind, suffix in (("mp4", "mp4"), ("event_npy", "npy")):
                path = root / kind / f"{name}.{suffix}"
                if n % 1000 == 0:
                    path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(n.to_bytes(4, "little"))
        question = [{"from": "human", "value": "<event>\nWhat are the key elements in this scene?"}]
        entries.append({"id": str(n), "event_data": f"{name}.npy", "mp4_data": f"{name}.mp4", "conversations": question})
    root.mkdir(parents=True, exist_ok=True)
    (root / "EventGPT_Instruction_Subset.json").write_text(json.dumps(entries))
    (folder / "config.yaml").write_text(yaml.safe_dump(config(max_clips, max_samples)))


def config(max_clips: int, max_samples: int) -> dict[str, Any]:
    """The demo's three models over one dataset."""
    return {
        "study": "scale",
        "datasets": {"d": {"root": "data", "sensor": [480, 640]}},
        "shards": {"max_clips": max_clips},
        "models": {
            "eventgpt": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"},
            "video_llava": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
            "llava": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
        },
        "timing": {"max_samples": max_samples},
    }


PLAN = """
import resource, sys, time, yaml
from pathlib import Path
from stagebench.config import load_config
from stagebench.plan import Plan, build_plan
def cpu():
    r = resource.getrusage(resource.RUSAGE_SELF); return r.ru_utime + r.ru_stime
config = load_config(yaml.safe_load(open("config.yaml")))
a = cpu(); plan = build_plan(config, Path("cache")); b = cpu()
plan.write(Path("results/scale/plan.json")); c = cpu()
print(f"build {b-a:.1f} s CPU, write {c-b:.1f} s CPU, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024:.0f} MiB")
shards, jobs = len(plan.shards), len(plan.jobs)
print(f"{shards} shards, {jobs} timing jobs, {len(plan.verify_paths)} proofs: {shards + jobs + len(plan.verify_paths) + 2} jobs")
"""

OPEN = """
import resource
from pathlib import Path
from stagebench.plan import Plan
plan = Plan.read(Path("results/scale/plan.json")); job = plan.jobs[0]
keys = list(job.block.samples); plan.sample(job.dataset, keys[0])
r = resource.getrusage(resource.RUSAGE_SELF)
# not ru_maxrss: that counts what the parent held when it started this process
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"a job opens its plan: {r.ru_utime + r.ru_stime:.1f} s CPU with imports, {peak/1024:.0f} MiB")
"""

FINISH = """
import sys
from pathlib import Path
from stagebench.plan import Plan
plan = Plan.read(Path("results/scale/plan.json"))
paths = [f"cache/{shard.name}.parquet" for shard in plan.shards]
paths += [f"results/scale/{path}" for path in (*plan.verify_paths, *(job.path for job in plan.jobs))]
for path in map(Path, paths):
    path.parent.mkdir(parents=True, exist_ok=True); path.touch()
"""

RECORDS = """
import sys
from snakemake.cli import main
from snakemake.scheduling.job_scheduler import JobScheduler

async def note(workflow):
    for job in workflow.dag.jobs:
        await workflow.persistence.finished(job)

def schedule(self):
    self.workflow.async_run(note(self.workflow))
    return True

JobScheduler.schedule = schedule
main(sys.argv[1:])
"""


def snakemake(*options: str) -> list[str]:
    base = [sys.executable, "-m", "snakemake", "--snakefile", str(REPO / "Snakefile"), "--configfile", "config.yaml", "--nocolor"]
    return [*base, "--cores", "2", "--resources", "gpu=1", *options]


def dry_run(folder: Path, *, records: bool) -> None:
    """Finish the study without doing its work, then ask what there is to do."""
    python = [sys.executable, "-c"]
    print(measured([*python, PLAN], folder).text.strip())
    measured([*python, FINISH], folder)
    results = folder / "results/scale"
    time.sleep(0.01)
    for name in _merged():
        path = results / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    time.sleep(0.01)
    (results / "report.html").touch()
    if records:
        _records(folder)
    time.sleep(2.5)  # files younger than two seconds are hashed again, and are no evidence for a plan
    for way in ("planned from nothing", "plan taken over", "planned from nothing", "plan taken over"):
        if way == "planned from nothing":
            (results / "plan.stamps").unlink(missing_ok=True)
        cost = measured(snakemake("--dry-run"), folder)
        nothing = "Nothing to be done" in cost.text
        print(f"snakemake -n, {way}: {cost.cpu_s:.1f} s CPU, {cost.wall_s:.1f} s, {cost.peak_mib:.0f} MiB, nothing to do: {nothing}")
        if not nothing:
            print(cost.text[-2000:])


def _merged() -> list[str]:
    tables = [
        f"tables/{t}.{s}"
        for t in ("stages", "comparison", "axis", "load", "optimisations", "failures")
        for s in ("csv", "md", "tex", "parquet")
    ]
    return ["timings.parquet", "summary.json", "legacy_results.json", *tables]


def _records(folder: Path) -> None:
    """The records of finished jobs, written by Snakemake itself for every job of its graph; `--touch`, which is meant for this, sleeps
    0.1 s a job and counts all jobs again for each."""
    cost = measured([sys.executable, "-c", RECORDS, *snakemake("--touch", "--forceall", "--quiet")[3:]], folder)
    found = [path for path in (folder / ".snakemake/metadata").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in found)
    print(f"{len(found)} records of finished jobs, {size / 2**20:.0f} MiB ({cost.cpu_s:.0f} s CPU to make)")


def clips_for(jobs: int) -> int:
    """A number of clips whose study has that many jobs within 2 %: two shards a leaf, three timing jobs a block, three proofs, merge and
    report. How full leaves are depends on where the number lies between two powers of two, so it is counted."""
    sizes = SETTINGS["jobs"]
    clips, found = jobs * 15, 0
    for _ in range(12):
        places = trie.sort_keys(clip_name(n) for n in range(clips))
        leaves, blocks = (len(trie.cut(places, [1] * clips, sizes[name])) for name in ("max_clips", "max_samples"))
        found = 2 * leaves + 3 * blocks + 5
        if jobs <= found <= 1.02 * jobs:
            break
        clips = round(clips * 1.01 * jobs / found)
    return clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, help="a finished study of about so many jobs, and a dry run of it")
    parser.add_argument("--clips", type=int, help="the plan of so many clips")
    parser.add_argument("--files", action="store_true", help="with --clips: write the clips' files too")
    parser.add_argument("--records", action="store_true", help="with --jobs: have Snakemake's records of finished jobs too (slow to make)")
    parser.add_argument("--folder", type=Path, help="where; removed again (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="plan_scale-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if options.jobs:
            write_study(folder, clips_for(options.jobs), files=True, **SETTINGS["jobs"])
            dry_run(folder, records=options.records)
        else:
            write_study(folder, options.clips or 1_000_000, files=options.files, **SETTINGS["clips"])
            for round_ in ("first", "second") if options.files else ("only",):
                print(f"{round_}: {measured([sys.executable, '-c', PLAN], folder).text.strip()}")
            print(measured([sys.executable, "-c", OPEN], folder).text.strip())
            size = sum(path.stat().st_size for path in (folder / "results/scale").glob("plan*"))
            print(f"plan.json {(folder / 'results/scale/plan.json').stat().st_size / 2**20:.1f} MiB, with leaves {size / 2**20:.0f} MiB")
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
