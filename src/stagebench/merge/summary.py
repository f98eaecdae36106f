"""summary.json: what a program reads of a study. Its schema is config/schemas/summary.schema.yaml."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stagebench.config import Config
from stagebench.errors import MergeError
from stagebench.files import whole_file
from stagebench.merge.gather import Gathered
from stagebench.merge.validity import StudyVerdict
from stagebench.rows import FORMAT_VERSION
from stagebench.tables import Table, round_value

__all__ = ["bottleneck_sentences", "build_summary", "clean", "sha256", "write_summary"]


def clean(value: Any) -> Any:
    """JSON without NaN or infinity (they become null); floats by the tables' rounding rule."""
    if isinstance(value, float):
        return round_value(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return value


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bottleneck_sentences(stages: Table, optimisations: Table) -> list[dict[str, str]]:
    """A sentence for each group: which stage takes most, and what measured variants did about it. Nothing that was not measured."""
    sentences = []
    variants = optimisations.frame.to_dicts()
    for row in stages.frame.to_dicts():
        stage = row["bottleneck"]
        if stage is None or row[f"{stage}_share"] is None:
            continue
        text = f"{row['model']} at length {row['length']}: {stage} takes {100 * row[f'{stage}_share']:.1f} % of the total"
        if row["host_bound_share"] is not None:
            text += f"; {100 * row['host_bound_share']:.1f} % of the device stages' time is host-bound"
        group = ("machine", "dataset", "model", "length")
        tried = [
            v
            for v in variants
            if v["ratio"] is not None and all(v[k] == row[k] for k in group) and v["reference_variant"] == row["variant"]
        ]
        if tried:
            # of total / batch, which is the ratio itself where the batch stays: a larger batch takes longer, for more samples
            best = min(tried, key=lambda v: v["sample_ratio"])
            batched = "batch: " in best["changed"]
            figure = f" of total / batch: {best['sample_ratio']:.4g}" if batched else f": {best['ratio']:.4g}, {best['verdict']}"
            named = f"{best['variant']} ({best['changed']})"
            only = f". The one other measured variant, {named}, has the ratio"
            text += (only if len(tried) == 1 else f". Of {len(tried)} other measured variants {named} has the lowest ratio") + figure
        elif not any(all(v[k] == row[k] for k in group) for v in variants):
            text += ". No other variant was measured"
        sentences.append({key: str(row[key]) for key in (*group, "variant")} | {"bottleneck": str(stage), "sentence": text + "."})
    return sentences


def build_summary(
    config: Config,
    gathered: Gathered,
    verdict: StudyVerdict,
    verifications: Sequence[Mapping[str, Any]],
    tables: Mapping[str, Table],
    files: Mapping[str, Path],
    results: Path,
) -> dict[str, Any]:
    """The whole summary as JSON-able values. files: name below `results` -> path, each given with its sha256."""
    stages = tables["stages"].frame
    counts = {name: int(stages[name].sum() or 0) for name in ("n", "failed", "discarded", "capped")} if len(stages) else {}
    studies = {f"{f.dataset}/{f.model}/{f.variant}": f.study for f in gathered.files}
    jobs = [
        {"path": str(f.path.relative_to(results)), "dataset": f.dataset, "model": f.model, "variant": f.variant, "block": f.block}
        | {"machine": f.machine_label, "metadata": f.job}
        for f in gathered.files
    ]
    summary: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "study": config.study,
        "verdict": verdict.word,
        "reasons": [asdict(f) for f in verdict.reasons],
        "warnings": [asdict(f) for f in verdict.warnings],
        "rows": gathered.rows,
        "samples": {"accepted": counts.get("n", 0), **{k: counts.get(k, 0) for k in ("failed", "discarded", "capped")}},
        "dummy_weights": sorted(n for n, m in config.models.items() if m.weights.startswith("dummy:")),
        "machines": gathered.machines,
        "studies": studies,
        "config": config.model_dump(mode="json", exclude={"report"}),  # how the page looks: merged results do not depend on it
        "verify": list(verifications),
        "bottlenecks": bottleneck_sentences(tables["stages"], tables["optimisations"]),
        **{name: table.frame.to_dicts() for name, table in tables.items() if name != "failures"},
        "failures": {"rows": len(tables["failures"].frame), "first": tables["failures"].frame.head(100).to_dicts()},
        "jobs": jobs,
        "files": {name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in sorted(files.items())},
    }
    return dict(clean(summary))


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    with whole_file(path, MergeError) as temporary:
        temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
