"""Where a job's wall time goes: the share that passes inside measured samples, and what the rest is spent on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

__all__ = ["JobCost"]


class JobCost:
    """A stopwatch over the parts of one job, without gaps: each `mark` ends a part that began where the last one ended.

    own_process: the process was started for this job, which pays for its start and imports. now: seconds that only move forward.
    """

    def __init__(self, *, own_process: bool = False, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last = now()
        self.parts: dict[str, float] = {}
        """Part -> seconds, in the order in which they began. `start` is what passed in a process before the job that it was started for."""
        if own_process:
            self.parts["start"] = max(0.0, time.time() - psutil.Process().create_time())

    def mark(self, part: str, within: Mapping[str, float] | None = None) -> None:
        """End a part here. within: parts that lay inside it, in seconds, and are told apart from it."""
        now = self._now()
        inner = dict(within or {})
        for name, seconds in [*inner.items(), (part, now - self._last - sum(inner.values()))]:
            self.parts[name] = self.parts.get(name, 0.0) + seconds
        self._last = now

    def summary(self, samples_s: float) -> dict[str, Any]:
        """`wall_s`, `samples_s`, `share` of the wall time inside timed runs, and `parts` in seconds, which sum to the wall time.

        samples_s: seconds inside timed runs, those without instrumentation included.
        """
        wall = sum(self.parts.values())
        return {"wall_s": wall, "samples_s": samples_s, "share": samples_s / wall if wall > 0 else 0.0, "parts": dict(self.parts)}

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
