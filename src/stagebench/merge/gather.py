"""The plan's timing files -> one merged file, after checking that their rows may stand in one table."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.config import Config, canonical
from stagebench.errors import MergeError
from stagebench.files import whole_file
from stagebench.machine import ANCHOR_BOUND
from stagebench.rows import SCHEMA, Code, Status

__all__ = ["MERGED_SCHEMA", "Gathered", "JobFile", "PlanLike", "difference", "gather"]

MERGED_SCHEMA = pa.schema([("machine", pa.string()), *SCHEMA, ("ms_per_token", pa.float64()), ("accepted", pa.bool_())])
"""A timing row with the machine's label, decode_ms / steps, and whether the row enters means."""

_DISCARDING = [code.value for code in Code if code.discards]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _Block(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def samples(self) -> Sequence[str]: ...


class _Job(Protocol):
    @property
    def dataset(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def variant(self) -> _Named: ...
    @property
    def block(self) -> _Block: ...
    @property
    def path(self) -> str: ...


class PlanLike(Protocol):
    """What the merge needs of a plan."""

    @property
    def config(self) -> Config: ...
    @property
    def jobs(self) -> Iterable[Any]: ...
    def timing_fingerprint(self, job: Any, /) -> Mapping[str, Any]: ...
    @property
    def verify_paths(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class JobFile:
    """One timing file: where it is, whose it is, and its metadata."""

    path: Path
    dataset: str
    model: str
    variant: str
    block: str
    samples: Sequence[str]
    job: Mapping[str, Any]
    study: Mapping[str, Any]
    machine: Mapping[str, Any]
    machine_label: str


@dataclass(frozen=True)
class Gathered:
    files: tuple[JobFile, ...]
    """Sorted by path."""
    machines: dict[str, Mapping[str, Any]]
    """Label -> fingerprint."""
    rows: int
    warnings: list[tuple[Code, str]] = field(default_factory=list)


def gather(plan: PlanLike, results: Path, output: Path) -> Gathered:
    """Read exactly the plan's timing files below `results`, check them, and write their rows to `output`, one file in memory at a time.

    Rows are sorted by file, sample, length and repeat, so that neither the order of jobs nor that of rows shows.

    Raises MergeError for a missing or unreadable file, another schema, rows of another job, a sample without a row or with two, study
    fingerprints or anchors that differ where rows would be pooled.
    """
    opened = sorted(((job, _open(job, results)) for job in plan.jobs), key=lambda one: str(one[1].path))
    files = [file for _, file in opened]
    if not files:
        raise MergeError("the plan holds no timing job: check datasets and models in the config")
    for one, other in pairwise(files):
        if one.path == other.path:
            raise MergeError(f"{one.path}: named twice by the plan, so its rows would count twice. Plan again.")
    _check_planned(plan, opened)
    _check_studies(files, plan.config)
    warnings = _check_anchors(files)
    rows = 0
    with (
        whole_file(output, MergeError) as temporary,
        pq.ParquetWriter(temporary, MERGED_SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        for file in files:
            table = _rows(file)
            rows += table.num_rows
            writer.write_table(table)
    return Gathered(tuple(files), {f.machine_label: f.machine for f in files}, rows, warnings)


def _open(job: _Job, results: Path) -> JobFile:
    path = results / job.path
    if not path.is_file():
        raise MergeError(f"{path}: timing file missing, though the plan names it. Run its timing job again (snakemake), then merge.")
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise MergeError(f"{path}: not a readable Parquet file ({error}). Delete it and run its timing job again.") from error
    for column in SCHEMA:
        at = schema.get_field_index(column.name)
        if at < 0 or schema.field(at).type != column.type:
            found = "no such column" if at < 0 else str(schema.field(at).type)
            raise MergeError(
                f"{path}: column {column.name!r}: expected {column.type}, found {found}. "
                "The file comes from another version of stagebench: delete it and run its timing job again."
            )
    metadata = {name: _json(path, schema.metadata or {}, f"stagebench.{name}") for name in ("job", "study", "machine")}
    return JobFile(
        path,
        job.dataset,
        job.model,
        job.variant.name,
        job.block.name,
        job.block.samples,
        machine_label=_label(metadata["machine"]),
        **metadata,
    )


def _check_planned(plan: PlanLike, opened: list[tuple[_Job, JobFile]]) -> None:
    """Each file's job ran with the settings, weights and versions that the plan has now. Raises MergeError that names all others."""
    changed = {
        file.path: lines
        for job, file in opened
        if (lines := difference(dict(plan.timing_fingerprint(job)), file.study.get("applied"), "applied"))
    }
    if changed:
        first, lines = next(iter(changed.items()))
        others = [str(path) for path in changed if path != first]
        raise MergeError(
            f"{first}: measured otherwise than planned (plan -> file):\n"
            + "\n".join(f"  {line}" for line in lines)
            + (f"\nSo {len(others)} others:\n" + "\n".join(f"  {path}" for path in others) if others else "")
            + "\nDelete what is out of date and run its timing job again, or give this study a name of its own."
        )


def _json(path: Path, metadata: Mapping[bytes, bytes], key: str) -> Mapping[str, Any]:
    try:
        value = json.loads(metadata[key.encode()])
    except (KeyError, ValueError, RecursionError) as error:
        raise MergeError(f"{path}: no readable metadata {key!r} in the file. Delete it and run its timing job again.") from error
    if not isinstance(value, dict):
        raise MergeError(f"{path}: metadata {key!r} is {type(value).__name__}, expected an object. Delete it and run its timing job again.")
    return value


def _label(machine: Mapping[str, Any]) -> str:
    """A short readable name for one fingerprint: what computes, and a digest that tells equal names apart."""
    gpu, cpu = machine.get("gpu"), machine.get("cpu")
    if isinstance(gpu, (list, tuple)):
        gpu = gpu[0] if gpu else None
    name = next((str(v) for v in (_name(gpu), _name(cpu), machine.get("device")) if v), "machine")
    alike = {key: value for key, value in machine.items() if key not in ("host", "digest")}
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-") or "machine"
    return f"{slug}-{hashlib.blake2b(canonical(alike).encode(), digest_size=3).hexdigest()}"


def _name(device: Any) -> Any:
    return next((device[k] for k in ("name", "model", "brand") if device.get(k)), None) if isinstance(device, Mapping) else device


def difference(one: Any, other: Any, prefix: str = "") -> list[str]:
    """`key: value -> other value` for every leaf in which two JSON values differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        lines = []
        for key in sorted({*one, *other}):
            lines += difference(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else str(key))
        return lines
    return [] if one == other else [f"{prefix}: {json.dumps(one, sort_keys=True)} -> {json.dumps(other, sort_keys=True)}"]


def _check_studies(files: list[JobFile], config: Config) -> None:
    """One dataset, model and variant has one study fingerprint; one model has one set of weights; all jobs ran with the config's timing."""
    first: dict[tuple[str, str, str], JobFile] = {}
    weights: dict[str, JobFile] = {}
    timing = config.timing.model_dump(mode="json", exclude={"max_samples", "reuse"})
    for file in files:
        known = first.setdefault((file.dataset, file.model, file.variant), file)
        _refuse(file, str(known.path), difference(known.study, file.study))
        known = weights.setdefault(file.model, file)
        _refuse(file, str(known.path), difference(known.study.get("model"), file.study.get("model"), "model"))
        if isinstance(file.study.get("timing"), Mapping):
            _refuse(file, "the config", difference(timing, file.study["timing"], "timing"))


def _refuse(file: JobFile, other: str, changed: list[str]) -> None:
    if changed:
        raise MergeError(
            f"{file.path}: its study fingerprint differs from that of {other}, so its rows must not be pooled:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nDelete the file that is out of date and run its timing job again."
        )


def _check_anchors(files: list[JobFile]) -> list[tuple[Code, str]]:
    """Pooled jobs must have run on an equally fast machine: refused on a GPU, a warning on a CPU, whose speed neighbours change."""
    warnings: list[tuple[Code, str]] = []
    by_machine: dict[tuple[str, str], list[JobFile]] = {}
    for file in files:
        kind = "cuda" if str(file.job.get("device")).startswith("cuda") else "cpu"
        by_machine.setdefault((file.machine_label, kind), []).append(file)
    for (label, kind), group in sorted(by_machine.items()):
        bound = ANCHOR_BOUND[kind]
        readings: dict[str, list[tuple[float, str, Path]]] = {}
        for file in group:
            for name, value in _anchor_times(file.job).items():
                readings.setdefault(name, []).append((value, f"{file.model}, {file.block}", file.path))
        for name, found in sorted(readings.items()):
            (low, where_low, _), (high, where_high, slow) = min(found), max(found)
            if low > 0 and high / low - 1 > bound:
                text = f"anchor {name!r} took {low:.4g} ms ({where_low}) to {high:.4g} ms ({where_high}) on {label}"
                if kind == "cuda":
                    raise MergeError(
                        f"{text}, more than {bound:.0%} apart: the machine changed speed between jobs, so their rows must not be "
                        f"pooled. Look for throttling or neighbours, delete {slow}, and run its timing job again."
                    )
                warnings.append((Code.WARN_ANCHOR_DRIFT, text))
    return warnings


def _anchor_times(job: Mapping[str, Any]) -> dict[str, float]:
    """Anchor workload -> its faster reading of before and after, in ms: how fast the machine could be. What moved within a job is that
    job's own finding (WARN_ANCHOR_DRIFT)."""
    best: dict[str, float] = {}
    anchors = job.get("anchors")
    for when in ("before", "after"):
        reading = anchors.get(when) if isinstance(anchors, Mapping) else None
        for name, value in reading.items() if isinstance(reading, Mapping) else ():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                best[str(name)] = min(best.get(str(name), float(value)), float(value))
    return best


def _rows(file: JobFile) -> pa.Table:
    """One file's rows, checked, sorted and completed. Shape: rows x MERGED_SCHEMA."""
    try:
        table = pq.read_table(file.path, columns=SCHEMA.names, page_checksum_verification=True, partitioning=None)
        # our schema in place of the file's, whose metadata may hold bytes that polars panics at
        table = pa.Table.from_arrays(table.columns, schema=SCHEMA)
        table.validate(full=True)  # polars takes offsets and UTF-8 on trust
        frame = pl.DataFrame(table)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise MergeError(f"{file.path}: cannot be read ({error}). Delete it and run its timing job again.") from error
    for column, expected in (("dataset", file.dataset), ("model", file.model), ("variant", file.variant)):
        strange = frame.filter(pl.col(column).ne_missing(pl.lit(expected)))
        if len(strange):
            raise MergeError(
                f"{file.path}: {len(strange)} rows have {column} {strange[column][0]!r}, the plan says {expected!r}. "
                "Delete the file and run its timing job again."
            )
    key = ["sample", "length", "repeat"]
    if frame.select(key).is_duplicated().any():
        twice = frame.filter(frame.select(key).is_duplicated()).row(0, named=True)
        raise MergeError(
            f"{file.path}: sample {twice['sample']!r}, repeat {twice['repeat']}, length {twice['length']} has two rows. "
            "Delete the file and run its timing job again."
        )
    have, want = set(frame["sample"]), set(file.samples)
    if have != want:
        lost, extra = sorted(want - have), sorted(have - want)
        raise MergeError(
            f"{file.path}: {len(want)} samples planned, {len(lost)} without a row{f' ({lost[0]}, ...)' if lost else ''}, {len(extra)} "
            f"not planned{f' ({extra[0]}, ...)' if extra else ''}. Delete the file and run its timing job again."
        )
    discarded = pl.col("codes").list.set_intersection(pl.lit(_DISCARDING, dtype=pl.List(pl.String))).list.len().fill_null(0) > 0
    counts = (pl.col("status") == Status.OK) | ((pl.col("status") == Status.CAPPED) & (pl.col("length") != "natural"))
    frame = frame.sort(*key).select(
        pl.lit(file.machine_label).alias("machine"),
        *SCHEMA.names,
        pl.when(pl.col("steps") > 0).then(pl.col("decode_ms") / pl.col("steps")).alias("ms_per_token"),
        (counts & ~discarded & pl.col("total_ms").is_finite().fill_null(False)).fill_null(False).alias("accepted"),
    )
    return frame.to_arrow().cast(MERGED_SCHEMA)
