"""MP4 -> shard through `extract_shard`, as a job does it: throughput with 1 and with 2 threads, memory, and where the CPU time goes.

    .venv/bin/python benchmarks/extract.py                 # about 3 minutes; clips are made first
    .venv/bin/python benchmarks/extract.py --quick         # 640x480 of 1 s only
    .venv/bin/python benchmarks/extract.py --clips 32 64 128   # 12 GB; a shard's fixed part apart from what each further clip takes

Threads are interleaved in one run; wall times, for it is them that a second core changes, and CPU time beside. On a busy machine the wall
times are the machine's. `reading alone` is the same clips by read_frames without a shard: the difference is digests, checksums, writing.
Decoders are compared in benchmarks/video.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import machine, table
from stagebench._malloc import keep_freed
from stagebench.config import load_config
from stagebench.extract import extract_shard
from stagebench.plan import Plan, build_plan
from stagebench.sources.video import read_frames
from video import make_clip


def dataset(root: Path, source: Path, clips: int) -> None:
    """The clip under many names, each with a `free` box of its own so that no two have one content."""
    data = source.read_bytes()
    entries = []
    (root / "mp4/seq").mkdir(parents=True)
    for number in range(clips):
        (root / f"mp4/seq/{number:06d}.mp4").write_bytes(data + (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big"))
        entries.append(
            {"id": str(number), "mp4_data": f"seq/{number:06d}.mp4", "conversations": [{"from": "human", "value": "What is there?"}]}
        )
    (root / "EventGPT_Instruction_Subset.json").write_text(json.dumps(entries))


@dataclass
class Times:
    """Seconds of whole shards by number of threads, a value a round."""

    wall: dict[int, list[float]] = field(default_factory=lambda: {1: [], 2: []})
    cpu: dict[int, list[float]] = field(default_factory=lambda: {1: [], 2: []})
    end: dict[int, list[float]] = field(default_factory=lambda: {1: [], 2: []})
    """From when the last clip has been handed to the writer until the file is there: the last writes, footer, flush, renaming."""
    alone: list[float] = field(default_factory=list)
    """CPU time of read_frames of all clips."""
    size: int = 0


def planned(folder: Path, root: Path, clips: int) -> Plan:
    model = {"adapter": "hf", "architecture": "video_llava", "input": "frames", "weights": "dummy:0", "preset": "tiny"}
    study = {"study": "extract", "datasets": {"d": {"root": str(root)}}, "models": {"v": model}, "shards": {"max_clips": clips}}
    return build_plan(load_config(study), folder / "cache")


def write(plan: Plan, scratch: Path, threads: int, times: Times) -> None:
    (shard,) = plan.shards
    handed: list[float] = []
    begin, began = time.perf_counter(), time.process_time()
    report = extract_shard(
        plan, shard, shard.path(scratch), cache=scratch, threads=threads, progress=lambda *_: handed.append(time.perf_counter())
    )
    end = time.perf_counter()
    times.wall[threads].append(end - begin)
    times.cpu[threads].append(time.process_time() - began)
    times.end[threads].append(end - handed[-1])
    times.size = report.bytes
    shutil.rmtree(scratch)


def measure(folder: Path, width: int, height: int, seconds: int, counts: Sequence[int], rounds: int) -> dict[int, Times]:
    """By number of clips. Numbers and threads are interleaved."""
    source = make_clip(folder / f"{width}x{height}_{seconds}.mp4", width, height, seconds)
    plans, found = {}, {clips: Times() for clips in counts}
    for clips in counts:
        dataset(folder / f"data_{clips}", source, clips)
        plans[clips] = planned(folder, folder / f"data_{clips}", clips)
    for number in range(rounds):
        for clips, plan in plans.items():
            for threads in (1, 2) if number % 2 else (2, 1):
                write(plan, folder / "scratch", threads, found[clips])
            began = time.process_time()
            for path in sorted((folder / f"data_{clips}").glob("mp4/*/*.mp4")):
                read_frames(path, 8)
            found[clips].alone.append(time.process_time() - began)
    for clips in counts:
        shutil.rmtree(folder / f"data_{clips}")
    return found


def rows(name: str, found: Mapping[int, Times]) -> list[list[object]]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cells: list[list[object]] = []
    for clips, times in found.items():
        speedup = statistics.median(a / b for a, b in zip(times.wall[1], times.wall[2], strict=True))
        each = [f"{statistics.median(values) / clips * 1e3:.1f}" for values in (times.cpu[1], times.cpu[2], times.alone)]
        ends = [f"{statistics.median(times.end[threads]) * 1e3:.1f}" for threads in (1, 2)]
        walls = [f"{statistics.median(times.wall[threads]) / clips * 1e3:.1f}" for threads in (1, 2)]
        cells.append([name, clips, *walls, f"{speedup:.2f}", *each, *ends, f"{times.size / clips / 1e6:.1f}", f"{peak:.0f}"])
    return cells


def split(name: str, found: Mapping[int, Times]) -> list[object]:
    """A shard's time as a part that it always has and a part a clip: the straight line (least squares) through the medians by clips."""
    counts = sorted(found)
    lines = [statistics.linear_regression(counts, [statistics.median(found[n].wall[threads]) * 1e3 for n in counts]) for threads in (1, 2)]
    fixed, further = [f"{line.intercept:.1f}" for line in lines], [f"{line.slope:.2f}" for line in lines]
    return [name, f"{counts[0]} to {counts[-1]}", *fixed, *further, f"{lines[0].slope / lines[1].slope:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[16], help="clips of a shard; of several numbers, the fixed part, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where clips and shards are written; default: the temporary folder")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    keep_freed()  # as scripts/extract.py does
    print(machine("av", "pyarrow"), f"; {len(os.sched_getaffinity(0))} cores usable")
    classes = [(640, 480, 1)] if arguments.quick else [(640, 480, 1), (640, 480, 5), (1440, 1080, 1)]
    rounds = 3 if arguments.quick else arguments.rounds
    counts = sorted(set(arguments.clips))
    measured: list[list[object]] = []
    lines: list[list[object]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for width, height, seconds in classes:
            name = f"{width}x{height} {seconds} s"
            found = measure(Path(folder), width, height, seconds, counts, rounds)
            measured += rows(name, found)
            if len(counts) > 1:
                lines.append(split(name, found))
    columns = "clip | clips | 1 thread ms/clip | 2 threads ms/clip | speed-up | CPU ms/clip, 1 | CPU ms/clip, 2 | reading alone CPU ms/clip"
    table(columns + " | end of a shard ms, 1 | end of a shard ms, 2 | MB/clip | peak memory MB", measured)
    if lines:
        table(
            "clip | clips | fixed ms a shard, 1 | fixed ms a shard, 2 | ms a further clip, 1 | ms a further clip, 2 | speed-up of these",
            lines,
        )


if __name__ == "__main__":
    main()
