"""Shared by the benchmarks of the store: CPU time of ways that do one job, interleaved; the machine's line; tables."""

from __future__ import annotations

import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from stagebench.sources.events import Events, read_events

Way = Callable[[], object]


def cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    return sum(r.ru_utime + r.ru_stime for r in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)))


def interleaved(
    ways: Mapping[str, Way], seconds: float, *, least: int = 5, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of every way, one after the other in random order in each round, until `seconds` have passed and `least` rounds are done."""
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    end = time.monotonic() + seconds
    while len(times[order[0]]) < least or time.monotonic() < end:
        shuffle(order)
        for name in order:
            begin = clock()
            ways[name]()
            times[name].append(clock() - begin)
    return times


def ratio(times: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Median over rounds of a way's time over the base's time in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def machine(*packages: str) -> str:
    """One line: processor, cores, load, versions."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} missing")
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; " + ", ".join(versions)


def table(columns: str, rows: Sequence[Sequence[object]]) -> None:
    names = columns.split(" | ")
    print(f"\n| {columns} |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def real_events() -> dict[str, Events]:
    """The real clips under STAGEBENCH_REAL_DATA; a synthetic one where there are none."""
    root = Path(os.environ.get("STAGEBENCH_REAL_DATA", "../shared/data")) / "real/event_npy"
    found = {str(path.relative_to(root).with_suffix("")): read_events(path) for path in sorted(root.rglob("*.npy"))}
    return found or {"synthetic": synthetic_events(500_000)}


def synthetic_events(n: int, seed: int = 0) -> Events:
    """n events of one second on 640x480, gathered along moving edges as a camera gives them."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, 1_000_000, n)) + 51_800_000_000
    edge = rng.integers(0, 24, n)
    x = (edge * 27 + (t - t[0]) // 5000 + rng.normal(0, 3, n).astype(np.int64)) % 640
    y = rng.integers(0, 480, n)
    return Events(x.astype(np.uint16), y.astype(np.uint16), rng.integers(0, 2, n).astype(np.uint8), t)
