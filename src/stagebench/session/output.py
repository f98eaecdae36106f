"""A job's rows on disk: one Parquet file, whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.errors import TimingError
from stagebench.files import whole_file
from stagebench.rows import SCHEMA

__all__ = ["read_metadata", "write_rows"]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Mapping[str, Any]]) -> None:
    """Write under a temporary name in the same folder, fsync, rename.

    metadata: `job`, `study`, `machine`, each a JSON-able mapping without NaN. Raises TimingError when the disk does not take it; then
    nothing is left under the final name.
    """
    encoded = {f"stagebench.{name}": json.dumps(value, sort_keys=True, allow_nan=False) for name, value in metadata.items()}
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA.with_metadata(encoded))
    with whole_file(path, TimingError, "Make room and run the job again: its journal holds all rows.") as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """`job`, `study` and `machine` of a timing file. Raises OSError, ValueError or KeyError for a file that is none."""
    found = pq.read_schema(path).metadata or {}
    return {name: json.loads(found[f"stagebench.{name}".encode()]) for name in ("job", "study", "machine")}
