"""The error of a mean whose samples are alike in more than one way: by recording, and by the batch that they were measured in.

All samples of a batch share one time, and batches are drawn across recordings: whatever disturbs a batch disturbs all its samples at once,
and no grouping by recording sees that. The variance of the mean is therefore that of either grouping, less what both count twice (two-way
clustering, Cameron, Gelbach and Miller 2011), never below either alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["MIN_BATCHES", "Batches", "clustered", "members", "too_few_batches", "two_way"]

Floats = npt.NDArray[np.float64]
Members = npt.NDArray[np.intp]
Batches = Sequence[Sequence[str]]
"""Groupings [n] beside the recordings: a side's batches, one name a sample; none where each sample was measured by itself."""

MIN_BATCHES = 3
"""Batches below which nothing is known about how batches differ, and no interval is given."""


def members(names: Sequence[str]) -> Members:
    """[n] number of the group that each stands in, from 0."""
    return np.unique(np.asarray(names, dtype=str), return_inverse=True)[1].astype(np.intp)


def clustered(values: Floats, member: Members, weights: Floats | None = None) -> tuple[float, float]:
    """(variance, degrees of freedom) of the mean of `values` [n] whose groups `member` [n], at least two, are independent.

    CR2 (Bell and McCaffrey 2002), with the effective number of groups less one as degrees of freedom. weights: [n], of sum 1.
    """
    share = np.full(len(values), 1 / len(values)) if weights is None else weights
    whole = np.bincount(member, weights=share)
    apart = np.bincount(member, weights=share * (values - float((share * values).sum())))
    return float((apart**2 / (1 - whole)).sum()), max(1 / float((whole**2).sum()) - 1, 1.0)


def too_few_batches(batches: Batches) -> bool:
    return any(len(set(names)) < MIN_BATCHES for names in batches)


def two_way(error: Callable[[Members], tuple[float, float]], recordings: Members, batches: Batches) -> tuple[float, float]:
    """(variance, degrees of freedom) over recordings and batches. error: a grouping -> both, as if its groups were independent.

    Batches that lie within others of `batches` (a side's of 8 within the other's of 32) are left to those. Degrees of freedom are those
    of the grouping that has the fewest: with six batches, six is what is known. NaN where a grouping has no error.
    """
    variance, freedom = error(recordings)
    least = variance
    for batch in _coarsest([members(names) for names in batches]):
        own, own_freedom = error(batch)
        both, _ = error(_crossed(recordings, batch))
        if not (math.isfinite(own) and math.isfinite(both)):  # max() below would pass over a NaN
            return math.nan, freedom
        variance += max(0.0, own - both)
        least, freedom = max(least, own), min(freedom, own_freedom)
    return max(variance, least), freedom


def _coarsest(groupings: Sequence[Members]) -> list[Members]:
    kept: list[Members] = []
    for grouping in sorted(groupings, key=lambda member: int(member.max())):
        if not any(_crossed(grouping, other).max() == grouping.max() for other in kept):
            kept.append(grouping)
    return kept


def _crossed(one: Members, other: Members) -> Members:
    return np.unique(one * (int(other.max()) + 1) + other, return_inverse=True)[1].astype(np.intp)
