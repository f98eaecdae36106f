"""Rows of unchanged samples, taken over from earlier jobs of the same model and variant."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.rows import SCHEMA, Code, Status
from stagebench.session.order import Task
from stagebench.session.output import read_metadata

__all__ = ["earlier_rows"]

log = logging.getLogger(__name__)


def earlier_rows(
    output: Path, tasks: Sequence[Task], lengths: Sequence[str], *, study: Mapping[str, Any], machine: Mapping[str, Any], block: str
) -> dict[str, list[dict[str, Any]]]:
    """Rows by sample key, from the other timing files in the output's folder, newest file first.

    A sample is taken over when the file's study and machine fingerprints are these, its clip's content digest and its query are the
    same, and every length mode ended well in every run. Its rows keep the `job` that measured them and carry REUSED.
    """
    wanted = {task.sample: task for task in tasks if task.skip is None and task.clip_digest is not None}
    found: dict[str, list[dict[str, Any]]] = {}
    for path in _newest_first(output):
        if len(found) == len(wanted):
            break
        for sample, rows in _samples(path, study, machine, set(wanted) - set(found)).items():
            if _stands(rows, wanted[sample], lengths):
                found[sample] = [row | {"block": block, "codes": sorted({*row["codes"], Code.REUSED.value})} for row in rows]
    return found


def _newest_first(output: Path) -> list[Path]:
    dated = []
    for path in output.parent.glob("*.parquet"):
        if path.name == output.name:
            continue
        try:
            dated.append((path.stat().st_mtime_ns, path))
        except OSError:  # removed meanwhile
            continue
    return [path for _, path in sorted(dated, reverse=True)]


def _samples(path: Path, study: Mapping[str, Any], machine: Mapping[str, Any], wanted: set[str]) -> dict[str, list[dict[str, Any]]]:
    try:
        metadata = read_metadata(path)
        if metadata["study"] != study or metadata["machine"] != machine:
            return {}
        table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
        if not table.schema.equals(SCHEMA, check_metadata=False):
            return {}
        rows = table.to_pylist()
    except (OSError, ValueError, KeyError, RecursionError, pa.ArrowException) as error:
        log.warning("%s: not taken over, for it cannot be read (%s)", path, error)
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["sample"] in wanted:
            found.setdefault(row["sample"], []).append(row)
    return found


def _stands(rows: Sequence[Mapping[str, Any]], task: Task, lengths: Sequence[str]) -> bool:
    same = all(row["clip_digest"] == task.clip_digest and row["query"] == task.query for row in rows)
    ended = all(row["status"] in (Status.OK, Status.CAPPED) and not any(Code(code).discards for code in row["codes"]) for row in rows)
    return same and ended and {row["length"] for row in rows} == set(lengths)
