"""Each group's figures: stages, distribution, views."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from stagebench.merge.conditions import cpu_wait_share, energies
from stagebench.merge.groups import GROUP, Group, batches_of
from stagebench.stages import STAGES, VIEWS
from stagebench.stats import cluster_interval, fit_line, mad, quantile, tukey_outliers

__all__ = ["distribution_rows", "stage_row", "view_rows"]


def _clean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return values[np.isfinite(values)]


def _median(values: npt.NDArray[np.float64]) -> float | None:
    values = _clean(values)
    return float(np.median(values)) if len(values) else None


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    values = _clean(values)
    return math.fsum(values) / len(values) if len(values) else None


def _interval(
    group: Group, values: npt.NDArray[np.float64], confidence: float, resamples: int
) -> tuple[float | None, float | None, float | None]:
    """Geometric mean of a time with its interval, clustered by sequence, and by batch where there are batches."""
    keep = np.isfinite(values) & (values > 0)
    if not keep.any():
        return None, None, None
    clusters = [s for s, k in zip(group.sequences, keep, strict=True) if k]
    batches = [[b for b, k in zip(names, keep, strict=True) if k] for names in group.batches]
    logs = cluster_interval(np.log(values[keep]), clusters, batches=batches, confidence=confidence, resamples=resamples)
    return math.exp(logs.mean), None if logs.low is None else math.exp(logs.low), None if logs.high is None else math.exp(logs.high)


def _identity(group: Group) -> dict[str, Any]:
    return dict(zip(GROUP, group.key, strict=True))


def _counts(group: Group) -> dict[str, Any]:
    return {"samples": group.samples, "n": group.n, "failed": group.failed, "discarded": group.discarded, "capped": group.capped}


def stage_row(group: Group, first_call: dict[str, Any], busy: Mapping[str, float], *, confidence: float, resamples: int) -> dict[str, Any]:
    """A group's row of the stages table. Times in ms, shares and cv as fractions, memory in bytes; None where there is nothing to say.

    busy: stage -> ms in which the device worked, decode a token (see session/busy.py); empty where that is not known.
    """
    total = group.column("total_ms")
    batch = np.maximum(group.column("batch"), 1)
    means = {stage: _mean(group.column(f"{stage}_ms")) for stage in STAGES}
    total_mean = _mean(total)
    gmean, low, high = _interval(group, total, confidence, resamples)
    row: dict[str, Any] = (
        _identity(group) | group.settings | _counts(group) | {"runs": len(group.runs), "discarded_runs": group.discarded_runs}
    )
    row |= {f"{stage}_ms": _median(group.column(f"{stage}_ms")) for stage in STAGES}
    for name in ("total_ms", "no_load_ms", "ttft_ms", "residual_ms"):
        row[name] = _median(group.column(name))
    row |= {f"total_p{round(100 * p)}_ms": quantile(_clean(total), p) for p in (0.05, 0.9, 0.95, 0.99)}
    row |= {"total_mean_ms": total_mean, "total_mad_ms": mad(_clean(total)), "total_cv": _cv(total)}
    row |= {"total_gmean_ms": gmean, "total_low_ms": low, "total_high_ms": high, "repeat_cv": _repeat_cv(group.runs)}
    for stage in STAGES:
        row[f"{stage}_share"] = _over(means[stage], total_mean)
    row["residual_share"] = _over(_mean(group.column("residual_ms")), total_mean)
    for name in ("ms_per_token", "new_tokens", "prompt_tokens", "visual_tokens"):
        row[name] = _median(group.column(name))
    tokens = _clean(group.column("new_tokens"))
    row |= {"new_tokens_min": float(tokens.min()) if len(tokens) else None, "new_tokens_max": float(tokens.max()) if len(tokens) else None}
    row["decode_tokens_per_s"] = _over(1000.0, row["ms_per_token"])
    row["prefill_tokens_per_s"] = _over(1000.0, _median(group.column("prefill_ms") / group.column("prompt_tokens")))
    row["sample_ms"] = _mean(total / batch)
    per_second = _over(1000.0, row["sample_ms"])
    row |= {"samples_per_s": per_second, "samples_per_hour": _times(per_second, 3600), "samples_per_day": _times(per_second, 86400)}
    llm = _sum(means["prefill"], means["decode"])
    row |= {"llm_over_vision": _over(llm, means["encode"]), "bottleneck": _bottleneck(means)}
    row |= _extremes(group)
    mild, severe = tukey_outliers(_clean(total))
    row |= {"outliers_mild": mild, "outliers_severe": severe}
    row |= {"host_bound_share": _host_bound(group, STAGES[2:], busy), "clock_gap_share": _clock_gap(group, STAGES[2:])}
    peaks = [group.column(f"{stage}_peak_bytes") for stage in STAGES]
    most = _clean(np.concatenate(peaks))
    row["peak_bytes"] = float(most.max()) if len(most) else None
    for name in (
        "kv_bytes",
        "weights_bytes",
        "limit_ms",
        "share_of_limit",
        "power_w",
        "sm_clock_mhz",
        "temperature_c",
        "harness_ms",
    ):
        row[name] = _median(group.column(name))
    used = energies(group.typical)
    row |= {name: used[name] for name in ("energy_j", "decode_energy_j", "energy_n")}
    row["cpu_wait_share"] = cpu_wait_share(group.typical)
    row |= _slope(group, confidence) | first_call
    return row


def _cv(values: npt.NDArray[np.float64]) -> float | None:
    values = _clean(values)
    return float(values.std(ddof=1) / values.mean()) if len(values) > 1 and values.mean() else None


def _repeat_cv(runs: pl.DataFrame) -> float | None:
    """Median over samples of the coefficient of variation of total_ms over a sample's repeats: the noise of measuring."""
    per_sample = runs.group_by("sample").agg(pl.col("total_ms").std().alias("std"), pl.col("total_ms").mean().alias("mean"))
    value = (per_sample["std"] / per_sample["mean"]).drop_nulls().median()
    return float(value) if isinstance(value, (int, float)) else None


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _times(one: float | None, by: float) -> float | None:
    return None if one is None else one * by


def _sum(*values: float | None) -> float | None:
    return None if any(v is None for v in values) else math.fsum(v for v in values if v is not None)


def _bottleneck(means: dict[str, float | None]) -> str | None:
    there = {stage: ms for stage, ms in means.items() if ms is not None}
    return max(there, key=lambda stage: there[stage]) if there else None


def _extremes(group: Group) -> dict[str, Any]:
    """The fastest, the typical (lower median) and the slowest sample, each with its total."""
    order = group.typical.sort("total_ms", "sample").select("sample", "total_ms").rows()
    at = {"fastest": 0, "typical": (len(order) - 1) // 2, "slowest": len(order) - 1}
    named = {f"{name}_sample": order[i][0] if order else None for name, i in at.items()}
    return named | {f"{name}_ms": order[i][1] if order else None for name, i in at.items()}


def _host_bound(group: Group, stages: Iterable[str], busy: Mapping[str, float]) -> float | None:
    """Share of these stages' time in which the device had nothing to do: 1 - busy / host, over stages of which both are known."""
    host = worked = 0.0
    pace = _mean(group.column("ms_per_token"))
    for stage in stages:
        mean = _mean(group.column(f"{stage}_ms"))
        if mean is None or stage not in busy or (stage == "decode" and not pace):
            continue
        host += mean
        worked += mean * busy[stage] / pace if stage == "decode" and pace else busy[stage]
    return 1 - worked / host if host else None


def _clock_gap(group: Group, stages: Iterable[str]) -> float | None:
    """What the host's clock counted beyond the device's: sum(host - device) / sum(host) over stages that have both. Near 0."""
    host = gpu = 0.0
    for stage in stages:
        h, g = group.column(f"{stage}_ms"), group.column(f"{stage}_gpu_ms")
        both = np.isfinite(h) & np.isfinite(g)
        host += math.fsum(h[both])
        gpu += math.fsum(g[both])
    return (host - gpu) / host if gpu else None


def _slope(group: Group, confidence: float) -> dict[str, Any]:
    """decode_ms against steps (of the whole batch) over all accepted runs."""
    names = ("slope_ms_per_token", "slope_low", "slope_high", "intercept_ms", "intercept_low", "intercept_high")
    runs = group.runs.filter(pl.col("decode_ms").is_not_null() & pl.col("steps").is_not_null())
    steps = runs["steps"].cast(pl.Float64).to_numpy()
    if not len(runs):
        return dict.fromkeys(names)
    clusters, batches = [str(s) for s in runs["sequence"]], batches_of(runs)
    fit = fit_line(steps, runs["decode_ms"].to_numpy(), clusters, batches=batches, confidence=confidence)
    if fit is None:
        return dict.fromkeys(names)
    values = (fit.slope, fit.slope_low, fit.slope_high, fit.intercept, fit.intercept_low, fit.intercept_high)
    return dict(zip(names, values, strict=True))


def distribution_rows(group: Group, busy: Mapping[str, float], *, confidence: float, resamples: int) -> list[dict[str, Any]]:
    """A row for each stage, total and derived time: the long form, with quantiles and intervals. busy: as in `stage_row`."""
    rows = []
    total_mean, used = _mean(group.column("total_ms")), energies(group.typical)
    for name in (*(f"{s}_ms" for s in STAGES), "residual_ms", "total_ms", "no_load_ms", "ttft_ms", "ms_per_token"):
        values = group.column(name)
        clean = _clean(values)
        gmean, low, high = _interval(group, values, confidence, resamples) if name != "residual_ms" else (None, None, None)
        mild, severe = tukey_outliers(clean)
        stage = name.removesuffix("_ms")
        row = _identity(group) | _counts(group) | {"n": len(clean), "metric": stage, "median_ms": _median(values), "mean_ms": _mean(values)}
        row |= {f"p{round(100 * p)}_ms": quantile(clean, p) for p in (0.05, 0.9, 0.95, 0.99)}
        row |= {
            "mad_ms": mad(clean),
            "cv": _cv(values) if name != "residual_ms" else None,
            "gmean_ms": gmean,
            "low_ms": low,
            "high_ms": high,
        }
        row["share"] = None if name == "ms_per_token" else _over(_mean(values), total_mean)
        row["host_bound_share"] = _host_bound(group, [stage], busy) if stage in STAGES[2:] else None
        row["clock_gap_share"] = _clock_gap(group, [stage]) if stage in (*STAGES, "total") else None
        row["energy_j"] = used.get("energy_j" if stage == "total" else f"{stage}_energy_j")
        row["energy_n"] = used["energy_n"] if row["energy_j"] is not None else None
        row |= {"peak_bytes": _peak(group, stage), "outliers_mild": mild, "outliers_severe": severe}
        rows.append(row)
    return rows


def _peak(group: Group, stage: str) -> float | None:
    values = _clean(group.column(f"{stage}_peak_bytes")) if stage in STAGES else np.empty(0)
    return float(values.max()) if len(values) else None


def view_rows(group: Group) -> list[dict[str, Any]]:
    """The 3-, 4- and 5-stage views that older papers use: each a sum of our stages, sample by sample; none without a sample."""
    rows: list[dict[str, Any]] = []
    if group.typical.is_empty():
        return rows
    total_mean = _mean(group.column("total_ms"))
    for view, steps in VIEWS.items():
        for step, stages in steps.items():
            values = _sums(group, stages)
            row = {"view": f"{view} stages", "step": step, "median_ms": _median(values), "mean_ms": _mean(values)}
            rows.append(_identity(group) | _counts(group) | row | {"share": _over(_mean(values), total_mean)})
    return rows


def _sums(group: Group, stages: Sequence[str]) -> npt.NDArray[np.float64]:
    return np.sum([group.column(f"{stage}_ms") for stage in stages], axis=0)
