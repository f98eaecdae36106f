"""Columns of each table, and the views that people are shown of them."""

from __future__ import annotations

from collections.abc import Sequence

from stagebench.config import Config
from stagebench.stages import STAGES

__all__ = ["COLUMNS", "NOTES", "TITLES", "layout"]

_GROUP = ("machine", "dataset", "model", "variant", "length")
_SETTINGS = (
    *("engine", "quantization", "batch", "frames", "input", "source", "dtype", "attention", "keep_visual", "preprocess"),
    *("preset", "weights"),
)
_QUALITY = ("agreement", "mean_kl", "max_kl", "pixel_max_abs", "pixel_changed_share")
_COUNTS = ("samples", "n", "failed", "discarded", "capped")
_STAGE_MS = tuple(f"{stage}_ms" for stage in STAGES)
_QUANTILES = ("p5_ms", "p90_ms", "p95_ms", "p99_ms")
_TOTAL = tuple(f"total_{name}" for name in _QUANTILES)
_PAIR = ("machine", "dataset", "length", "model", "variant", "reference", "reference_variant", "n", "failed", "discarded", "capped")
_RATIO = ("ratio", "low", "high", "verdict")

TITLES = {
    "stages": "Stages",
    "comparison": "Comparison, paired by sample",
    "axis": "Along an axis: frames, batch, share of tokens, datasets",
    "load": "Load by source",
    "optimisations": "Settings of one model against its first variant",
    "failures": "Failed and discarded runs",
    "distribution": "Distribution of each stage",
    "views": "Three-, four- and five-stage views",
    "decomposition": "Where a ratio comes from",
    "acceptance": "Agreement of outputs",
}

COLUMNS: dict[str, tuple[str, ...]] = {
    "stages": (
        *(*_GROUP, *_SETTINGS, *_COUNTS, "runs", "discarded_runs", *_STAGE_MS, "residual_ms", "total_ms", "no_load_ms", "ttft_ms"),
        *(*_TOTAL, "total_mean_ms", "total_mad_ms", "total_cv", "total_gmean_ms", "total_low_ms", "total_high_ms", "repeat_cv"),
        *(*(f"{stage}_share" for stage in STAGES), "residual_share", "ms_per_token", "new_tokens", "new_tokens_min", "new_tokens_max"),
        *("prompt_tokens", "visual_tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "sample_ms", "samples_per_s"),
        *("samples_per_hour", "samples_per_day", "llm_over_vision", "bottleneck", "host_bound_share", "clock_gap_share"),
        *(
            "fastest_sample",
            "fastest_ms",
            "typical_sample",
            "typical_ms",
            "slowest_sample",
            "slowest_ms",
            "outliers_mild",
            "outliers_severe",
        ),
        *(
            "peak_bytes",
            "kv_bytes",
            "weights_bytes",
            "limit_ms",
            "share_of_limit",
            "energy_j",
            "decode_energy_j",
            "energy_n",
            "power_w",
            "sm_clock_mhz",
            "temperature_c",
        ),
        *(
            "harness_ms",
            "cpu_wait_share",
            "slope_ms_per_token",
            "slope_low",
            "slope_high",
            "intercept_ms",
            "intercept_low",
            "intercept_high",
        ),
        *("first_call_ms", "first_call_encode_ms", "warmup", "jobs", "measured_share"),
    ),
    "comparison": (*_PAIR, "metric", "clusters", "median", "reference_median", *_RATIO, "speedup", "method", "cpu_wait_share"),
    "axis": (
        *("axis", "machine", "dataset", "model", "variant", "series", "length", "metric", "value", "x", "unit"),
        *("n", "failed", "discarded", "capped"),
        *(
            "median",
            "gmean",
            "gmean_low",
            "gmean_high",
            "against",
            "how",
            "pairs",
            *_RATIO,
            "slope",
            "slope_low",
            "slope_high",
            "intercept",
        ),
    ),
    "load": (*_GROUP[:4], "input", "source", "frames", "n", "failed", "discarded", "runs", "median_ms", *_QUANTILES, "share_of_total"),
    "optimisations": (
        *(*_PAIR, "changed", "median", "reference_median", *_RATIO, "speedup", "sample_ratio", "preprocess_ratio", "encode_ratio"),
        *("prefill_ratio", "decode_ratio", "ms_per_token_ratio", "share_of_limit", *_QUALITY, "acceptance", "weights_bytes", "peak_bytes"),
        *("clusters", "method"),
    ),
    "failures": (*_GROUP, "sample", "status", "codes", "reason", "runs"),
    "distribution": (
        *(*_GROUP, *_COUNTS, "metric", "median_ms", "mean_ms", *_QUANTILES, "mad_ms", "cv", "gmean_ms", "low_ms", "high_ms", "share"),
        *("host_bound_share", "clock_gap_share", "energy_j", "energy_n", "peak_bytes", "outliers_mild", "outliers_severe"),
    ),
    "views": (*_GROUP, *_COUNTS, "view", "step", "median_ms", "mean_ms", "share"),
    "decomposition": (*_PAIR, "part", "ms", "factor", "log_ratio", "share"),
    "acceptance": (
        *(*_PAIR, "position_share", "sample_share", "prefix_mean_tokens", "alpha", "gamma", "cost", "speculative_speedup_computed", "note"),
    ),
}

_ROUNDING = (
    "Numbers have four significant digits. Times are milliseconds of host wall time, medians over samples unless a column says otherwise."
)
_SAMPLE = (
    "A sample's figure is that of its run with the median total; failed, discarded and capped samples are counted and enter no figure."
)
_RATIOS = (
    "ratio: geometric mean over samples of model / reference, with its interval (low, high) clustered by sequence, and by batch at "
    "batch > 1; below 1 the model is faster. FASTER, SLOWER: the interval lies below, above 1. SAME: it lies within 1 ± "
    "compare.same_within. AMBIGUOUS: otherwise, and where either side waited for a CPU for over 10 % of its time (cpu_wait_share; waits up "
    "to 3 ms count as none)."
)

NOTES: dict[str, tuple[str, ...]] = {
    "stages": (
        _ROUNDING,
        _SAMPLE,
        "Shares are of the mean total. Without load: no_load_ms. TTFT is load to prefill.",
        "At batch > 1 times and joules are those of the whole batch, sample_ms and samples a second those of a sample in it, and tokens a "
        "second those of each sample, beside the others of its batch.",
    ),
    "comparison": (_RATIOS, _SAMPLE),
    "axis": (
        _RATIOS.replace("over samples of model / reference", "of a place on the axis / its first one (`against`)"),
        "how: paired by sample (one dataset); by sequence (datasets that share sequences: one pair a sequence, of its geometric means); or "
        "unpaired, each side's error clustered by sequence.",
        "slope: the metric (ms, or tokens) for each further unit of the axis, least squares over all samples of the series, interval by "
        "a jackknife over sequences. A dataset's seconds are those that its name ends in (dsec_200ms, dsec_1s).",
        "Along batch, times are those of the whole batch; sample is total / batch, so below 1 is a higher throughput. series: the settings "
        "that tell a model's series on an axis apart.",
    ),
    "load": (_ROUNDING, "Over all length modes; n counts samples."),
    "optimisations": (
        _RATIOS,
        _SAMPLE,
        "sample_ratio: the same of total / batch, so below 1 is a higher throughput. acceptance: share of guessed tokens that were "
        "accepted; with guesses several tokens come of one step, and share_of_limit, which is per token, can pass 1.",
        "agreement, mean_kl, max_kl: argmax and KL(plain || variant) in nats, teacher-forced on the plain model's own answers to the job's "
        "first samples; null for variants that leave the numbers as they are. pixel_*: against the pixels of preprocess: pil.",
    ),
    "failures": ("One row for each sample, length and reason; runs counts its repeats.",),
    "distribution": (_ROUNDING, _SAMPLE, "n too small: fewer than two samples are expected beyond the quantile."),
    "views": (_ROUNDING, "Sums of stages, sample by sample."),
    "decomposition": (
        "ms sums to its total and factor multiplies to it, exactly (before rounding).",
        "decode = tokens x ms_per_token is divided between the two, each at the mean of both models' other factor.",
    ),
    "acceptance": (
        "alpha: chance that a draft token is accepted given that all before it were. position_share: equal positions. Only generated ids "
        "are compared.",
        "speculative_speedup_computed is computed from alpha, gamma and cost (draft / target ms a token); it was not measured.",
    ),
}


def layout(name: str, config: Config, *, several_machines: bool, several_datasets: bool) -> Sequence[tuple[str, Sequence[str]]]:
    """(caption, columns) that Markdown, LaTeX and the report show. Machine, dataset and variant are shown where there is more than one."""
    v = config.variants
    axes: tuple[tuple[object, ...], ...] = (v.engine, v.quantization, v.batch, v.attention, v.frames, v.source, v.keep_visual, v.preprocess)
    many = any(len(axis) > 1 for axis in axes)
    where = (*(("machine",) if several_machines else ()), *(("dataset",) if several_datasets else ()))
    who = (*where, "model", *(("variant",) if many else ()), "length")
    pair = (*where, "length", "model", *(("variant",) if many else ()), "reference")
    if name == "stages":
        return (
            ("Median ms", (*who, *_COUNTS[1:], *_STAGE_MS, "residual_ms", "total_ms", "no_load_ms", "ttft_ms")),
            ("Total", (*who, "n", "total_gmean_ms", "total_low_ms", "total_high_ms", *_TOTAL, "total_cv", "repeat_cv", "outliers_severe")),
            (
                "Share of the total",
                (*who, "n", *(f"{s}_share" for s in STAGES), "residual_share", "llm_over_vision", "bottleneck", "host_bound_share"),
            ),
            (
                "Tokens",
                (
                    *who,
                    "n",
                    "prompt_tokens",
                    "visual_tokens",
                    "new_tokens",
                    "ms_per_token",
                    "slope_ms_per_token",
                    "slope_low",
                    "slope_high",
                ),
            ),
            (
                "Throughput",
                (*who, "n", "batch", "samples_per_s", "samples_per_hour", "samples_per_day", "prefill_tokens_per_s", "decode_tokens_per_s"),
            ),
            ("Samples", (*who, "fastest_sample", "fastest_ms", "typical_sample", "typical_ms", "slowest_sample", "slowest_ms")),
            (
                "Memory and machine",
                (
                    *who,
                    "peak_bytes",
                    "kv_bytes",
                    "weights_bytes",
                    "energy_j",
                    "decode_energy_j",
                    "energy_n",
                    "share_of_limit",
                    "first_call_ms",
                    "warmup",
                    "measured_share",
                    "weights",
                ),
            ),
        )
    if name == "comparison":
        return (("", (*pair, "metric", "n", "failed", "discarded", "capped", "median", "reference_median", *_RATIO)),)
    if name == "axis":
        who = (*where, "model", *(("series",) if many else ()), "length")
        place = ("axis", *who, "metric", "value", "n", "failed", "discarded")
        return (
            ("", (*place, "median", "gmean_low", "gmean_high", "against", "how", "pairs", *_RATIO)),
            ("Slope", ("axis", *who, "metric", "value", "n", "x", "unit", "slope", "slope_low", "slope_high", "intercept")),
        )
    if name == "optimisations":
        speed = ("n", "failed", "discarded", "median", "reference_median", *_RATIO, "sample_ratio", "ms_per_token_ratio", "share_of_limit")
        what = ("n", "agreement", "mean_kl", "pixel_max_abs", "acceptance", "weights_bytes", "peak_bytes")
        return (("", (*pair, "changed", *speed)), ("Quality and memory", (*pair, "changed", *what)))
    if name == "decomposition":
        return (("", (*pair, "part", "n", "failed", "discarded", "ms", "factor", "share")),)
    if name == "acceptance":
        shown = (
            "n",
            "failed",
            "discarded",
            "position_share",
            "prefix_mean_tokens",
            "alpha",
            "gamma",
            "cost",
            "speculative_speedup_computed",
            "note",
        )
        return (("", (*pair, *shown)),)
    if name == "distribution":
        return (("", (*who, "metric", "n", "failed", "discarded", "median_ms", *_QUANTILES, "mad_ms", "cv", "low_ms", "high_ms", "share")),)
    if name == "views":
        return (("", (*who, "n", "failed", "discarded", "view", "step", "median_ms", "mean_ms", "share")),)
    return (("", COLUMNS[name]),)
