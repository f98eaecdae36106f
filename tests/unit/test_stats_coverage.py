"""The intervals cover the true ratio as often as they say, few and many sequences, skewed and heavy-tailed, equal and unequal sizes."""

import math

import numpy as np
import pytest

from stagebench.stats import cluster_interval, paired_ratio

STUDIES = 1000


def draw(rng: np.random.Generator, shape: str, size: int) -> np.ndarray:
    """Mean 0, variance 1."""
    if shape == "normal":
        return rng.normal(size=size)
    if shape == "heavy":
        return rng.standard_t(5, size=size) / math.sqrt(5 / 3)
    return (rng.gamma(4.0, size=size) - 4) / 2


def study(rng: np.random.Generator, sequences: int, shape: str, share: float) -> tuple[np.ndarray, list[str]]:
    """Log ratios around 0: `share` of the variance lies between sequences; sequences have 4 to 16 samples."""
    sizes = rng.integers(4, 17, sequences)
    between = math.sqrt(share) * draw(rng, shape, sequences)
    values = np.concatenate([b + math.sqrt(1 - share) * draw(rng, shape, int(n)) for b, n in zip(between, sizes, strict=True)])
    return values, [f"s{g}" for g, n in enumerate(sizes) for _ in range(n)]


@pytest.mark.parametrize("sequences", [3, 5, 10, 25, 40])
def test_interval_covers(sequences: int) -> None:
    """1,000 synthetic studies, a mix of shapes and of variance between sequences: 93 to 97 % of intervals hold the truth."""
    rng = np.random.default_rng(sequences)
    covered = 0
    for number in range(STUDIES):
        values, clusters = study(rng, sequences, ("normal", "heavy", "skewed")[number % 3], (0.0, 0.1, 0.4)[number // 3 % 3])
        interval = cluster_interval(0.1 * values, clusters, resamples=400, seed=number)
        assert interval.low is not None
        covered += interval.low <= 0 <= interval.high  # type: ignore[operator]
    assert 0.93 <= covered / STUDIES <= 0.97


def test_plain_bootstrap_would_not_cover() -> None:
    """Why few sequences are studentised: the plain percentile bootstrap over four sequences claims 95 % and gives under 88."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        values, clusters = study(rng, 4, "normal", 0.3)
        names = sorted(set(clusters))
        parts = [values[[c == n for c in clusters]] for n in names]
        drawn = rng.integers(0, 4, (400, 4))
        total, size = np.array([p.sum() for p in parts]), np.array([len(p) for p in parts])
        means = total[drawn].sum(axis=1) / size[drawn].sum(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        covered += low <= 0 <= high
    assert covered / 400 < 0.88


@pytest.mark.parametrize(("sequences", "divisor", "holds"), [(8, "steps", True), (25, "steps", True), (25, "tokens", False)])
def test_pace_ratio_covers_at_unequal_token_counts(sequences: int, divisor: str, holds: bool) -> None:
    """1,000 studies of two models of one pace whose answers differ in length, both short: decode / (tokens - 1) covers the true ratio, 1,
    in 93 to 97 %. Dividing by the number of tokens lets their count in, and covers nothing."""
    rng = np.random.default_rng(sequences)
    covered = 0
    for number in range(STUDIES):
        noise, clusters = study(rng, sequences, ("normal", "heavy", "skewed")[number % 3], (0.0, 0.1, 0.4)[number // 3 % 3])
        steps = rng.integers(4, 12, len(noise)), rng.integers(20, 60, len(noise))
        decode = 20.0 * np.exp(0.05 * noise) * steps[0], 20.0 * steps[1]
        pace = [ms / (s if divisor == "steps" else s + 1) for ms, s in zip(decode, steps, strict=True)]
        ratio = paired_ratio(*pace, clusters, resamples=400, seed=number)
        assert ratio.low is not None and ratio.high is not None
        covered += ratio.low <= 1 <= ratio.high
    assert (0.93 <= covered / STUDIES <= 0.97) if holds else covered / STUDIES < 0.05


def test_unequal_token_counts_do_not_leak_into_pace() -> None:
    """Two models of equal pace, one of which says twice as much: the total differs, ms a token does not."""
    rng = np.random.default_rng(3)
    steps = rng.integers(20, 60, 80)
    pace = rng.lognormal(math.log(20), 0.02, (2, 80))
    sequences = [f"s{i % 8}" for i in range(80)]
    total = paired_ratio(pace[0] * steps, pace[1] * steps * 2, sequences)
    assert total.verdict == "FASTER"
    assert paired_ratio(pace[0], pace[1], sequences).verdict == "SAME"
