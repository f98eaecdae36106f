"""Merged rows -> one value a sample, and each group's figures.

A *group* is one machine, dataset, model, variant and pool. A *pool* is a length mode; natural runs that met their cap are a pool of
their own, "natural (capped)", so that they are shown and yet stay out of natural-length figures. A sample's value is its *typical
run*: the repeat with the median total (the lower of the two middle ones). All its stages come from that one run, so that they add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from stagebench.merge.conditions import cpu_wait_share, energies
from stagebench.rows import Code, Status
from stagebench.stages import STAGES, VIEWS
from stagebench.stats import cluster_interval, fit_line, mad, quantile, tukey_outliers

__all__ = [
    "CAPPED_POOL",
    "GROUP",
    "METRICS",
    "Group",
    "batches_of",
    "distribution_rows",
    "groups",
    "stage_row",
    "view_rows",
]

GROUP = ("machine", "dataset", "model", "variant", "length")
CAPPED_POOL = "natural (capped)"

METRICS = ("total_ms", "no_load_ms", "ttft_ms", *(f"{s}_ms" for s in STAGES), "ms_per_token", "new_tokens")
"""What models are compared by. `no_load_ms` is total without load."""

SETTINGS = (
    *("engine", "quantization", "batch", "frames", "input", "source", "dtype", "attention", "keep_visual", "preprocess"),
    *("preset", "weights"),
)
_DISCARDING = [code.value for code in Code if code.discards]
_UNUSED = (
    *("token_ids", "token_ms", "text", "feature_hash", "query", "reason", "plain_total_ms", "plain_token_ids", "plain_feature_hash"),
    *("id", "clip", "clip_digest", "study", "block", "finish_reason"),
)
"""Columns that no figure of a group is made from; text, tokens and pixels' hashes are most of a file."""
_OF_A_RUN = (
    *("sample", "sequence", "repeat", "order", "load_ms", "decode_ms", "total_ms", "new_tokens", "steps", "drafted_tokens"),
    *("accepted_tokens", "sm_clock_mhz", "temperature_c", "power_w", "batch_of"),
)
"""What is kept of runs that are not their sample's typical one."""


@dataclass(frozen=True)
class Group:
    """One group's accepted samples, and how many were not accepted."""

    machine: str
    dataset: str
    model: str
    variant: str
    length: str
    settings: dict[str, Any]
    typical: pl.DataFrame
    """One row a sample: its typical run; sorted by sample."""
    runs: pl.DataFrame
    """All accepted runs of the pool, sorted by sample and repeat, with the columns of `_OF_A_RUN`."""
    samples: int
    failed: int
    """Samples without a timed run, for a status other than ok and capped."""
    discarded: int
    """Samples of which every timed run was discarded (suspect, throttled, invalid)."""
    capped: int
    """Samples that met the cap and so stand in the other pool; 0 in that pool itself."""
    discarded_runs: int
    failed_runs: int

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.machine, self.dataset, self.model, self.variant, self.length

    @property
    def n(self) -> int:
        return len(self.typical)

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """[n] float64 of the typical runs, NaN where null."""
        return self.typical[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()

    @property
    def sequences(self) -> list[str]:
        return [str(s) for s in self.typical["sequence"].fill_null("")]

    @property
    def batches(self) -> list[list[str]]:
        """Of the typical runs, as `stats` takes it."""
        return batches_of(self.typical)


def groups(timings: Path | pl.LazyFrame) -> list[Group]:
    """All groups of a merged file or of its rows, in sorted order. Read one after the other: no more than one is held whole."""
    frame = pl.scan_parquet(timings) if isinstance(timings, Path) else timings
    keys = frame.select(GROUP).unique().sort(GROUP).collect()
    return [group for key in keys.rows() for group in _group(frame, key)]


def _group(frame: pl.LazyFrame, key: Sequence[Any]) -> list[Group]:
    """The group, and the pool of its capped runs where it has some."""
    wanted = [name for name in frame.collect_schema().names() if name not in _UNUSED]
    here = [pl.col(name).eq_missing(pl.lit(value, pl.String)) for name, value in zip(GROUP, key, strict=True)]
    rows = (
        frame.filter(here)
        .select(wanted)
        .with_columns(
            (pl.col("codes").list.set_intersection(pl.lit(_DISCARDING, dtype=pl.List(pl.String))).list.len().fill_null(0) > 0).alias(
                "_discard"
            ),
            (pl.col("status").is_in([Status.OK.value, Status.CAPPED.value]) & pl.col("total_ms").is_not_null()).alias("_timed"),
            ((pl.col("status") == Status.CAPPED.value) & (pl.col("length") == "natural")).alias("_capped"),
            (pl.col("total_ms") - pl.col("load_ms").fill_null(0)).alias("no_load_ms"),
            (pl.col("total_ms") / pl.col("batch").fill_null(1).clip(1)).alias("sample_ms"),
            _batch_of(wanted).alias("batch_of"),
        )
        .drop("codes", "job", strict=False)
        .sort("sample", "repeat")
        .collect()
    )
    settings = {name: rows[name][0] for name in SETTINGS}
    # the same in each row; batch and frames are read as columns too
    rows = rows.drop(*GROUP, *(name for name in SETTINGS if not rows.schema[name].is_numeric()))
    plain = rows.filter("accepted")
    capped = rows.filter(pl.col("_capped") & pl.col("_timed") & ~pl.col("_discard"))
    timed = set(rows.filter("_timed")["sample"])
    good, over = set(plain["sample"]), set(capped["sample"])
    machine, dataset, model, variant, length = map(str, key)
    group = Group(
        machine,
        dataset,
        model,
        variant,
        length,
        settings,
        _typical(plain),
        plain.select(_OF_A_RUN),
        samples=rows["sample"].n_unique(),
        failed=rows["sample"].n_unique() - len(timed),
        discarded=len(timed - good - over),
        capped=len(over - good),
        discarded_runs=int((rows["_discard"] & rows["_timed"]).sum()),
        failed_runs=int((~rows["_timed"]).sum()),
    )
    if not len(capped):
        return [group]
    # failed and discarded samples stand with the natural pool, and samples that ended by themselves are none of this one's
    own = {"samples": len(over), "failed": 0, "discarded": 0, "capped": 0, "discarded_runs": 0, "failed_runs": 0}
    typical, runs = _typical(capped), capped.select(_OF_A_RUN)
    return [group, replace(group, length=CAPPED_POOL, typical=typical, runs=runs, **own)]  # type: ignore[arg-type]


def _batch_of(columns: Sequence[str]) -> pl.Expr:
    """Name of the batch that a row was measured in: its job and its place in the job's order; null for a sample measured by itself."""
    where = [pl.col(name).cast(pl.String).fill_null("") for name in ("job", "order") if name in columns]
    return pl.when(pl.col("batch") > 1).then(pl.concat_str(where, separator="/"))


def batches_of(*sides: pl.DataFrame) -> list[list[str]]:
    """For each side, rows of the same samples, that was measured in batches: which batch each is of. See stats/clustering.py."""
    return [side["batch_of"].fill_null("").to_list() for side in sides if side["batch_of"].null_count() < len(side)]


def _typical(runs: pl.DataFrame) -> pl.DataFrame:
    rank = pl.int_range(pl.len()).over("sample")
    middle = ((pl.len() - 1) // 2).over("sample")
    return runs.sort("sample", "total_ms", "repeat").filter(rank == middle)


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
    return float(values.std(ddof=1) / values.mean()) if len(values) > 1 else None


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
