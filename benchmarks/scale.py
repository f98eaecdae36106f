"""How planning, extraction, disk, memory and reads grow with the number of clips: 100, 1,000, 10,000.

    .venv/bin/python benchmarks/scale.py                       # about 4 minutes, 2 GB of disk in --folder
    .venv/bin/python benchmarks/scale.py --clips 100 1000      # --quick does this

Clips are tiny (64x48, 20 frames, H.264; 2,000 events) and differ in content, so that what is measured is the cost per clip of planning
and bookkeeping. Each size runs in a process of its own, whose peak memory is its own. Times are CPU seconds, all threads together, except
where wall is said.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import machine, table
from stagebench.config import load_config
from stagebench.extract import extract_shard
from stagebench.plan import build_plan
from stagebench.store import Shard

HEIGHT, WIDTH, FRAMES, EVENTS = 48, 64, 20, 2000


def write_dataset(root: Path, clips: int) -> None:
    """An index, and for every clip an MP4 (one encoded once, with a `free` box of its own) and an npy (with other coordinates)."""
    video = _video(root)
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, 1_000_000, EVENTS)) + 51_800_000_000
    p = rng.integers(0, 2, EVENTS).astype(np.uint8)
    y = rng.integers(0, HEIGHT, EVENTS).astype(np.uint16)
    entries = []
    for number in range(clips):
        name = f"seq_{number // 500:03d}/{number:06d}"
        for folder, suffix in (("mp4", "mp4"), ("event_npy", "npy")):
            path = root / folder / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == "mp4":
                path.write_bytes(video + (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big"))
            else:
                x = ((np.arange(EVENTS) * 7 + number) % WIDTH).astype(np.uint16)
                np.save(path, np.array({"p": p, "t": t + number, "x": x, "y": y}, dtype=object), allow_pickle=True)
        turn = {"from": "human", "value": "<event>\nWhat is there?"}
        entries.append({"id": str(number), "event_data": f"{name}.npy", "mp4_data": f"{name}.mp4", "conversations": [turn]})
    (root / "EventGPT_Instruction_Subset.json").write_text(json.dumps(entries))


def _video(root: Path) -> bytes:
    import av

    root.mkdir(parents=True, exist_ok=True)
    path = root / "one.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        grid = np.indices((HEIGHT, WIDTH)).sum(0)
        for i in range(FRAMES):
            frame = np.repeat(((grid * 5 + i * 9) % 256).astype(np.uint8)[..., None], 3, 2)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    path.unlink()
    return data


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(clips: int, folder: Path, threads: int) -> dict[str, Any]:
    root, cache = folder / "data", folder / "cache"
    write_dataset(root, clips)
    time.sleep(2.5)  # files younger than that are hashed again by the next plan: their clock may not show a change
    models = {"v": {"adapter": "hf", "architecture": "video_llava", "input": "frames"}, "e": {"adapter": "eventgpt", "input": "events"}}
    config = load_config(
        {
            "study": "scale",
            "datasets": {"d": {"root": str(root), "sensor": [HEIGHT, WIDTH]}},
            "models": {name: {**model, "weights": "dummy:0", "preset": "tiny"} for name, model in models.items()},
        }
    )
    found: dict[str, Any] = {"clips": clips, "base_mb": peak_mb()}
    for name in ("plan_first", "plan_again"):
        wall, cpu = time.perf_counter(), time.process_time()
        plan = build_plan(config, cache)
        plan.write(folder / "results" / "plan.json")
        found[name], found[f"{name}_wall"] = time.process_time() - cpu, time.perf_counter() - wall
    found["plan_mb"] = peak_mb()
    found["plan_json"] = sum(path.stat().st_size for path in (folder / "results").rglob("*") if path.is_file())
    found["index_bytes"] = (cache / "digests.parquet").stat().st_size
    shards = list(plan.shards)
    found["leaves"] = len([s for s in shards if s.kind == "frames"])
    for kind in ("frames", "events"):
        wall, cpu = time.perf_counter(), time.process_time()
        own = [s for s in shards if s.kind == kind]
        failed = sum(len(extract_shard(plan, s, s.path(cache), cache=cache, threads=threads).failed) for s in own)
        if failed:
            raise SystemExit(f"{failed} {kind} clips failed")
        found[f"{kind}_cpu"], found[f"{kind}_wall"] = time.process_time() - cpu, time.perf_counter() - wall
        found[f"{kind}_bytes"] = sum(s.path(cache).stat().st_size for s in own)
    found["extract_mb"] = peak_mb()
    opened, reads = [], []
    rng = random.Random(0)
    for kind in ("frames", "events"):
        for planned in rng.sample([s for s in shards if s.kind == kind], k=min(20, found["leaves"])):
            begin = time.process_time()
            with Shard.open(planned.path(cache), verify=True) as shard:
                opened.append((time.process_time() - begin) / len(shard.clips))
                if kind == "frames":
                    for clip in rng.sample(shard.clips, k=min(20, len(shard.clips))):
                        begin = time.process_time()
                        shard.frames(clip)
                        reads.append(time.process_time() - begin)
    return found | {"open_ms": statistics.median(opened) * 1e3, "read_ms": statistics.median(reads) * 1e3}


def show(results: list[dict[str, Any]]) -> None:
    rows = [
        (
            f"{r['clips']:,}",
            r["leaves"],
            f"{r['plan_first']:.2f} ({r['plan_first'] / r['clips'] * 1e6:.0f} µs/clip)",
            f"{r['plan_again']:.2f} ({r['plan_again'] / r['clips'] * 1e6:.0f} µs/clip)",
            f"{r['plan_mb'] - r['base_mb']:.0f}",
            f"{r['plan_json'] / r['clips']:.0f}",
            f"{r['index_bytes'] / r['clips']:.0f}",
        )
        for r in results
    ]
    table("clips | leaves | first plan CPU s | plan again CPU s | memory above start MB | plan bytes/clip | digest index bytes/clip", rows)
    raw = 8 * HEIGHT * WIDTH * 3
    rows = [
        (
            f"{r['clips']:,}",
            f"{r['clips'] / r['frames_cpu']:.0f} ({r['clips'] / r['frames_wall']:.0f})",
            f"{r['clips'] / r['events_cpu']:.0f} ({r['clips'] / r['events_wall']:.0f})",
            f"{r['frames_bytes'] / r['clips']:,.0f} ({r['frames_bytes'] / r['clips'] - raw:,.0f} above the pixels)",
            f"{r['events_bytes'] / r['clips']:,.0f}",
            f"{r['extract_mb']:.0f}",
            f"{r['open_ms']:.2f}",
            f"{r['read_ms']:.3f}",
        )
        for r in results
    ]
    columns = "clips | frames: clips per CPU s (wall s) | events: clips per CPU s (wall s) | frames bytes/clip | events bytes/clip"
    table(columns + " | peak memory MB | open and verify ms/clip | read ms/clip", rows)
    if len(results) > 1:
        million(results[-2], results[-1])


def million(before: dict[str, Any], last: dict[str, Any]) -> None:
    """The line through the two largest sizes, at a million clips: what does not grow with the number is not multiplied."""

    def at(key: str, offset: str | None = None) -> float:
        low, high = (r[key] - (r[offset] if offset else 0) for r in (before, last))
        return high + (high - low) / (last["clips"] - before["clips"]) * (1_000_000 - last["clips"])

    pixels = 8 * HEIGHT * WIDTH * 3 * 1_000_000
    print(
        f"\nA million of these clips, by the line through {before['clips']:,} and {last['clips']:,}: {at('leaves'):,.0f} leaves; first "
        f"plan {at('plan_first') / 60:.1f} CPU minutes, again {at('plan_again'):.0f} s; memory of planning "
        f"{at('plan_mb', 'base_mb') / 1024:.1f} GB; plan {at('plan_json') / 1e6:.0f} MB, digest index {at('index_bytes') / 1e6:.0f} MB; "
        f"frame shards {at('frames_bytes') / 1e9:.1f} GB, of which {(at('frames_bytes') - pixels) / 1e9:.1f} GB are not pixels; extraction "
        f"{at('frames_cpu') / 3600:.2f} + {at('events_cpu') / 3600:.2f} CPU hours. Real clips decode longer: benchmarks/extract.py."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="where datasets and shards are written; default: the temporary folder")
    parser.add_argument("--quick", action="store_true", help="100 and 1,000 clips")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(json.dumps(measure(arguments.one, Path(folder), arguments.threads)))
        return
    print(machine("pyarrow", "av", "numpy"))
    results = []
    for clips in arguments.clips[:2] if arguments.quick else arguments.clips:
        command = [sys.executable, __file__, "--one", str(clips), "--threads", str(arguments.threads)]
        command += ["--folder", arguments.folder] if arguments.folder else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    show(results)


if __name__ == "__main__":
    main()
