"""How finely a device counts its energy: the counter moves in steps, and a stage of a few steps has no energy that it could tell."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["ENERGY_PERIODS", "EnergyCounter", "energy_counter"]

ENERGY_PERIODS = 20
"""Periods of the counter that a stage must last for its energy to be given: either border may be off by one, so by 5 % each at most."""

_STEPS = 8
_PATIENCE_S = 1.5


@dataclass(frozen=True)
class EnergyCounter:
    """Measured in the job, on the job's device."""

    period_ms: float
    """Between two changes of the counter: the median of those seen."""
    read_ms: float
    """What one reading takes: the median."""


def energy_counter(
    read_mj: Callable[[], int | None], now: Callable[[], float] = time.perf_counter, patience_s: float = _PATIENCE_S
) -> EnergyCounter | None:
    """Poll the counter until it has changed a few times; None where there is none, or where it does not move.

    An idle device counts too, at its idle power. now: seconds. Never inside a timed window.
    """
    value, begin = read_mj(), now()
    if value is None:
        return None
    changes: list[float] = []
    reads: list[float] = []
    while len(changes) <= _STEPS and now() - begin < patience_s:
        before = now()
        latest = read_mj()
        after = now()
        reads.append(after - before)
        if latest != value:
            value = latest
            changes.append(after)
    periods = [b - a for a, b in pairwise(changes)]
    if len(periods) < 2:
        return None
    return EnergyCounter(statistics.median(periods) * 1e3, statistics.median(reads) * 1e3)
