"""The verdict on a study: VALID, or INVALID with reason codes; and the warnings that stand beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from stagebench.config import Config
from stagebench.files import bounded_text
from stagebench.merge.groups import CAPPED_POOL, GROUP, Group
from stagebench.rows import Code, Status

__all__ = ["Finding", "StudyVerdict", "failure_rows", "judge", "read_verifications"]

MAX_PROOF_BYTES = 16 << 20


@dataclass(frozen=True)
class Finding:
    """One code, where it was found, how often."""

    code: str
    where: str
    count: int
    detail: str


@dataclass(frozen=True)
class StudyVerdict:
    word: str
    """VALID | INVALID"""
    reasons: tuple[Finding, ...]
    """INVALID_* codes; empty when VALID."""
    warnings: tuple[Finding, ...]

    def lines(self) -> list[str]:
        """The verdict as it stands on top of each table."""
        if not self.reasons:
            return [f"Verdict: {self.word}"]
        return [
            f"Verdict: {self.word} ({', '.join(sorted({f.code for f in self.reasons}))})",
            *(f"{f.code}: {f.where}: {f.detail}" for f in self.reasons),
        ]


def read_verifications(results: Path, proofs: Sequence[str]) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The verify reports that a study needs, and what is wrong with them: a failed, unreadable or missing one makes the study INVALID.

    proofs: paths below `results`, as the plan names them; other files there are not looked at.
    """
    reports: list[dict[str, Any]] = []
    findings = []
    for proof in sorted(proofs):
        path, trouble = results / proof, ""
        if not path.is_file():
            trouble = "decoupling proof missing: run stagebench verify"
        else:
            try:
                report = json.loads(bounded_text(path, MAX_PROOF_BYTES))
                checks = [
                    {"name": str(c["name"]), "passed": c["passed"] is True, "detail": str(c.get("detail", ""))} for c in report["checks"]
                ]
                passed = report["passed"] is True
                reports.append({"proof": path.stem, "model": str(report["model"]), "passed": passed, "checks": checks})
                failed = [str(c["name"]) for c in checks if not c["passed"]]
                if failed or not passed or not checks:
                    trouble = f"decoupling proof failed: {', '.join(failed) or 'no check ran'}"
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                trouble = f"decoupling proof cannot be read ({type(error).__name__}): run stagebench verify again"
        if trouble:
            findings.append(Finding(Code.INVALID_NOT_VERIFIED.value, path.stem, 1, trouble))
    return reports, findings


def judge(timings: Path, groups: Sequence[Group], config: Config, more: Sequence[Finding]) -> StudyVerdict:
    """All findings of a merged study. `more`: what was found elsewhere (verify reports, anchors)."""
    # a job's own finding says more than the count of rows that it marked
    said = {(f.code, f.where) for f in more if not f.code.startswith("invalid_")}
    findings = [*more, *(f for f in _row_codes(timings) if (f.code, f.where) not in said)]
    by_variant: dict[tuple[str, str, str, str], list[Group]] = {}
    for group in groups:
        by_variant.setdefault(group.key[:4], []).append(group)
    for (machine, dataset, model, variant), members in sorted(by_variant.items()):
        where = f"{dataset}/{model}/{variant} on {machine}"
        if not any(g.n for g in members):
            findings.append(Finding(Code.INVALID_NO_ACCEPTED.value, where, 1, "no accepted sample is left"))
        for group in members:
            if group.length == CAPPED_POOL:
                continue
            lost = group.failed
            if group.samples and lost / group.samples > config.shards.max_failed:
                detail = f"{lost} of {group.samples} samples failed at length {group.length}, {config.shards.max_failed:.0%} may"
                findings.append(Finding(Code.INVALID_TOO_MANY_FAILED.value, where, lost, detail))
            pools = [g for g in members if g.length in (group.length, CAPPED_POOL if group.length == "natural" else group.length)]
            if any(g.n for g in members) and not any(g.n for g in pools):
                detail = f"no accepted sample is left at length {group.length}"
                findings.append(Finding(Code.INVALID_NO_ACCEPTED.value, where, 1, detail))
    reasons = sorted({f for f in findings if f.code.startswith("invalid_")}, key=lambda f: (f.code, f.where, f.detail))
    warnings = sorted({f for f in findings if not f.code.startswith("invalid_")}, key=lambda f: (f.code, f.where, f.detail))
    return StudyVerdict("INVALID" if reasons else "VALID", tuple(reasons), tuple(warnings))


def _row_codes(timings: Path) -> list[Finding]:
    """Codes that rows carry, counted by model and variant; rows of status nan count as INVALID_NAN."""
    keys = ["dataset", "model", "variant"]
    frame = pl.scan_parquet(timings)
    codes = frame.select(*keys, pl.col("codes").alias("code")).explode("code").filter(pl.col("code").is_not_null())
    nans = frame.filter(pl.col("status") == Status.NAN.value).select(*keys, pl.lit(Code.INVALID_NAN.value).alias("code"))
    counted = pl.concat([codes, nans]).group_by(*keys, "code").len().sort(*keys, "code").collect()
    return [Finding(str(code), f"{d}/{m}/{v}", int(n), f"{n} rows") for d, m, v, code, n in counted.rows()]


def failure_rows(timings: Path, found: Sequence[Group]) -> list[dict[str, Any]]:
    """Samples with runs that failed or were discarded: one row for each group, in the order of `found`, and for each sample and reason."""
    keys = ["machine", "dataset", "model", "variant", "length", "sample", "status", "reason"]
    codes = [code.value for code in Code if code.discards]
    frame = (
        pl.scan_parquet(timings)
        .select(*keys, pl.col("codes").fill_null([]).list.sort().list.join(" ").alias("codes"), pl.col("codes").alias("_codes"))
        .filter(
            ~pl.col("status").is_in([Status.OK.value, Status.CAPPED.value])
            | (pl.col("_codes").list.set_intersection(pl.lit(codes, dtype=pl.List(pl.String))).list.len() > 0)
        )
        .group_by(*keys, "codes")
        .agg(pl.len().alias("runs"))
        .sort(*keys, "codes", nulls_last=True)
        .collect()
    )
    places = {group.key: number for number, group in enumerate(found)}
    return sorted(frame.to_dicts(), key=lambda row: places.get(tuple(row[name] for name in GROUP), len(places)))
