"""A ratio of two sets of samples that cannot be paired: other clips of other recordings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stagebench.stats.clustering import Batches, clustered, members, too_few_batches, two_way
from stagebench.stats.estimates import Floats, Ratio, cluster_interval, student_t, verdict

__all__ = ["sequence_ratio", "unpaired_ratio"]

_TWO_WAY = "studentised (sequences and batches)"


def unpaired_ratio(
    times: Floats,
    clusters: Sequence[str],
    reference: Floats,
    reference_clusters: Sequence[str],
    *,
    batches: Batches = (),
    reference_batches: Batches = (),
    confidence: float = 0.95,
    same_within: float = 0.02,
) -> Ratio:
    """Ratio of the geometric means of `times` [n] and `reference` [m], all > 0; else ValueError.

    Each side's error is clustered by sequence (CR2, as in `cluster_interval`) and by batch where it was measured in batches, the two are
    independent, and Student's t has Welch's degrees of freedom over both sides' effective numbers of sequences. n is the smaller side.

    One recording says nothing of how recordings differ: no interval where a side has one sequence, unless it is the other's only one too
    (then samples are the units, and the interval speaks for that sequence); none where a side has one sample or too few batches.
    """
    alone = len(set(clusters) | set(reference_clusters)) == 1
    sides = []
    for values, names, ways in ((times, clusters, batches), (reference, reference_clusters, reference_batches)):
        values = np.asarray(values, dtype=np.float64)
        if not len(values) or len(values) != len(names) or not (values > 0).all():
            raise ValueError(f"unpaired_ratio: {len(values)} times with {len(names)} clusters: expected times above 0, one cluster each")
        sides.append(_mean_and_variance(np.log(values), names, ways, alone))
    (one, variance, df, groups), (other, other_variance, other_df, other_groups) = sides
    ratio, n = math.exp(one - other), min(len(times), len(reference))
    if variance is None or other_variance is None:
        return Ratio(ratio, None, None, n, groups + other_groups, "none", verdict(None, None, same_within))
    whole = variance + other_variance
    welch = whole**2 / (variance**2 / df + other_variance**2 / other_df) if whole > 0 else df + other_df
    half = student_t((1 + confidence) / 2, max(welch, 1.0)) * math.sqrt(whole)
    low, high = math.exp(one - other - half), math.exp(one - other + half)
    return Ratio(ratio, low, high, n, groups + other_groups, "unpaired, clustered by sequence", verdict(low, high, same_within))


def _mean_and_variance(values: Floats, clusters: Sequence[str], batches: Batches, alone: bool) -> tuple[float, float | None, float, int]:
    """Mean, its cluster-robust variance, degrees of freedom, number of clusters. alone: samples are the units."""
    n, mean, member = len(values), math.fsum(values) / len(values), members(clusters)
    groups = int(member.max()) + 1
    if n < 2 or (groups < 2 and not alone) or too_few_batches(batches):
        return mean, None, 1.0, groups
    variance, freedom = two_way(lambda units: clustered(values, units), member if groups > 1 else np.arange(n), batches)
    return mean, variance, freedom, groups


def sequence_ratio(
    times: Floats,
    clusters: Sequence[str],
    reference: Floats,
    reference_clusters: Sequence[str],
    *,
    batches: Batches = (),
    reference_batches: Batches = (),
    confidence: float = 0.95,
    resamples: int = 10_000,
    same_within: float = 0.02,
) -> Ratio:
    """Ratio of two sets of samples, > 0, of which a pair is a sequence that both have, by the geometric means of its samples.

    n: common sequences, at least one, else ValueError. Where a side was measured in batches, what batches add to that side's error is
    added to the error of the pairs. No interval below two pairs or three batches of a side.
    """
    common = sorted(set(clusters) & set(reference_clusters))
    if not common:
        raise ValueError("sequence_ratio: no sequence is on both sides: take unpaired_ratio")
    means: list[Floats] = []
    added, freedom = 0.0, math.inf
    known = not (too_few_batches(batches) or too_few_batches(reference_batches))
    for values, names, ways in ((times, clusters, batches), (reference, reference_clusters, reference_batches)):
        here = np.isin(names, common)
        logs, member = np.log(np.asarray(values, dtype=np.float64)[here]), members(np.asarray(names)[here].tolist())
        weights = 1 / (np.bincount(member) * len(common))[member]
        means.append((np.bincount(member, weights=logs * weights) * len(common)).astype(np.float64))
        if ways and known and len(common) > 1:
            held = [[name for name, h in zip(way, here, strict=True) if h] for way in ways]
            if too_few_batches(held):
                known = False
                continue
            whole, least = two_way(lambda units, v=logs, w=weights: clustered(v, units, w), member, held)  # type: ignore[misc]
            added += whole - clustered(logs, member, weights)[0]
            freedom = min(freedom, least)
    difference: Floats = means[0] - means[1]
    if (batches or reference_batches) and len(common) > 1:
        mean = math.fsum(difference) / len(common)
        variance, own = clustered(difference, np.arange(len(common)))
        half = student_t((1 + confidence) / 2, min(own, freedom)) * math.sqrt(variance + added)
        low, high = (math.exp(mean - half), math.exp(mean + half)) if known else (None, None)
        method = _TWO_WAY if known else "none"
        return Ratio(math.exp(mean), low, high, len(common), len(common), method, verdict(low, high, same_within))
    found = cluster_interval(difference, common, confidence=confidence, resamples=resamples)
    low, high = (None if limit is None else math.exp(limit) for limit in (found.low, found.high))
    return Ratio(math.exp(found.mean), low, high, found.n, found.clusters, found.method, verdict(low, high, same_within))
