"""Reading a clip from a shard against a plain copy of the same bytes, and against other ways to read them.

    .venv/bin/python benchmarks/store_read.py                       # about 5 minutes, 2 GB of disk in --folder
    .venv/bin/python benchmarks/store_read.py --frames 8 --codecs none --rounds 60

Clips of N frames of 1440x1080 RGB (or, --resize, stored at the model's size), read in random order from a warm page cache into memory
that is there already; all ways interleaved in one run, medians and ratios of medians. `shard`: from the mapping, as a job reads a
verified shard; `preadv`: by system calls, as one that is not mapped; `view`: no copy. Cold reads are by system calls. Pictures: frames
of the real MP4s under STAGEBENCH_REAL_DATA, scaled, or smooth noise without it.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stagebench.store import ClipRow, HostBuffer, Shard, ShardWriter

HEIGHT, WIDTH = 1080, 1440


def pictures(count: int) -> np.ndarray:
    """uint8 [count, 1080, 1440, 3] that compress about as dash-cam frames do."""
    root = Path(os.environ.get("STAGEBENCH_REAL_DATA", "../shared/data")) / "real/mp4"
    found = sorted(root.glob("*/*.mp4"))
    if found:
        from stagebench.sources.video import read_frames

        each = -(-count // len(found))
        frames = [frame for path in found for frame in read_frames(path, each).pixels][:count]
    else:
        rng = np.random.default_rng(0)
        frames = [rng.integers(0, 256, (27, 36, 3), dtype=np.uint8) for _ in range(count)]
    return np.stack([np.asarray(Image.fromarray(f).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) for f in frames])


def interleaved(ways: dict[str, Callable[[str], object]], order: Sequence[str]) -> dict[str, float]:
    """Median ms of each way over the clips in that order; every way reads a clip before the next clip comes."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number, clip in enumerate(order):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.perf_counter_ns()
            ways[name](clip)
            times[name].append((time.perf_counter_ns() - begin) * 1e-6)
    return {name: statistics.median(values[len(names) :]) for name, values in times.items()}


def drop(path: Path) -> None:
    """Put the file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def cold_ms(path: Path, shard: Shard, clips: Sequence[str], out: np.ndarray) -> float:
    """shard: not verified and so not mapped: pages that are mapped stay in memory."""
    times = []
    for clip in clips:
        drop(path)
        begin = time.perf_counter_ns()
        shard.frames(clip, out=out)
        times.append((time.perf_counter_ns() - begin) * 1e-6)
    return statistics.median(times)


def resized(pool: np.ndarray, edge: int) -> np.ndarray:
    """As `cache.resize` stores it: shortest edge, bicubic."""
    size = (round(WIDTH * edge / HEIGHT), edge)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in pool])


def measure(folder: Path, codec: str, count: int, clips: int, rounds: int, pool: np.ndarray, edge: int | None) -> str:
    pool = pool if edge is None else resized(pool, edge)
    path = folder / f"{codec}-{count}.parquet"
    arrays = {f"clip/{i}": np.ascontiguousarray(np.roll(pool, i * 7, axis=2)[np.arange(i, i + count) % len(pool)]) for i in range(clips)}
    begin = time.perf_counter()
    with ShardWriter(path, "frames", {"benchmark": count}, codec=codec) as writer:
        for clip, array in arrays.items():
            writer.add(ClipRow.from_frames(clip, "d", array, pts=range(count), indices=range(count)))
    write_s = time.perf_counter() - begin
    nbytes = count * pool[0].nbytes
    out, copy = HostBuffer(nbytes).take(nbytes), HostBuffer(nbytes).take(nbytes)
    rng = random.Random(0)
    order = [rng.choice(list(arrays)) for _ in range(rounds)]
    index = {clip: row for row, clip in enumerate(arrays)}
    with Shard.open(path, verify=False) as unmapped:
        cold = cold_ms(path, unmapped, order[:5], out)
    with Shard.open(path) as shard, Shard.open(path, verify=False) as unmapped, pq.ParquetFile(path) as plain:
        for clip, array in arrays.items():
            if not np.array_equal(np.stack(shard.frames(clip, out=out)), array):
                raise SystemExit(f"{codec} {count}: {clip} was not read back as it was written")

        def by_pyarrow(clip: str) -> np.ndarray:
            column = plain.read_row_group(index[clip], columns=["pixels"], use_threads=False).column(0).chunk(0)
            return np.frombuffer(column.buffers()[-1], np.uint8)

        ways: dict[str, Callable[[str], object]] = {
            "memcpy": lambda clip: np.copyto(copy, arrays[clip].reshape(-1)),
            "shard": lambda clip: shard.frames(clip, out=None if shard.decompresses(clip) else out),
            "preadv": lambda clip: unmapped.frames(clip, out=out),
            "pyarrow": by_pyarrow,
        }
        if shard.view(order[0]) is not None:
            ways["view"] = shard.view
        got = interleaved(ways, order)
        ordered = interleaved({name: ways[name] for name in ("memcpy", "shard")}, [*arrays] * max(1, rounds // len(arrays)))
        shard.verify(threads=1)
        begin = time.perf_counter()
        shard.verify(threads=1)
        verify_s = time.perf_counter() - begin
    size = path.stat().st_size
    path.unlink()
    total = nbytes * clips
    view = f"{got['view'] * 1e3:.0f}" if "view" in got else "-"
    about = f"| {codec} | {edge or '-'} | {count} | {nbytes / 1e6:.1f} | "
    return about + (
        f"{got['memcpy']:.2f} | {got['shard']:.2f} | {got['shard'] / got['memcpy']:.2f} | "
        f"{ordered['shard'] / ordered['memcpy']:.2f} | {got['preadv'] / got['memcpy']:.2f} | {got['pyarrow'] / got['memcpy']:.2f} | "
        f"{view} | {cold:.1f} | {size / total:.3f} | "
        f"{total / write_s / 1e6:.0f} | {verify_s / clips * 1e3:.1f} ({size / verify_s / 1e9:.2f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--codecs", nargs="+", default=["none", "lz4", "zstd"])
    parser.add_argument(
        "--resize", type=int, nargs="+", default=[336], help="shortest edges stored, besides the clip's own; measured at 8 frames"
    )
    parser.add_argument("--quick", action="store_true", help="8 frames, codec none, few rounds")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--folder", help="where the shards are written; default: the temporary folder")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.frames, arguments.codecs, arguments.rounds, arguments.clips = [8], ["none"], 12, 4
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; pyarrow {pa.__version__}")
    columns = "codec, resize, frames, MB a clip, memcpy ms, shard ms, shard / memcpy, in order, preadv / memcpy, pyarrow / memcpy"
    columns += ", view µs, cold ms, size / raw, write MB/s, verify ms a clip (GB/s)"
    print("\n| " + columns.replace(", ", " | ") + " |\n" + "|---" * len(columns.split(", ")) + "|")
    pool = pictures(16)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for codec in arguments.codecs:
            for count, edge in [*((count, None) for count in arguments.frames), *((8, edge) for edge in arguments.resize)]:
                print(measure(Path(folder), codec, count, arguments.clips, arguments.rounds, pool, edge), flush=True)


if __name__ == "__main__":
    main()
