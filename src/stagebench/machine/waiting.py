"""How long this process stood ready to run while its CPU was given to somebody else."""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["read_waits", "waited_ms"]

_TASKS = "/proc/self/task"


def read_waits() -> dict[int, int] | None:
    """Thread id -> nanoseconds on a run queue without running, since the thread began; None where the kernel does not tell.

    Second field of Linux's /proc/<pid>/task/<tid>/schedstat (Documentation/scheduler/sched-stats.rst). Takes some 6 us a thread.
    """
    found: dict[int, int] = {}
    try:
        for name in os.listdir(_TASKS):  # noqa: PTH208 - a Path for each thread costs more than the reading
            try:
                descriptor = os.open(f"{_TASKS}/{name}/schedstat", os.O_RDONLY)
            except FileNotFoundError:
                continue  # a thread that ended between the two calls, or a kernel without schedstat
            try:
                found[int(name)] = int(os.read(descriptor, 128).split()[1])
            finally:
                os.close(descriptor)
    except (OSError, ValueError, IndexError):
        return None
    return found or None


def waited_ms(before: Mapping[int, int] | None, after: Mapping[int, int] | None) -> float | None:
    """Milliseconds that the thread which waited longest has waited between two readings; None where one of them is missing.

    The longest, not the sum: threads that share a product wait for the slowest of them.
    """
    if before is None or after is None:
        return None
    return max(max(waited - before.get(thread, 0), 0) for thread, waited in after.items()) * 1e-6
