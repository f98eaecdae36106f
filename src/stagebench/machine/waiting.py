"""How long this process stood ready to run while its CPU was given to somebody else."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Thread", "Waits", "read_waits", "waited_ms"]

_TASKS = "/proc/self/task"


@dataclass(frozen=True)
class Thread:
    """Since the thread began."""

    ran_ns: int
    waited_ns: int
    """On a run queue without running."""
    cpus: frozenset[int]
    """On which it may run."""


@dataclass(frozen=True)
class Waits:
    """One reading of all threads of this process."""

    threads: Mapping[int, Thread]
    cpu_ns: int
    """CPU time of the process, ended threads included."""
    at_ns: int


def read_waits() -> Waits | None:
    """None where the kernel does not tell.

    First two fields of Linux's /proc/<pid>/task/<tid>/schedstat (Documentation/scheduler/sched-stats.rst), in ns.
    """
    found: dict[int, Thread] = {}
    try:
        for name in os.listdir(_TASKS):  # noqa: PTH208 - a Path for each thread costs more than the reading
            try:
                descriptor = os.open(f"{_TASKS}/{name}/schedstat", os.O_RDONLY)
            except FileNotFoundError:
                continue  # a thread that ended between the two calls, or a kernel without schedstat
            try:
                ran, waited = os.read(descriptor, 128).split()[:2]
                found[int(name)] = Thread(int(ran), int(waited), frozenset(os.sched_getaffinity(int(name))))
            except ProcessLookupError:
                continue
            finally:
                os.close(descriptor)
    except (OSError, ValueError):
        return None
    return Waits(found, time.process_time_ns(), time.perf_counter_ns()) if found else None


def waited_ms(before: Waits | None, after: Waits | None) -> float | None:
    """Milliseconds that the thread which waited longest has waited between two readings for CPUs that others had; None without a reading.

    The longest, not the sum: threads that share a product wait for the slowest of them. A thread waits for its own siblings too, and the
    kernel does not say for whom; but others can have had no more of our CPUs than what we left: CPUs of the threads that ran, times the
    time between the readings, less our own CPU time. Threads of ours that outnumber their CPUs all the time leave nothing, so their waits
    are not others'. Where they do so for a part of the time only, the figure is an upper bound.
    """
    if before is None or after is None:
        return None
    longest, cpus = 0, set[int]()
    for number, thread in after.threads.items():
        was = before.threads.get(number)
        ran, waited = (thread.ran_ns, thread.waited_ns) if was is None else (thread.ran_ns - was.ran_ns, thread.waited_ns - was.waited_ns)
        longest = max(longest, waited)
        if ran > 0 or waited > 0:
            cpus |= thread.cpus
    left = len(cpus) * (after.at_ns - before.at_ns) - (after.cpu_ns - before.cpu_ns)
    return max(0, min(longest, left)) * 1e-6
