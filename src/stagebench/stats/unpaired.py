"""A ratio of two sets of samples that cannot be paired: other clips of other recordings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stagebench.stats.estimates import Floats, Ratio, student_t, verdict

__all__ = ["unpaired_ratio"]


def unpaired_ratio(
    times: Floats,
    clusters: Sequence[str],
    reference: Floats,
    reference_clusters: Sequence[str],
    *,
    confidence: float = 0.95,
    same_within: float = 0.02,
) -> Ratio:
    """Ratio of the geometric means of `times` [n] and `reference` [m], all > 0; else ValueError.

    Each side's error is clustered by sequence (CR2, as in `cluster_interval`), the two are independent, and Student's t has Welch's degrees
    of freedom over both sides' effective numbers of sequences. n is the smaller side. No interval where a side has one sample.
    """
    sides = []
    for values, names in ((times, clusters), (reference, reference_clusters)):
        values = np.asarray(values, dtype=np.float64)
        if not len(values) or len(values) != len(names) or not (values > 0).all():
            raise ValueError(f"unpaired_ratio: {len(values)} times with {len(names)} clusters: expected times above 0, one cluster each")
        sides.append(_mean_and_error(np.log(values), names))
    (one, error, df, groups), (other, other_error, other_df, other_groups) = sides
    ratio, n = math.exp(one - other), min(len(times), len(reference))
    if error is None or other_error is None:
        return Ratio(ratio, None, None, n, groups + other_groups, "none", verdict(None, None, same_within))
    variance = error**2 + other_error**2
    welch = variance**2 / (error**4 / df + other_error**4 / other_df) if variance > 0 else df + other_df
    half = student_t((1 + confidence) / 2, max(welch, 1.0)) * math.sqrt(variance)
    low, high = math.exp(one - other - half), math.exp(one - other + half)
    return Ratio(ratio, low, high, n, groups + other_groups, "unpaired, clustered by sequence", verdict(low, high, same_within))


def _mean_and_error(values: Floats, clusters: Sequence[str]) -> tuple[float, float | None, float, int]:
    """Mean, its cluster-robust standard error, degrees of freedom, number of clusters. With one cluster samples are the units."""
    n, mean = len(values), math.fsum(values) / len(values)
    names, member = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    if n < 2:
        return mean, None, 1.0, len(names)
    if len(names) == 1:
        return mean, float(values.std(ddof=1)) / math.sqrt(n), n - 1.0, 1
    size: Floats = np.bincount(member, minlength=len(names)).astype(np.float64)
    total: Floats = np.bincount(member, weights=values, minlength=len(names)).astype(np.float64)
    error = math.sqrt(float((((total - mean * size) ** 2) / (1 - size / n)).sum())) / n
    return mean, error, max(n**2 / float((size**2).sum()) - 1, 1.0), len(names)
