"""What a job's rows, taken together, say about its own validity. Rules and bounds; documented in docs/methodology.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from stagebench.rows import Code, Status
from stagebench.stages import CLOSURE_MS

__all__ = [
    "Finding",
    "accepted",
    "check_clocks",
    "check_drift",
    "check_first",
    "check_harness",
    "check_outputs",
    "check_plain",
    "mark_accepted",
]

Row = dict[str, Any]

PLAIN_SHARE = 0.02
CLOCK_SHARE = 0.9
FIRST_IQR = 3.0
FIRST_SHARE = 0.2
DRIFT_Z = 3.3
DRIFT_SHARE = 0.03
OUTPUT_P = 1e-3
HARNESS_SHARE = 0.01
MIN_SAMPLES = 8
"""Fewer samples than this show neither an outlier nor a drift."""


@dataclass(frozen=True)
class Finding:
    """A code for the whole job, with the figures behind it and what to do."""

    code: Code
    text: str


def accepted(row: Mapping[str, Any]) -> bool:
    """Whether a row may enter a mean: it ended as it should, and no code discards it."""
    ended = row["status"] == Status.OK or (row["status"] == Status.CAPPED and row["length"] != "natural")
    return ended and not any(Code(code).discards for code in row["codes"])


def mark_accepted(rows: Sequence[Row]) -> list[Finding]:
    """INVALID_NO_ACCEPTED when no row is left for means. Capped rows count as measured: only their natural length is unknown."""
    usable = [r for r in rows if accepted(r) or (r["status"] == Status.CAPPED and not any(Code(c).discards for c in r["codes"]))]
    if usable or not rows:
        return []
    counts = {status: sum(r["status"] == status for r in rows) for status in sorted({r["status"] for r in rows})}
    first = next((r["reason"] for r in rows if r["reason"]), "no reason noted")
    return [Finding(Code.INVALID_NO_ACCEPTED, f"none of {len(rows)} rows is usable: {counts}. The first says: {first}")]


def check_plain(rows: Sequence[Row]) -> list[Finding]:
    """INVALID_PLAIN_DIFFERS when instrumentation costs more than 2 % + 0.2 ms beyond what noise explains.

    Two readings must agree on it: the median of paired differences less three standard errors, and the fastest runs of each
    sample. One disturbed run moves the first, never the second. The rows of a batch are one run, and so one pair.
    """
    runs = {(r["job"], r["order"], r["length"], r["repeat"]): r for r in rows if r["plain_total_ms"] and r["total_ms"]}
    pairs = [(run["total_ms"], run["plain_total_ms"]) for run in runs.values()]
    if len(pairs) < 3:
        return []
    plain = np.array([p for _, p in pairs])
    relative = np.array([t for t, _ in pairs]) / plain - 1
    middle = float(np.median(relative))
    spread = 1.4826 * float(np.median(np.abs(relative - middle)))
    bound = PLAIN_SHARE + CLOSURE_MS / float(np.median(plain))
    error = 1.2533 * spread / len(pairs) ** 0.5
    best: dict[tuple[int, str], tuple[float, float]] = {}
    for (_, order, length, _), run in runs.items():
        was = best.get((order, length), (float("inf"), float("inf")))
        best[order, length] = (min(was[0], run["total_ms"]), min(was[1], run["plain_total_ms"]))
    fastest = statistics.median(t / p - 1 for t, p in best.values())
    if abs(middle) - 3 * error <= bound or abs(fastest) <= bound or (middle > 0) != (fastest > 0):
        return []
    text = f"instrumentation moves totals by {middle:+.1%} (fastest runs {fastest:+.1%}) in {len(pairs)} pairs, {bound:.1%} allowed"
    return [Finding(Code.INVALID_PLAIN_DIFFERS, text)]


def check_harness(rows: Sequence[Row]) -> list[Finding]:
    """WARN_HARNESS when the null workload's total is over 1 % of the rows' median total."""
    costs = [r["harness_ms"] for r in rows if r["harness_ms"] and r["total_ms"]]
    if not costs:
        return []
    cost, usual = statistics.median(costs), statistics.median(r["total_ms"] for r in rows if r["total_ms"])
    if cost <= HARNESS_SHARE * usual:
        return []
    return [Finding(Code.WARN_HARNESS, f"the harness costs {cost:.3g} ms of a typical {usual:.3g} ms, {HARNESS_SHARE:.0%} allowed")]


def check_outputs(rows: Sequence[Row]) -> list[Finding]:
    """INVALID_PLAIN_DIFFERS when features or tokens change with instrumentation.

    Where runs of one sample repeat bit by bit, any difference between an instrumented and a plain run is a fault. In bfloat16 a GPU's
    matrix-vector products sum in no fixed order, and greedy tokens differ from run to run, instrumented or not; then the share of
    instrumented-plain pairs that differ must not exceed that of instrumented-instrumented pairs (Fisher's exact test, p < 0.001).
    """
    findings = []
    for what, ours, plain in (("features", "feature_hash", "plain_feature_hash"), ("tokens", "token_ids", "plain_token_ids")):
        within, across = _pairs(rows, ours, plain)
        if not across or not any(across):
            continue
        exact = not any(within) and (what == "features" or all(row["dtype"] in (None, "float32") for row in rows))
        if exact or _fisher(sum(across), len(across), sum(within), len(within)) < OUTPUT_P:
            counts = (
                f"{sum(across)} of {len(across)} pairs of a run with and one without instrumentation, {sum(within)} of {len(within)} with"
            )
            findings.append(Finding(Code.INVALID_PLAIN_DIFFERS, f"{what} differ in {counts}"))
    return findings


def _pairs(rows: Sequence[Row], ours: str, plain: str) -> tuple[list[bool], list[bool]]:
    """Whether outputs differ: between instrumented runs of a sample, and between instrumented and plain ones; paired samples only."""
    runs: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {}
    for row in rows:
        if row[ours] is not None:
            found = runs.setdefault((row["sample"], row["length"]), ([], []))
            found[0].append(row[ours])
            if row[plain] is not None:
                found[1].append(row[plain])
    paired = [found for found in runs.values() if found[1]]
    within = [a != b for instrumented, _ in paired for a, b in combinations(instrumented, 2)]
    across = [a != b for instrumented, bare in paired for a in instrumented for b in bare]
    return within, across


def _fisher(k: int, n: int, other_k: int, other_n: int) -> float:
    """Probability that k of n and not fewer are among those that differ, when all n + other_n pairs are alike."""
    differ, total = k + other_k, n + other_n
    return sum(comb(differ, i) * comb(total - differ, n - i) for i in range(k, min(n, differ) + 1)) / comb(total, n)


def check_first(rows: Sequence[Row]) -> list[Finding]:
    """WARN_FIRST_SLOW on the first measured sample when it is an outlier (Tukey, 3 IQR) and 20 % above the median."""
    for name, value in _METRICS.items():
        points = _by_order(rows, value)
        if len(points) < MIN_SAMPLES:
            continue
        first, rest = points[0][1], np.array([v for _, v in points[1:]])
        q1, middle, q3 = np.quantile(rest, [0.25, 0.5, 0.75])
        if first > q3 + FIRST_IQR * (q3 - q1) and first > middle * (1 + FIRST_SHARE):
            for row in rows:
                if row["order"] == points[0][0]:
                    row["codes"] = sorted({*row["codes"], Code.WARN_FIRST_SLOW.value})
            text = f"{name} of the first measured sample is {first:.3g} ms, the others' median {middle:.3g} ms. Raise timing.warmup."
            return [Finding(Code.WARN_FIRST_SLOW, text)]
    return []


def check_drift(rows: Sequence[Row]) -> list[Finding]:
    """WARN_DRIFT when times rise or fall with the order of samples: Spearman's rank correlation beyond chance (|z| > 3.3, p < 0.001)
    and a Theil-Sen line that changes by more than 3 % of the median over the job."""
    for name, value in _METRICS.items():
        points = _by_order(rows, value)
        if len(points) < MIN_SAMPLES:
            continue
        order, times = np.array(points, dtype=float).T
        z = _spearman(order, times) * (len(points) - 1) ** 0.5
        change = _theil_sen(order, times) * (order[-1] - order[0]) / float(np.median(times))
        # the largest |z| that n points can show is sqrt(n - 1)
        if abs(z) > min(DRIFT_Z, 0.95 * (len(points) - 1) ** 0.5) and abs(change) > DRIFT_SHARE:
            text = f"{name} changes by {change:+.1%} from the first to the last sample (z = {z:.1f}). Look for heat, neighbours or a leak."
            return [Finding(Code.WARN_DRIFT, text)]
    return []


def check_clocks(rows: Sequence[Row]) -> list[Finding]:
    """DISCARDED_CLOCK on rows whose SM clock at the border was below 90 % of the job's median."""
    clocks = [r["sm_clock_mhz"] for r in rows if r["sm_clock_mhz"] and r["total_ms"]]
    if len(clocks) < 3:
        return []
    usual = statistics.median(clocks)
    slow = [r for r in rows if r["sm_clock_mhz"] and r["total_ms"] and r["sm_clock_mhz"] < CLOCK_SHARE * usual]
    for row in slow:
        row["codes"] = sorted({*row["codes"], Code.DISCARDED_CLOCK.value})
        row["reason"] = row["reason"] or f"SM clock {row['sm_clock_mhz']:.0f} MHz, {usual:.0f} MHz usual in this job"
    if not slow:
        return []
    return [Finding(Code.DISCARDED_CLOCK, f"{len(slow)} of {len(clocks)} runs had an SM clock below {CLOCK_SHARE:.0%} of {usual:.0f} MHz")]


def _fixed_cost(row: Mapping[str, Any]) -> float | None:
    """Encode + prefill: the same work for every sample of a model, however long its clip or its answer."""
    return None if row["encode_ms"] is None or row["prefill_ms"] is None else row["encode_ms"] + row["prefill_ms"]


def _per_token(row: Mapping[str, Any]) -> float | None:
    return row["decode_ms"] / row["steps"] if row["decode_ms"] and row["steps"] else None


_METRICS: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {"encode + prefill": _fixed_cost, "ms per token": _per_token}


def _by_order(rows: Sequence[Row], value: Callable[[Mapping[str, Any]], float | None]) -> list[tuple[int, float]]:
    """(order, the median over the sample's runs), sorted by order; runs that ended badly left out."""
    found: dict[int, list[float]] = {}
    for row in rows:
        v = value(row)
        if v is not None and row["order"] is not None and row["status"] in (Status.OK, Status.CAPPED):
            found.setdefault(row["order"], []).append(v)
    return [(order, statistics.median(values)) for order, values in sorted(found.items())]


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    rank = np.argsort(np.argsort(y)).astype(float)
    if rank.std() == 0 or x.std() == 0:
        return 0.0
    return float(np.corrcoef(np.argsort(np.argsort(x)), rank)[0, 1])


def _theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    """Median of all pairs' slopes."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))
