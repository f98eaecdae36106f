"""What a merge, a report and a comparison read, under fuzzing."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.base import Broken, Reader, folder
from fuzz.mutate import changed_bytes
from fuzz.thrift import changed_footer, changed_payload
from stagebench.errors import MergeError, TimingError

__all__ = ["READERS", "seeds"]

JSON_TOKENS = (b"NaN", b"Infinity", b"null", b"{}", b"[]", b'"', b"[" * 3000, b"-1", b"1e400", b'{"a":', b"\\ud800", b"\xff")
IDENTITY = {"job": "j", "study": "s", "machine": "m"}
GOOD = {"g0": [{"sample": "a", "total_ms": 1.5}], "g1": [{"sample": "b", "total_ms": 2.5}]}


@cache
def _study() -> tuple[Any, Path]:
    """A plan, and the folder with its timing file and its proof."""
    from factories import make_study

    where = folder() / f"{os.getpid()}-results"
    return make_study(where, samples=2, sequences=1, blocks=1, models={"eventgpt": {}}, lengths=("natural",), repeats=1), where


@cache
def seeds() -> Mapping[str, bytes]:
    """A timing file (T), a merged file (M), a summary (S), a journal (J), a proof (V)."""
    from stagebench.merge.gather import gather
    from stagebench.session.journal import Journal

    plan, where = _study()
    gather(plan, where, where / "timings.parquet")
    summary = {"config": plan.config.model_dump(mode="json"), "machines": {}, "studies": {}, "verdict": "VALID", "reasons": []}
    journal = where / "job.journal"
    with Journal(journal, IDENTITY) as opened:
        for key, rows in GOOD.items():
            opened.append(key, rows)
    return {
        "T": (where / plan.jobs[0].path).read_bytes(),
        "M": (where / "timings.parquet").read_bytes(),
        "S": json.dumps(summary).encode(),
        "J": journal.read_bytes(),
        "V": (where / "verify/eventgpt.json").read_bytes(),
    }


def _make(rng: random.Random) -> bytes:
    """Half of the Parquet files are changed in their footer's fields or their values, for changed bytes are mostly found by checksums."""
    kind = rng.choice("TTMSJV")
    if kind in "TM" and rng.random() < 0.5:
        return kind.encode() + rng.choice((changed_footer, changed_payload))(seeds()[kind], rng)
    return kind.encode() + changed_bytes([seeds()[kind]], rng, JSON_TOKENS)


def _read(data: bytes) -> object:
    kind, data = data[:1].decode(), data[1:]
    where = folder() / f"{os.getpid()}-read"
    where.mkdir(exist_ok=True)
    return _READ[kind](where, data)


def _read_timings(where: Path, data: bytes) -> object:
    from stagebench.merge import gather

    plan, _ = _study()
    path = where / plan.jobs[0].path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    file = gather._open(plan.jobs[0], where)
    gather._check_planned(plan, [(plan.jobs[0], file)])
    return gather._rows(file)


def _read_merged(where: Path, data: bytes) -> object:
    from stagebench.compare import _groups

    (where / "timings.parquet").write_bytes(data)
    return _groups(where)


def _read_summary(where: Path, data: bytes) -> object:
    from stagebench.compare import _summary

    (where / "summary.json").write_bytes(data)
    return _summary(where)


def _read_proof(where: Path, data: bytes) -> object:
    from stagebench.merge import validity

    (where / "eventgpt.json").write_bytes(data)
    reports, findings = validity.read_verifications(where, ["eventgpt.json"])
    if not reports and not findings:
        raise Broken("a proof that cannot be read went without a finding")
    return reports


def _read_journal(where: Path, data: bytes) -> object:
    from stagebench.session.journal import Journal

    for old in where.glob("job.journal*"):
        old.unlink()
    (where / "job.journal").write_bytes(data)
    with Journal(where / "job.journal", IDENTITY) as journal:
        for key, rows in journal.groups.items():
            if GOOD.get(key) != rows:
                raise Broken(f"group {key} came back as {rows}")
        return journal.groups


_READ = {"T": _read_timings, "M": _read_merged, "S": _read_summary, "V": _read_proof, "J": _read_journal}

READERS = (Reader("results", _make, _read, (MergeError, TimingError)),)
