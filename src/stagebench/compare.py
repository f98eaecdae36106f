"""Two results folders side by side: before and after a change, or two machines.

Samples that both have are paired by dataset, model, settings, length and sample key; the ratio is B over A, below 1 when B is faster.
The exit code is for CI: 1 when any total is SLOWER and its whole interval lies beyond 1 + threshold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.config import Config
from stagebench.errors import MergeError, StagebenchError
from stagebench.files import bounded_text
from stagebench.merge.comparison import paired, ratio_row
from stagebench.merge.gather import MERGED_SCHEMA, difference
from stagebench.merge.groups import SETTINGS, Group, groups
from stagebench.merge.order import in_order
from stagebench.stats import withheld

__all__ = ["Outcome", "compare_results", "exit_code"]

METRICS = ("total_ms", "no_load_ms", "load_ms", "encode_ms", "prefill_ms", "decode_ms", "ms_per_token", "new_tokens")
MAX_SUMMARY_BYTES = 256 << 20
_KEY = ("dataset", "model", "length")


@dataclass(frozen=True)
class Outcome:
    """What a comparison of two folders says."""

    rows: list[dict[str, Any]]
    """One a group of B and metric: machine (B's), dataset, model, length, variant, metric, n, medians, ratio, low, high, verdict."""
    differences: list[str]
    """Lines of the fingerprints that differ: `machine...`, `study...`, `config...`."""
    notes: list[str]
    """Groups that only one folder has, verdicts that are not VALID, words withheld because a side waited for a CPU."""
    text: str
    exit_code: int


def compare_results(a: Path, b: Path, *, threshold: float = 0.05) -> Outcome:
    """Compare two merged studies. Raises MergeError when a folder is not one, or when they share no sample."""
    summaries, found = [], []
    for folder in (Path(a), Path(b)):
        summaries.append(_summary(folder))
        found.append(_groups(folder))
    config = Config.model_validate(summaries[1]["config"])
    index: dict[tuple[Any, ...], dict[str, Group]] = {}
    for group in found[0]:
        if group.n:
            index.setdefault(_key(group), {})[group.machine] = group
    notes = [
        f"{f}: {s['verdict']} ({', '.join(sorted({r['code'] for r in s['reasons']}))})"
        for f, s in zip((a, b), summaries, strict=True)
        if s["reasons"]
    ]
    rows: list[dict[str, Any]] = []
    matched = set()
    for group in in_order(found[1], config):
        known = index.get(_key(group), {})
        if not known or not group.n:
            if group.n:
                notes.append(f"only in {b}: {_name(group)}")
            continue
        other = known.get(group.machine) or (next(iter(known.values())) if len(known) == 1 else None)
        if other is None:
            notes.append(f"not compared: {_name(group)}: {b} has it of {group.machine}, {a} of {', '.join(sorted(known))}")
            continue
        matched.add((_key(group), other.machine))
        pair = paired(group, other)
        if not pair.n:
            notes.append(f"no common sample: {_name(group)}")
            continue
        identity = {"machine": group.machine, "dataset": group.dataset, "model": group.model, "variant": group.variant}
        identity |= {"length": group.length}
        own = [identity | ratio_row(pair, metric, config) for metric in METRICS]
        rows += own
        if unclear := [row["metric"] for row in own if withheld(row["verdict"], row["low"], row["high"], config.compare.same_within)]:
            notes.append(
                f"word withheld: {_name(group)}: a side waited for a CPU for {own[0]['cpu_wait_share']:.0%} of its time, so "
                f"{', '.join(unclear)} can have no clear word. Time it again on a quiet machine."
            )
    notes += [
        f"only in {a}: {_name(group)}{f' on {machine}' if len(known) > 1 else ''}"
        for key, known in index.items()
        for machine, group in known.items()
        if (key, machine) not in matched
    ]
    if not rows:
        raise MergeError(
            f"{a} and {b} share no accepted sample of one model, settings and length: there is nothing to compare.\n" + "\n".join(notes)
        )
    changed = _differences(*summaries)
    code = exit_code(rows, threshold)
    return Outcome(rows, changed, notes, _text(a, b, rows, changed, notes, threshold, code), code)


def exit_code(rows: Sequence[Mapping[str, Any]], threshold: float) -> int:
    """1 when a total is SLOWER and the low end of its interval lies above 1 + threshold, else 0. Noise alone never fails a build."""
    return int(any(r["metric"] == "total" and r["verdict"] == "SLOWER" and r["low"] is not None and r["low"] > 1 + threshold for r in rows))


def _groups(folder: Path) -> list[Group]:
    """The groups of a folder that may be a stranger's: read by Arrow under our own schema, for polars panics at some forged files."""
    path = folder / "timings.parquet"
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
        known = pa.schema([column for column in MERGED_SCHEMA if column.name in table.column_names])  # an older study may have fewer
        table = table.select(known.names).cast(known)
        table.validate(full=True)  # polars takes offsets and UTF-8 on trust
        return groups(pl.DataFrame(table).lazy())
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, pl.exceptions.PolarsError) as error:  # TypeError: a column less
        raise MergeError(f"{path}: cannot be read ({error}). Merge the study again.") from error


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        summary = json.loads(bounded_text(path, MAX_SUMMARY_BYTES))
        Config.model_validate(summary["config"])
        for key in ("machines", "studies", "verdict", "reasons"):
            summary[key]
    except FileNotFoundError:
        raise MergeError(f"{path}: no such file. Give the folder of a merged study, as results/<study>.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, StagebenchError) as error:
        raise MergeError(
            f"{path}: not a merged study ({type(error).__name__}: {error}). Give the folder that holds summary.json."
        ) from error
    return dict(summary)


def _key(group: Group) -> tuple[Any, ...]:
    """What must agree for two groups to be the same measurement. The machine is what may differ."""
    return (*(getattr(group, name) for name in _KEY), *(group.settings[name] for name in SETTINGS))


def _name(group: Group) -> str:
    return f"{group.dataset}/{group.model}/{group.variant} at length {group.length}"


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    machines = [list(s["machines"].values()) for s in (one, other)]
    lines = []
    if all(len(m) == 1 for m in machines):
        lines += [
            line
            for line in difference(machines[0][0], machines[1][0], "machine")
            if not line.startswith(("machine.digest:", "machine.host"))
        ]
    else:
        lines += difference(sorted(one["machines"]), sorted(other["machines"]), "machines")
    for name in sorted({*one["studies"], *other["studies"]}):
        if name in one["studies"] and name in other["studies"]:
            lines += difference(one["studies"][name], other["studies"][name], f"study[{name}]")
    return lines + [line for line in difference(one["config"], other["config"], "config") if not line.startswith("config.study:")]


def _text(
    a: Path, b: Path, rows: Sequence[Mapping[str, Any]], changed: Sequence[str], notes: Sequence[str], threshold: float, code: int
) -> str:
    several = tuple(name for name in ("machine", "variant") if len({r[name] for r in rows}) > 1)
    header = (*several, "dataset", "model", "length", "metric", "n", "A", "B", "B / A", "interval", "verdict")
    body = []
    for r in rows:
        interval = "–" if r["low"] is None else f"{_number(r['low'])} to {_number(r['high'])}"
        figures = (_number(r["reference_median"]), _number(r["median"]), _number(r["ratio"]), interval, r["verdict"])
        body.append((*(r[name] for name in several), r["dataset"], r["model"], r["length"], r["metric"], str(r["n"]), *figures))
    widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
    lines = [f"A: {a}", f"B: {b}", ""]
    lines += ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in (header, *body)]
    lines += ["", "Fingerprints differ:" if changed else "Fingerprints agree.", *(f"  {line}" for line in changed)]
    lines += ["", *notes] if notes else []
    lines += ["", f"{'SLOWER' if code else 'Nothing SLOWER'} by more than {threshold:.0%} with its whole interval: exit code {code}."]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    """Four significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return "0" if value == 0 else f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
