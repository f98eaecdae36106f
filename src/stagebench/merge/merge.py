"""Timing rows -> merged rows, tables, summary.json and the old system's results file.

    merge(plan, results)    results/timings.parquet
                            results/tables/{stages,comparison,load,optimisations,failures,...}.{csv,md,tex,parquet}
                            results/summary.json, results/legacy_results.json and its dated copy

Deterministic: equal rows give equal bytes, whatever the order in which jobs and rows are met.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stagebench.errors import MergeError
from stagebench.files import whole_file
from stagebench.merge.analysis import distribution_rows, stage_row, view_rows
from stagebench.merge.axis import axis_rows
from stagebench.merge.comparison import (
    acceptance_rows,
    comparison_rows,
    decomposition_rows,
    load_rows,
    model_pairs,
    optimisation_rows,
)
from stagebench.merge.gather import Gathered, PlanLike, gather
from stagebench.merge.groups import Group, groups
from stagebench.merge.layout import COLUMNS, NOTES, TITLES, layout
from stagebench.merge.legacy import legacy_entries, write_legacy
from stagebench.merge.order import in_order, variants_in_order
from stagebench.merge.summary import build_summary, write_summary
from stagebench.merge.validity import Finding, StudyVerdict, failure_rows, judge, read_verifications
from stagebench.rows import Code
from stagebench.tables import Table, build_table, write_table

__all__ = ["MergeReport", "merge"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote."""

    verdict: StudyVerdict
    rows: int
    tables: dict[str, Table]
    files: dict[str, Path]
    """Name below the results folder -> path."""


def merge(plan: PlanLike, results: Path) -> MergeReport:
    """Merge exactly the plan's timing files below `results` and write all results there.

    Raises MergeError when files are missing, unreadable or of different studies (see `gather`), and when no run was timed at all: there
    is no table of zeros. An INVALID study is written all the same, with its reasons on top of everything.
    """
    results = Path(results)
    config = plan.config
    timings = results / "timings.parquet"
    with whole_file(timings, MergeError) as staged:  # a merge that is refused leaves the rows that the earlier tables are of
        gathered = gather(plan, results, staged)
        found = in_order(groups(staged), config)
        if not any(group.n for group in found):
            failures = failure_rows(staged, found)
            why = failures[0] if failures else {"status": "no row", "reason": "", "codes": ""}
            cause = (why["reason"] or why["codes"] or "").rstrip(".")
            raise MergeError(
                f"{results}: all {gathered.rows} runs failed or were discarded; the first: {why.get('sample')}: "
                + f"{why['status']} {cause}".rstrip()
                + ". No table is written. Read the timing logs and run the jobs again."
            )
    verifications, findings = read_verifications(results, plan.verify_paths)
    findings += [Finding(code.value, "jobs", 1, text) for code, text in gathered.warnings]
    findings += _job_findings(gathered)
    verdict = judge(timings, found, config, findings)
    header = verdict.lines()
    random = [name for name, model in config.models.items() if model.weights.startswith("dummy:")]
    if random:
        header.append(f"Random weights: {', '.join(random)}. Latency of the shape is real, what is said is not.")
    if not config.timing.exclusive:
        header.append(f"Jobs may have run side by side (timing.exclusive: false, {Code.WARN_SIDE_BY_SIDE.value}).")
    tokenizers = _tokenizers(gathered)
    tables = _tables(found, plan, gathered, timings, tokenizers)
    files: dict[str, Path] = {"timings.parquet": timings}
    for table in tables.values():
        for suffix, path in write_table(table, results / "tables", header, verdict.word).items():
            files[f"tables/{table.name}.{suffix}"] = path
    datasets = sorted({file.dataset for file in gathered.files})
    entries = {d: legacy_entries(found, d, timings, config, gathered.files, tokenizers, _splits(plan, d)) for d in datasets}
    for path in write_legacy(results, entries, gathered.files):
        files[path.name] = path
    write_summary(results / "summary.json", build_summary(config, gathered, verdict, verifications, tables, files, results))
    files["summary.json"] = results / "summary.json"
    log.info("merged %d rows of %d jobs: %s", gathered.rows, len(gathered.files), verdict.word)
    return MergeReport(verdict, gathered.rows, tables, files)


def _tables(
    found: Sequence[Group], plan: PlanLike, gathered: Gathered, timings: Path, tokenizers: Mapping[str, str | None]
) -> dict[str, Table]:
    config = plan.config
    confidence, resamples = config.compare.confidence, config.compare.resamples
    pairs = list(model_pairs(found, config))
    rows: dict[str, list[dict[str, Any]]] = {
        "stages": [stage_row(g, _first_call(gathered, g), _busy(gathered, g), confidence=confidence, resamples=resamples) for g in found],
        "comparison": comparison_rows(pairs, config),
        "axis": axis_rows(found, config),
        "load": load_rows(found),
        "optimisations": optimisation_rows(found, variants_in_order(found, config), config, _quality(gathered)),
        "failures": failure_rows(timings, found),
        "distribution": [
            row for g in found for row in distribution_rows(g, _busy(gathered, g), confidence=confidence, resamples=resamples)
        ],
        "views": [row for g in found for row in view_rows(g)],
        "decomposition": decomposition_rows(pairs),
        "acceptance": acceptance_rows(pairs, timings, tokenizers),
    }
    machines, datasets = list(dict.fromkeys(g.machine for g in found)), list(dict.fromkeys(g.dataset for g in found))
    shown = {name: layout(name, config, several_machines=len(machines) > 1, several_datasets=len(datasets) > 1) for name in rows}
    where = f"Dataset: {', '.join(datasets)}. Machine: {', '.join(machines)}."
    return {name: build_table(name, TITLES[name], data, COLUMNS[name], shown[name], (*NOTES[name], where)) for name, data in rows.items()}


def _first_call(gathered: Gathered, group: Group) -> dict[str, Any]:
    """First-call and warm-up figures of a group's jobs (medians over jobs), and which share of their time was measuring. Times in ms."""
    mine = [f.job for f in gathered.files if (f.machine_label, f.dataset, f.model, f.variant) == group.key[:4]]
    totals, encodes = [], []
    for job in mine:
        call = job.get("first_call")
        if not isinstance(call, Mapping):
            continue
        stages = call.get("stages_ms") or {}
        if isinstance(call.get("total_ms"), (int, float)):
            totals.append(float(call["total_ms"]))
        if isinstance(stages.get("encode"), (int, float)):
            encodes.append(float(stages["encode"]))
    costs = [cost for job in mine if isinstance(cost := job.get("cost"), Mapping) and cost.get("wall_s")]
    warmup = [len(job["warmup"]) for job in mine if isinstance(job.get("warmup"), list)]
    return {
        "first_call_ms": float(np.median(totals)) if totals else None,
        "first_call_encode_ms": float(np.median(encodes)) if encodes else None,
        "warmup": max(warmup, default=None),
        "jobs": len(mine),
        "measured_share": sum(float(c["samples_s"]) for c in costs) / sum(float(c["wall_s"]) for c in costs) if costs else None,
    }


def _busy(gathered: Gathered, group: Group) -> dict[str, float]:
    """Stage -> milliseconds in which the device worked, means over the group's jobs; decode a token. Empty where no job was profiled."""
    seen: dict[str, list[float]] = {}
    for file in gathered.files:
        found = file.job.get("device_busy")
        if (file.machine_label, file.dataset, file.model, file.variant) != group.key[:4] or not isinstance(found, Mapping):
            continue
        stages = found.get("stage_ms")
        named = {**(stages if isinstance(stages, Mapping) else {}), "decode": found.get("decode_ms_per_token")}
        for stage, ms in named.items():
            if isinstance(ms, (int, float)) and not isinstance(ms, bool):
                seen.setdefault(str(stage), []).append(float(ms))
    return {stage: float(np.mean(values)) for stage, values in seen.items()}


def _quality(gathered: Gathered) -> dict[tuple[str, str, str, str], dict[str, float | None]]:
    """What jobs found of their variant's quality, by (machine, dataset, model, variant): means weighted by positions, largest of maxima."""
    jobs: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for file in gathered.files:
        found = file.job.get("quality")
        if isinstance(found, Mapping) and found.get("positions"):
            jobs.setdefault((file.machine_label, file.dataset, file.model, file.variant), []).append(found)
    merged: dict[tuple[str, str, str, str], dict[str, float | None]] = {}
    for key, mine in jobs.items():
        weights = [float(found["positions"]) for found in mine]
        mean: dict[str, float | None] = {
            name: float(np.average([float(found[name]) for found in mine], weights=weights))
            for name in ("agreement", "mean_kl", "pixel_changed_share")
        }
        merged[key] = mean | {name: max(float(found[name]) for found in mine) for name in ("max_kl", "pixel_max_abs")}
    return merged


def _job_findings(gathered: Gathered) -> list[Finding]:
    """What jobs found as a whole."""
    return [
        Finding(str(found["code"]), f"{file.dataset}/{file.model}/{file.variant}", 1, f"job {file.block}: {found.get('text', '')}")
        for file in gathered.files
        for found in file.job.get("findings") or ()
        if isinstance(found, Mapping) and found.get("code")
    ]


def _tokenizers(gathered: Gathered) -> dict[str, str | None]:
    """Model -> tokenizer digest, where all its jobs say the same one."""
    found: dict[str, set[str]] = {}
    for file in gathered.files:
        model = file.study.get("model")
        digest = model.get("tokenizer") if isinstance(model, Mapping) else None
        found.setdefault(file.model, set()).add(str(digest) if digest else "")
    return {model: next(iter(digests)) or None if len(digests) == 1 else None for model, digests in found.items()}


def _splits(plan: PlanLike, dataset: str) -> dict[str, str]:
    """Sample key -> split, where the plan knows its samples."""
    known = getattr(plan, "datasets", None)
    samples = known[dataset].samples if isinstance(known, Mapping) and dataset in known else ()
    return {s.key: s.split for s in samples}
