"""stats: intervals, words, quantiles, fits, decomposition, acceptance."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagebench.stats import (
    PARTS,
    Verdict,
    acceptance,
    cluster_interval,
    decompose,
    fit_line,
    mad,
    paired_ratio,
    quantile,
    speculative_speedup,
    student_t,
    tukey_outliers,
    verdict,
)


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [(0.975, 1, 12.7062047), (0.975, 2, 4.3026527), (0.975, 9, 2.2621572), (0.995, 30, 2.7499957), (0.9, 4, 1.5332063)],
)
def test_student_t_equals_printed_tables(p: float, df: float, expected: float) -> None:
    assert student_t(p, df) == pytest.approx(expected, rel=1e-6)
    assert student_t(1 - p, df) == pytest.approx(-expected, rel=1e-6)


def test_student_t_meets_the_normal() -> None:
    assert student_t(0.975, 20_000) == pytest.approx(1.959964, abs=1e-5)
    assert student_t(0.975, 9_999) == pytest.approx(student_t(0.975, 10_001), abs=2e-3)
    with pytest.raises(ValueError, match="expected 0 < p < 1"):
        student_t(1.0, 3)


def test_ratio_is_the_geometric_mean_over_pairs() -> None:
    ratio = paired_ratio(np.array([1.0, 8.0]), np.array([2.0, 4.0]), ["a", "b"])
    assert ratio.ratio == pytest.approx(math.sqrt(0.5 * 2.0))
    assert ratio.verdict is Verdict.AMBIGUOUS


def test_ratio_of_swapped_models_is_the_inverse() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0, 0.2, 60), rng.lognormal(0.5, 0.2, 60)
    for sequences in (4, 30):
        names = [f"s{i % sequences}" for i in range(60)]
        one, other = paired_ratio(a, b, names), paired_ratio(b, a, names)
        assert one.ratio * other.ratio == pytest.approx(1)
        assert one.low is not None
        assert other.high is not None
        assert one.low * other.high == pytest.approx(1, rel=2e-3)
        assert (one.verdict, other.verdict) == (Verdict.FASTER, Verdict.SLOWER)


def test_clusters_widen_the_interval() -> None:
    """Twelve samples of one sequence that agree are not twelve times the evidence."""
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(0, 0.2, 5), 12) + rng.normal(0, 0.01, 60)
    by_sequence = cluster_interval(values, [f"s{i // 12}" for i in range(60)])
    by_sample = cluster_interval(values, [str(i) for i in range(60)])
    assert by_sequence.method == "studentised"
    assert by_sample.method == "bootstrap"
    assert by_sequence.high - by_sequence.low > 2 * (by_sample.high - by_sample.low)  # type: ignore[operator]


def test_intervals_without_evidence() -> None:
    one = cluster_interval(np.array([0.1]), ["a"])
    assert (one.low, one.high, one.method) == (None, None, "none")
    assert cluster_interval(np.array([0.1, 0.2]), ["a", "a"]).method == "studentised (one sequence)"
    for bad in (np.array([]), np.array([np.nan, 1.0])):
        with pytest.raises(ValueError, match="cluster_interval"):
            cluster_interval(bad, ["a"] * len(bad))
    with pytest.raises(ValueError, match="above 0"):
        paired_ratio(np.array([0.0, 1.0]), np.array([1.0, 1.0]), ["a", "b"])


def test_words() -> None:
    assert verdict(0.8, 0.9, 0.02) is Verdict.FASTER
    assert verdict(1.1, 1.2, 0.02) is Verdict.SLOWER
    assert verdict(0.985, 1.015, 0.02) is Verdict.SAME
    assert verdict(0.985, 0.995, 0.02) is Verdict.SAME, "within the bound goes first: 1 % is no difference that matters"
    assert verdict(0.9, 1.1, 0.02) is Verdict.AMBIGUOUS
    assert verdict(0.97, 0.99, 0.02) is Verdict.FASTER
    assert verdict(None, None, 0.02) is Verdict.AMBIGUOUS


@pytest.mark.parametrize(("p", "needed"), [(0.9, 20), (0.95, 40), (0.05, 40), (0.99, 200), (0.5, 1)])
def test_quantiles_need_samples(p: float, needed: int) -> None:
    assert quantile(np.arange(needed, dtype=float), p) is not None
    assert quantile(np.arange(needed - 1, dtype=float), p) is None


def test_spread_and_outliers() -> None:
    values = np.array([10.0, 10, 11, 11, 12, 12, 14.6, 100])
    assert mad(np.array([1.0, 2, 3, 4, 100])) == 1
    assert tukey_outliers(values) == (0, 1)
    assert tukey_outliers(np.array([10.0, 10, 11, 11, 12, 12, 15, 100])) == (0, 1)
    assert tukey_outliers(np.array([1.0, 2, 3])) == (0, 0)


def test_slope_is_not_moved_by_the_number_of_tokens() -> None:
    """A model that says more is not slower a token."""
    rng = np.random.default_rng(2)
    for mean in (20, 200):
        steps = rng.integers(mean // 2, mean * 2, 80).astype(float)
        fit = fit_line(steps, 12 + 21.5 * steps + rng.normal(0, 1, 80), [f"s{i % 8}" for i in range(80)])
        assert fit is not None
        assert fit.slope == pytest.approx(21.5, rel=0.01)
        assert fit.slope_low is not None
        assert fit.slope_low < 21.5 < fit.slope_high  # type: ignore[operator]
        assert fit.intercept == pytest.approx(12, abs=1.5)
    assert fit_line(np.full(9, 15.0), np.arange(9.0), ["a"] * 9) is None


times = st.floats(0.01, 1e4)


@st.composite
def sides(draw: st.DrawFn, n: int) -> dict[str, np.ndarray]:
    side = {
        f"{s}_ms": np.array(draw(st.lists(times, min_size=n, max_size=n)))
        for s in ("load", "preprocess", "h2d", "encode", "prefill", "decode")
    }
    side["total_ms"] = sum(side.values()) * 1.0 + draw(st.floats(0, 5))
    side["new_tokens"] = np.array(draw(st.lists(st.integers(1, 500), min_size=n, max_size=n)), dtype=float)
    return side


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_decomposition_sums_to_the_whole(data: st.DataObject, n: int) -> None:
    a, b = data.draw(sides(n)), data.draw(sides(n))
    split = decompose(a, b)
    assert set(split.ms) == set(PARTS)
    assert sum(split.ms.values()) == pytest.approx(split.total_ms, abs=1e-6 * (1 + abs(split.total_ms)))
    assert sum(split.log.values()) == pytest.approx(split.total_log, abs=1e-9 * (1 + abs(split.total_log)))
    geometric = math.exp(float(np.mean(np.log(a["total_ms"] / b["total_ms"]))))
    assert math.prod(split.factors().values()) == pytest.approx(geometric, rel=1e-9)
    mirrored = decompose(b, a)
    assert mirrored.ms["tokens"] == pytest.approx(-split.ms["tokens"], abs=1e-6 * (1 + abs(split.ms["tokens"])))


def row(load: float, preprocess: float, vision: float, llm: float, tokens: float) -> dict[str, np.ndarray]:
    values = {"load_ms": load, "preprocess_ms": preprocess, "h2d_ms": 0, "encode_ms": vision, "prefill_ms": 0, "decode_ms": llm}
    return {k: np.array([float(v)]) for k, v in {**values, "total_ms": sum(values.values()), "new_tokens": tokens}.items()}


def test_tokens_and_pace_are_told_apart() -> None:
    same_pace = decompose(row(1, 1, 1, 20 * 40, 41), row(1, 1, 1, 20 * 80, 81))
    assert same_pace.ms["tokens"] == pytest.approx(-800)
    assert same_pace.ms["ms_per_token"] == pytest.approx(0)
    same_length = decompose(row(1, 1, 1, 20 * 40, 41), row(1, 1, 1, 25 * 40, 41))
    assert same_length.ms["tokens"] == 0
    assert same_length.ms["ms_per_token"] == pytest.approx(-200)


def test_no_step_at_all_is_all_tokens() -> None:
    split = decompose(row(1, 1, 1, 0, 1), row(1, 1, 1, 400, 21))
    assert split.ms["tokens"] == pytest.approx(-400)
    assert split.ms["ms_per_token"] == pytest.approx(0)


def test_the_old_systems_published_ratio_decomposed() -> None:
    """Its three-stage means: 9.464 s against 1.851 s, "5.1x, 2.6x faster generation". The generation is mostly fewer tokens."""
    split = decompose(row(851, 23, 0, 977, 45.5), row(6858, 72, 0, 2533, 102.4))
    assert math.exp(-split.total_log) == pytest.approx(5.1, abs=0.02)
    assert split.ms["load"] / split.total_ms == pytest.approx(0.79, abs=0.005), "79 % of the difference is load, not 73 %"
    generation = split.ms["tokens"] + split.ms["ms_per_token"]
    assert split.ms["tokens"] / generation == pytest.approx(0.87, abs=0.02)
    # per token the two differ by about 1.15
    assert pytest.approx(1.15, abs=0.01) == (2533 / 102.4) / (977 / 45.5)


def test_acceptance_leaves_bos_out() -> None:
    draft, target = [[1, 5, 6, 7], [1, 9, 9]], [[1, 5, 6, 8, 2], [1, 4, 9]]
    found = acceptance(draft, target, draft_tokenizer="t", target_tokenizer="t", bos=1)
    assert found.per_sample == (2 / 3, 1 / 2)
    assert found.prefix_lengths == (2, 0)
    assert found.position_share == 3 / 5
    assert found.alpha == 2 / (3 + 1)
    assert found.by_position == (1 / 2, 1.0, 0.0)
    with_bos = acceptance(draft, target, draft_tokenizer="t", target_tokenizer="t")
    assert with_bos.position_share is not None
    assert with_bos.position_share > found.position_share, "counting BOS is what made the old 3.1 % of 1.1 %"


def test_an_id_that_a_model_chose_is_no_bos() -> None:
    """Id 1 is a word of some tokenizers (a quotation mark in Qwen's): a first token is a token, on one side or on both."""
    both = acceptance([[1, 5]], [[1, 6]], draft_tokenizer="t", target_tokenizer="t")
    assert (both.position_share, both.prefix_lengths) == (1 / 2, (1,))
    one = acceptance([[1, 5, 6]], [[5, 6, 7]], draft_tokenizer="t", target_tokenizer="t", bos=1)
    assert (one.position_share, one.prefix_lengths) == (0, (0,)), "taking it off one side only would compare other positions"


def test_acceptance_refuses_other_tokenizers() -> None:
    with pytest.raises(ValueError, match="tokenizers aa and bb differ"):
        acceptance([[3]], [[3]], draft_tokenizer="aa", target_tokenizer="bb")
    assert acceptance([[]], [[3]], draft_tokenizer="t", target_tokenizer="t").alpha is None


def test_speculative_speedup() -> None:
    assert speculative_speedup(0.0, 5, 0.0) == 1
    assert speculative_speedup(1.0, 5, 0.0) == 6
    assert speculative_speedup(0.8, 5, 0.1) == pytest.approx((1 - 0.8**6) / 0.2 / 1.5)
    with pytest.raises(ValueError, match="alpha"):
        speculative_speedup(1.2, 5, 0.1)
