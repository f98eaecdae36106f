"""What a shard says of itself: its metadata, a row for each clip, the page of a clip's pixels. What does not hold together is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.errors import ChecksumError, StoreError
from stagebench.store._footer import Column
from stagebench.store._format import BULK, FORMAT_VERSION, RowMeta, holds_raw_events, schema, stored_bytes
from stagebench.store._pages import Page
from stagebench.store._seal import BODY_KEY, REMEDY

__all__ = ["Contents", "page_of", "read_contents", "read_rows"]

_MAX_FRAMES = 1 << 20
"""Of one clip. A forged row would take memory for what it claims before its page is looked at."""


@dataclass(frozen=True)
class Contents:
    """A shard's metadata."""

    kind: str
    spec: Mapping[str, Any]
    writer: Mapping[str, str]
    """Versions of what wrote the shard."""
    digests: Mapping[str, str]
    """Clip -> content digest of its source files, in the order of the rows."""
    body: str
    """`_seal.structure_digest` as it was written."""
    raw_events: bool


def read_contents(parquet: pq.ParquetFile, columns: Sequence[Column]) -> Contents:
    """columns: those that the footer names. Raises ValueError, KeyError or TypeError where they are not those of such a shard."""
    metadata = parquet.metadata
    values = {k.decode(): v.decode() for k, v in (metadata.metadata or {}).items() if k.startswith(b"stagebench.")}
    if values["stagebench.format"] != str(FORMAT_VERSION):
        raise ValueError(f"format {values['stagebench.format']}, expected {FORMAT_VERSION}")
    kind, spec, listed = values["stagebench.kind"], json.loads(values["stagebench.spec"]), json.loads(values["stagebench.clips"])
    digests = {entry["clip"]: entry["digest"] for entry in listed}
    raw_events = holds_raw_events(kind, spec)
    found = parquet.schema_arrow.remove_metadata()
    pixels = found.field("pixels").type if "pixels" in found.names else None
    fixed = getattr(pixels, "byte_width", None) if pixels != pa.large_binary() else None
    expected = schema(kind, raw_events=raw_events, fixed=fixed)
    if not found.equals(expected):
        raise ValueError(f"columns {_differences(found, expected)}")
    if not len(listed) == len(digests) == metadata.num_row_groups == metadata.num_rows:
        raise ValueError(f"{len(listed)} clips named, {metadata.num_row_groups} row groups and {metadata.num_rows} rows found")
    if [(c.row, c.name) for c in columns] != [(row, name) for row in range(len(digests)) for name in expected.names]:
        raise ValueError("row groups of other columns than the schema's")
    return Contents(kind, spec, json.loads(values["stagebench.writer"]), digests, values[BODY_KEY], raw_events)


def read_rows(parquet: pq.ParquetFile, digests: Mapping[str, str], path: Path) -> dict[str, RowMeta]:
    """Clip -> its row without its bulk. Raises ChecksumError, and StoreError where they are not those of `digests`."""
    names = [name for name in parquet.schema_arrow.names if name not in BULK]
    try:
        table = parquet.read(columns=names, use_threads=False).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ChecksumError(f"{path}: {error}. {REMEDY}") from error
    if len(table) != len(digests):
        raise StoreError(f"{path}: {len(table)} rows, {len(digests)} expected, one for each clip. {REMEDY}")
    rows = {clip: _row(values, path) for clip, values in zip(digests, table, strict=True)}
    for clip, row in rows.items():
        if row.clip != clip or row.digest != digests[clip]:
            raise StoreError(f"{path}: row of {row.clip} where the footer names {clip}. {REMEDY}")
    return rows


def page_of(row: RowMeta, pages: Sequence[Page], codec: str, *, fixed: bool, path: Path) -> Page:
    """The one page that holds a clip's pixels. Raises StoreError for pages that cannot hold what the row says.

    fixed: the column is of a fixed-size type.
    """
    # a page of one nullable value: int32 length of the levels, 2 bytes of levels, (int32 length of the value,) the value
    expected = stored_bytes(row.encoding or "", row.sizes) + 6 + (0 if fixed else 4)
    raw, stored = sum(page.raw_size for page in pages), sum(page.size for page in pages)
    sizes = (raw, stored) if codec == "none" else (raw,)
    if len(pages) != 1 or pages[0].num_values != 1 or not pages[0].plain or any(found != expected for found in sizes):
        raise StoreError(
            f"{path}: clip {row.clip}: {raw} bytes, {stored} stored, in {len(pages)} page(s), "
            f"{expected} in one expected for {row.count} frames of {row.sizes[0] if row.sizes else ()}. {REMEDY}"
        )
    return pages[0]


def _row(values: Mapping[str, Any], path: Path) -> RowMeta:
    count, flat = values["count"], values["sizes"]
    if not 0 <= count <= _MAX_FRAMES:
        raise StoreError(f"{path}: clip {values['clip']}: {count} frames, at most {_MAX_FRAMES} are read. {REMEDY}")
    sizes = ((values["height"], values["width"]),) * count if flat is None else tuple(zip(flat[::2], flat[1::2], strict=False))
    odd = flat is not None and len(flat) != 2 * count
    if odd or len(sizes) != count or any(h is None or w is None or h < 0 or w < 0 for h, w in sizes):
        raise StoreError(f"{path}: clip {values['clip']}: sizes {sizes} of {count} frames. {REMEDY}")
    optional = ("encoding", "t0", "t1", "n_events", "t_dtype", "p_coding")
    return RowMeta(
        values["clip"],
        values["digest"],
        values["status"],
        values["reason"],
        **{name: values.get(name) for name in optional},
        count=count,
        sizes=sizes,
        pts=tuple(values["pts"] or ()),
        indices=tuple(values["indices"] or ()),
    )


def _differences(found: pa.Schema, expected: pa.Schema) -> str:
    if found.names != expected.names:
        return f"{', '.join(found.names)}; expected {', '.join(expected.names)}"
    return "; ".join(f"{f.name} is {f.type}, expected {e.type}" for f, e in zip(found, expected, strict=True) if not f.equals(e))
