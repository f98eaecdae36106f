"""When a sample has been run often enough. Only noisy samples are run more than the minimum."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from stagebench.config import RepeatsConfig

__all__ = ["cv", "go_on", "unmet"]

STABLE_WINDOW = 5
STABLE_SHARE = 0.05
"""Noise has stabilised when the last 5 coefficients of variation lie within 5 % of each other: more runs will not lower it."""


def cv(values: Sequence[float]) -> float:
    """Coefficient of variation: sample standard deviation / mean. Infinite for fewer than two values."""
    if len(values) < 2:
        return float("inf")
    mean = statistics.fmean(values)
    return statistics.stdev(values) / mean if mean > 0 else float("inf")


def go_on(totals_ms: Sequence[float], spent_s: float, repeats: RepeatsConfig) -> bool:
    """Whether one more run of this sample is due.

    totals_ms: of its runs so far. spent_s: seconds since its first run began.
    """
    done = len(totals_ms)
    if done < repeats.min:
        return True
    if done >= repeats.max or repeats.target_cv is None:
        return False
    return cv(totals_ms) > repeats.target_cv and not _stable(totals_ms) and not _late(spent_s, repeats)


def unmet(totals_ms: Sequence[float], spent_s: float, repeats: RepeatsConfig) -> str | None:
    """Why the noise target was not reached, or None when it was (or none is set)."""
    if repeats.target_cv is None or not totals_ms or cv(totals_ms) <= repeats.target_cv:
        return None
    why = (
        "noise has stabilised"
        if _stable(totals_ms)
        else f"timeout of {repeats.timeout_s:g} s"
        if _late(spent_s, repeats)
        else f"maximum of {repeats.max} runs"
    )
    return f"CV {cv(totals_ms):.3f} after {len(totals_ms)} runs, {repeats.target_cv:g} asked for; stopped by {why}"


def _stable(totals_ms: Sequence[float]) -> bool:
    if len(totals_ms) < STABLE_WINDOW + 2:
        return False
    recent = [cv(totals_ms[:n]) for n in range(len(totals_ms) - STABLE_WINDOW + 1, len(totals_ms) + 1)]
    return max(recent) - min(recent) <= STABLE_SHARE * max(recent)


def _late(spent_s: float, repeats: RepeatsConfig) -> bool:
    return repeats.timeout_s is not None and spent_s >= repeats.timeout_s
