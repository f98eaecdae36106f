"""For how long the device worked in each stage: what the host's and the device's clock cannot tell, for between two events it may idle.

One more run of one sample, under torch's profiler and outside all measurement, gives the union of its kernels' and copies' intervals by
stage. Held against the measured stages it is the host-bound share: time in which the device waited for Python to launch the next kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import profiler

from stagebench.models.base import Decoding
from stagebench.rows import Status
from stagebench.session.order import Task
from stagebench.session.run import Subject, run_once
from stagebench.stages import StageClock

__all__ = ["DeviceBusy", "busy_by_stage", "device_busy"]

log = logging.getLogger(__name__)

TOKENS = 5
"""Tokens of the profiled run. Steps are alike, so four tell a step's time; each of an eager 7b model adds 0.4 s of reading the profile."""
_MARK = "stagebench:"


@dataclass(frozen=True)
class DeviceBusy:
    """What the device did in one run of one sample (or batch)."""

    sample: str
    stage_ms: dict[str, float]
    """Stage -> milliseconds in which at least one kernel or copy was under way; stages without one are 0."""
    decode_ms_per_token: float | None
    launches: int
    """Kernels and copies."""


class _MarkedClock(StageClock):
    """Names each stage in the profile."""

    def _start(self, name: str) -> None:
        super()._start(name)
        self._mark = profiler.record_function(_MARK + name)
        self._mark.__enter__()

    def end(self) -> None:
        super().end()  # has synchronised: the stage's kernels lie inside its mark
        self._mark.__exit__(None, None, None)


def device_busy(subject: Subject, tasks: Sequence[Task], decoding: Decoding) -> DeviceBusy | None:
    """Profile one run; None on a CPU, or where the profiler sees no device.

    Nothing may be measured in this process afterwards: what the profiler leaves attached made each decode step of a 7b model on an H200 a
    quarter slower (benchmarks/harness.py). Never raises for a profiler that fails: the share is then unknown.
    """
    if not subject.device.startswith("cuda"):
        return None
    short = replace(decoding, max_new_tokens=min(TOKENS, decoding.max_new_tokens), min_new_tokens=min(TOKENS, decoding.max_new_tokens))
    marked = replace(subject, clock=_MarkedClock, ahead=None)
    try:
        run_once(subject, tasks, short)  # an engine may prepare this length now, not in the profile
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            run = run_once(marked, tasks, short)
        if run.status is not Status.OK or run.tokens is None:
            log.warning("%s: the profiled run ended as %s (%s): no host-bound share", tasks[0].sample, run.status.value, run.reason)
            return None
        found, launches = busy_by_stage(profile.events())
    except Exception as error:  # profilers fail in their own ways (no CUPTI, no permission)
        log.warning("the device cannot be profiled (%s): no host-bound share", error)
        return None
    if not launches:
        log.warning("the profiler saw no kernel: no host-bound share")
        return None
    steps = max(len(ids) for ids in run.tokens.ids) - 1
    return DeviceBusy(tasks[0].sample, found, found["decode"] / steps if steps > 0 and "decode" in found else None, launches)


def busy_by_stage(events: Iterable[Any]) -> tuple[dict[str, float], int]:
    """(stage -> busy ms, number of kernels and copies) from the profiler's events.

    An event of the device belongs to the stage in whose mark it begins: the device is idle at both ends of each stage.
    """
    stages: dict[str, tuple[float, float]] = {}
    work: list[tuple[float, float]] = []
    for event in events:
        span = (float(event.time_range.start), float(event.time_range.end))  # us
        if event.name.startswith(_MARK):
            if event.device_type.name == "CPU":
                stages[event.name.removeprefix(_MARK)] = span
        elif event.device_type.name == "CUDA" and span[1] > span[0] and not getattr(event, "is_user_annotation", False):
            work.append(span)
    work.sort()
    found = {}
    for stage, (begin, end) in stages.items():
        busy, last = 0.0, float("-inf")
        for start, stop in work:
            if begin <= start < end:
                busy += max(0.0, stop - max(start, last))
                last = max(last, stop)
        found[stage] = busy * 1e-3
    return found, len(work)
