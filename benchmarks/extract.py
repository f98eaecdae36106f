"""MP4 -> shard through `extract_shard`, as a job does it: throughput with 1 and with 2 threads, memory, and where the CPU time goes.

    .venv/bin/python benchmarks/extract.py                 # about 3 minutes; clips are made first
    .venv/bin/python benchmarks/extract.py --quick         # 640x480 of 1 s only

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
from pathlib import Path

from common import machine, table
from stagebench._malloc import keep_freed
from stagebench.config import load_config
from stagebench.extract import extract_shard
from stagebench.plan import build_plan
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


def measure(folder: Path, width: int, height: int, seconds: int, clips: int, rounds: int) -> list[object]:
    source = make_clip(folder / f"{width}x{height}_{seconds}.mp4", width, height, seconds)
    root = folder / f"data_{width}_{seconds}"
    dataset(root, source, clips)
    model = {"adapter": "hf", "architecture": "video_llava", "input": "frames", "weights": "dummy:0", "preset": "tiny"}
    config = load_config({"study": "extract", "datasets": {"d": {"root": str(root)}}, "models": {"v": model}})
    plan = build_plan(config, folder / "cache")
    wall: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    alone: list[float] = []
    size = 0
    for number in range(rounds):
        for threads in (1, 2) if number % 2 else (2, 1):
            scratch = folder / f"scratch_{threads}"
            begin, began = time.perf_counter(), time.process_time()
            size = sum(extract_shard(plan, s, s.path(scratch), cache=scratch, threads=threads).bytes for s in plan.shards)
            wall[threads].append((time.perf_counter() - begin) / clips)
            cpu[threads].append((time.process_time() - began) / clips)
            shutil.rmtree(scratch)
        began = time.process_time()
        for path in sorted(root.glob("mp4/*/*.mp4")):
            read_frames(path, 8)
        alone.append((time.process_time() - began) / clips)
    shutil.rmtree(root)
    speedup = statistics.median(a / b for a, b in zip(wall[1], wall[2], strict=True))
    middle = {
        name: statistics.median(values) * 1e3
        for name, values in {"w1": wall[1], "w2": wall[2], "c1": cpu[1], "c2": cpu[2], "a": alone}.items()
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cells = [f"{width}x{height} {seconds} s", clips, *(f"{middle[key]:.1f}" for key in ("w1", "w2"))]
    return [*cells, f"{speedup:.2f}", *(f"{middle[key]:.1f}" for key in ("c1", "c2", "a")), f"{size / clips / 1e6:.1f}", f"{peak:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=16, help="clips of a shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where clips and shards are written; default: the temporary folder")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    keep_freed()  # as scripts/extract.py does
    print(machine("av", "pyarrow"), f"; {len(os.sched_getaffinity(0))} cores usable")
    classes = [(640, 480, 1)] if arguments.quick else [(640, 480, 1), (640, 480, 5), (1440, 1080, 1)]
    rounds = 3 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = [measure(Path(folder), *size, arguments.clips, rounds) for size in classes]
    columns = "clip | clips | 1 thread ms/clip | 2 threads ms/clip | speed-up | CPU ms/clip, 1 | CPU ms/clip, 2 | reading alone CPU ms/clip"
    table(columns + " | MB/clip | peak memory MB", rows)


if __name__ == "__main__":
    main()
