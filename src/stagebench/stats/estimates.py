"""Statistics of a study, in numpy alone: paired ratios with intervals clustered by sequence, verdict words, quantiles, outliers.

Rules (also in docs/methodology.md):

* A ratio is the geometric mean over pairs of `time / reference time`, a pair being one sample; below 1 the model is faster.
* Its interval treats sequences (recordings), not samples, as the independent units, since clips of one drive resemble each other.
  From `BOOTSTRAP_CLUSTERS` sequences on it is a bootstrap over sequences whose percentiles are widened as Student's t asks
  (Hesterberg 2015, "What teachers should know about the bootstrap", expanded percentile). With fewer, a bootstrap over sequences
  cannot cover (70 to 90 % at 3 to 8 sequences where 95 % is claimed: tests/unit/test_stats_coverage.py), so the interval is
  studentised: Student's t on a CR2 cluster-robust error (Bell and McCaffrey 2002) with the effective number of sequences,
  (sum n)^2 / sum n^2, less one, as degrees of freedom. With one sequence samples are the units, and the interval speaks for that
  sequence only.
* Samples that were measured in batches share a time, whatever their sequences: the interval is then studentised over sequences and
  batches (`clustering.two_way`), and there is none below `MIN_BATCHES` batches.
* FASTER / SLOWER: the whole interval lies below / above 1. SAME: the whole interval lies within 1 +- `same_within`; this goes first.
  AMBIGUOUS: anything else, fewer than two pairs included.
* A quantile is given when at least `TAIL` observations are expected beyond it: p90 from 20, p95 from 40, p99 from 200 samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from stagebench.stats.clustering import Batches, Members, clustered, members, too_few_batches, two_way

__all__ = [
    "BOOTSTRAP_CLUSTERS",
    "TAIL",
    "Fit",
    "Interval",
    "Ratio",
    "Verdict",
    "cluster_interval",
    "fit_line",
    "mad",
    "paired_ratio",
    "quantile",
    "student_t",
    "tukey_outliers",
    "verdict",
]

Floats = npt.NDArray[np.float64]

BOOTSTRAP_CLUSTERS = 20
"""Sequences from which on intervals are bootstrapped; below, studentised."""

TAIL = 2
"""Observations that must be expected beyond a quantile for it to be printed."""


class Verdict(StrEnum):
    FASTER = "FASTER"
    SLOWER = "SLOWER"
    SAME = "SAME"
    AMBIGUOUS = "AMBIGUOUS"


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, on the scale of the data."""

    mean: float
    low: float | None
    high: float | None
    n: int
    clusters: int
    method: str
    """bootstrap | studentised | studentised (one sequence) | studentised (sequences and batches) | none"""


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of time / reference over pairs."""

    ratio: float
    low: float | None
    high: float | None
    n: int
    clusters: int
    method: str
    verdict: Verdict


@dataclass(frozen=True)
class Fit:
    """y = intercept + slope * x by least squares; intervals by a jackknife over sequences with Student's t."""

    slope: float
    slope_low: float | None
    slope_high: float | None
    intercept: float
    intercept_low: float | None
    intercept_high: float | None
    n: int
    clusters: int


@lru_cache(maxsize=1024)
def student_t(p: float, df: float) -> float:
    """The p-quantile of Student's t with df > 0 degrees of freedom, which need not be whole; error below 1e-6 for p in [1e-4, 1 - 1e-4].

    With t = sqrt(df) tan(a) the density becomes cos(a)^(df-1), which is smooth on a bounded range: integrated by the trapezoid rule.
    """
    if not 0 < p < 1 or df <= 0:
        raise ValueError(f"student_t(p={p}, df={df}): expected 0 < p < 1 and df > 0")
    if p < 0.5:
        return -student_t(1 - p, df)
    if df < 1:  # the transformed density has a pole at pi/2; one degree is the least an interval here is given
        df = 1.0
    if df > 1e4:
        return NormalDist().inv_cdf(p)
    # the mass sits within a few 1/sqrt(df) of 0: put the grid there
    top = min(math.pi / 2, 40.0 / math.sqrt(df))
    angle = np.linspace(0.0, top, 200_001)
    density = np.cos(angle) ** (df - 1)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(df) * math.tan(np.interp((2 * p - 1) * cumulative[-1], cumulative, angle)))


def cluster_interval(
    values: Floats, clusters: Sequence[str], *, batches: Batches = (), confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `values` [n] with an interval whose independent units are `clusters` [n]. See the module's rules.

    batches: for each side that was measured in batches, the batch [n] that each value comes of; none where samples were measured alone.
    Deterministic: the order of rows does not matter beyond rounding, and the bootstrap is seeded. Raises ValueError for unequal lengths,
    no values, or values that are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) != len(clusters) or not len(values):
        raise ValueError(
            f"cluster_interval: {len(values)} values with {len(clusters)} clusters: give one cluster a value, and at least one"
        )
    if not np.isfinite(values).all():
        raise ValueError("cluster_interval: values hold NaN or infinity: leave failed samples out first")
    member = members(clusters)
    n, groups = len(values), int(member.max()) + 1
    mean = math.fsum(values) / n
    if n < 2 or too_few_batches(batches):
        return Interval(mean, None, None, n, groups, "none")
    if batches:
        recordings = member if groups > 1 else np.arange(n)
        variance, freedom = two_way(lambda units: clustered(values, units), recordings, batches)
        half = student_t((1 + confidence) / 2, freedom) * math.sqrt(variance)
        return Interval(mean, mean - half, mean + half, n, groups, "studentised (sequences and batches)")
    if groups == 1:
        half = student_t((1 + confidence) / 2, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
        return Interval(mean, mean - half, mean + half, n, 1, "studentised (one sequence)")
    variance, freedom = clustered(values, member)
    t = student_t((1 + confidence) / 2, freedom)
    if groups < BOOTSTRAP_CLUSTERS:
        half = t * math.sqrt(variance)
        return Interval(mean, mean - half, mean + half, n, groups, "studentised")
    size: Floats = np.bincount(member, minlength=groups).astype(np.float64)
    total: Floats = np.bincount(member, weights=values, minlength=groups).astype(np.float64)
    means = _bootstrap_means(total, size, resamples, seed)
    tail = NormalDist().cdf(-math.sqrt((freedom + 1) / freedom) * t)
    low, high = (float(q) for q in np.quantile(means, [tail, 1 - tail]))
    return Interval(mean, low, high, n, groups, "bootstrap")


def _bootstrap_means(total: Floats, size: Floats, resamples: int, seed: int) -> Floats:
    """Means of `resamples` draws of whole clusters, in blocks that bound memory."""
    rng, groups = np.random.default_rng(seed), len(total)
    means = np.empty(resamples)
    step = max(1, 2_000_000 // groups)
    for begin in range(0, resamples, step):
        drawn = rng.integers(0, groups, size=(min(step, resamples - begin), groups))
        means[begin : begin + len(drawn)] = total[drawn].sum(axis=1) / size[drawn].sum(axis=1)
    return means


def verdict(low: float | None, high: float | None, same_within: float) -> Verdict:
    """The word for an interval of ratios time / reference time."""
    if low is None or high is None:
        return Verdict.AMBIGUOUS
    if 1 - same_within <= low and high <= 1 + same_within:
        return Verdict.SAME
    if high < 1:
        return Verdict.FASTER
    if low > 1:
        return Verdict.SLOWER
    return Verdict.AMBIGUOUS


def withheld(word: str, low: float | None, high: float | None, same_within: float) -> bool:
    """Whether a ratio's word is AMBIGUOUS where its interval alone would have given a clear one: a side waited for a CPU (`disturbed`)."""
    return word == Verdict.AMBIGUOUS.value and verdict(low, high, same_within) is not Verdict.AMBIGUOUS


def paired_ratio(
    times: Floats,
    reference: Floats,
    clusters: Sequence[str],
    *,
    batches: Batches = (),
    confidence: float = 0.95,
    resamples: int = 10_000,
    same_within: float = 0.02,
    seed: int = 0,
) -> Ratio:
    """Geometric-mean ratio of `times` [n] to `reference` [n], both > 0, of the same samples in the same order. Else ValueError."""
    times, reference = np.asarray(times, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if times.shape != reference.shape:
        raise ValueError(f"paired_ratio: {len(times)} times against {len(reference)}: pair them by sample first")
    if not (times > 0).all() or not (reference > 0).all():
        raise ValueError("paired_ratio: times must be above 0: leave failed samples and stages that did not run out first")
    difference = np.log(times) - np.log(reference)
    logs = cluster_interval(difference, clusters, batches=batches, confidence=confidence, resamples=resamples, seed=seed)
    low = None if logs.low is None else math.exp(logs.low)
    high = None if logs.high is None else math.exp(logs.high)
    return Ratio(math.exp(logs.mean), low, high, logs.n, logs.clusters, logs.method, verdict(low, high, same_within))


def quantile(values: Floats, p: float) -> float | None:
    """The p-quantile, linearly interpolated; None ("n too small") where fewer than `TAIL` values are expected beyond it.

    The median needs one value.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return None
    if p != 0.5 and len(values) * min(p, 1 - p) < TAIL - 1e-9:
        return None
    return float(np.quantile(values, p))


def mad(values: Floats) -> float | None:
    """Median absolute deviation from the median, unscaled; None for no values."""
    values = np.asarray(values, dtype=np.float64)
    return float(np.median(np.abs(values - np.median(values)))) if len(values) else None


def tukey_outliers(values: Floats) -> tuple[int, int]:
    """(mild, severe): values 1.5 to 3 and over 3 interquartile ranges from the quartiles. Counted, never dropped; none below 4 values."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 4:
        return 0, 0
    q1, q3 = np.quantile(values, [0.25, 0.75])
    beyond = np.maximum(q1 - values, values - q3)
    severe = int((beyond > 3 * (q3 - q1)).sum())
    return int((beyond > 1.5 * (q3 - q1)).sum()) - severe, severe


def fit_line(x: Floats, y: Floats, clusters: Sequence[str], *, batches: Batches = (), confidence: float = 0.95) -> Fit | None:
    """Least-squares line of y [n] on x [n]; None when x has fewer than two different values (a fixed length has no slope).

    Intervals: leave-one-sequence-out jackknife (samples, when there is one sequence only) with Student's t, over sequences and batches
    where `batches` [n] are given; None when a line with one of them left out is undefined, or there are fewer than three.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(np.unique(x)) < 2:
        return None
    member = members(clusters)
    groups = int(member.max()) + 1
    recordings = member if groups > 1 else np.arange(len(x))
    # moments about the overall mean, per unit: leaving one out is a subtraction
    mx, my = float(x.mean()), float(y.mean())
    dx, dy = x - mx, y - my
    moments = (np.ones_like(x), dx, dy, dx * dx, dx * dy)
    sums = np.array([w.sum() for w in moments])[:, None]
    slope, intercept = (float(value[0]) for value in _line(sums, mx, my))

    def left_out(units: Members) -> tuple[Floats, Floats]:
        return _line(sums - np.stack([np.bincount(units, weights=w) for w in moments]), mx, my)

    def error(which: int) -> tuple[float, float]:
        def jackknife(units: Members) -> tuple[float, float]:
            left, count = left_out(units)[which], int(units.max()) + 1
            return (count - 1) / count * float(((left - left.mean()) ** 2).sum()), count - 1.0

        return two_way(jackknife, recordings, batches)

    limits: list[float | None] = [None] * 4
    if not too_few_batches(batches) and recordings.max() >= 2:
        errors = [error(which) for which in (0, 1)]
        if all(math.isfinite(variance) for variance, _ in errors):
            halves = [student_t((1 + confidence) / 2, freedom) * math.sqrt(variance) for variance, freedom in errors]
            limits = [slope - halves[0], slope + halves[0], intercept - halves[1], intercept + halves[1]]
    return Fit(slope, limits[0], limits[1], intercept, limits[2], limits[3], len(x), groups)


def _line(sums: Floats, mx: float, my: float) -> tuple[Floats, Floats]:
    """Slopes and intercepts from [n, sum dx, sum dy, sum dx^2, sum dx dy] columns; NaN where x does not vary."""
    n, sx, sy, sxx, sxy = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = sxx - sx * sx / n
        slope = np.where(spread > 1e-9 * np.maximum(np.abs(sxx), 1e-300), (sxy - sx * sy / n) / spread, np.nan)
        intercept = my + sy / n - slope * (mx + sx / n)
    return slope, intercept
