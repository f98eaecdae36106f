"""Where a shard's columns lie: its Parquet footer (FileMetaData of parquet.thrift), read here and not by Arrow.

Arrow parses the footer too, to read values. But what pyarrow tells of single columns passes C++ exceptions on to nobody: SizeStatistics
that do not fit their column, and `metadata.row_group(0).column(0)` ends the process. So neither this nor `_contents` asks for it, and a
footer of which this module cannot make sense is refused before Arrow sees it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from stagebench.store._compact import BINARY, I32, I64, LIST, STRUCT, Parser, ThriftError, binary, elements, integer, struct

__all__ = ["Column", "read_columns"]

_CODECS = {0: "none", 6: "zstd", 7: "lz4_raw"}
"""Parquet's compression codes that a shard may have."""


class Column(NamedTuple):
    """One column chunk: a column of one row (row group). Bytes from the start of the file."""

    row: int
    name: str
    """Of the top-level column."""
    codec: str
    begin: int
    end: int


def read_columns(footer: bytes, body: int) -> list[Column]:
    """All column chunks, row group after row group.

    footer: without the length and magic behind it. body: how many bytes stand before it.
    Raises ThriftError for other bytes than a footer, and for a chunk that is incomplete, in another file, or outside the body.
    """
    found, end = struct(footer, 0, _FILE)
    if end != len(footer):
        raise ThriftError(f"{len(footer) - end} bytes behind the footer")
    columns = []
    for row, group in enumerate(found.get(4, ())):
        for chunk in group.get(1, ()):
            meta = chunk.get(3, {})
            try:
                names, code, size, begin = meta[3], meta[4], meta[7], meta[9]
                name, codec = names[0].decode("ascii"), _CODECS[code]
            except (LookupError, UnicodeDecodeError) as error:
                raise ThriftError(f"row group {row}: a column without place or name, or of another codec ({error})") from None
            if not 4 <= begin <= begin + size <= body:
                raise ThriftError(f"row group {row}: column {name} at byte {begin}, {size} bytes long, in a file of {body}")
            columns.append(Column(row, name, codec, begin, begin + size))
    return columns


def _structs(fields: dict[int, tuple[int, Parser]], refused: tuple[int, ...] = ()) -> tuple[int, Parser]:
    def parse(data: bytes, at: int) -> tuple[Any, int]:
        return elements(data, at, STRUCT, lambda data, at: struct(data, at, fields, refused))

    return LIST, parse


def _names(data: bytes, at: int) -> tuple[Any, int]:
    return elements(data, at, BINARY, binary)


def _metadata(data: bytes, at: int) -> tuple[Any, int]:
    return struct(data, at, _METADATA)


# fields by their numbers in parquet.thrift
_METADATA: dict[int, tuple[int, Parser]] = {  # path_in_schema, codec, total_compressed_size, data_page_offset
    3: (LIST, _names),
    4: (I32, integer),
    7: (I64, integer),
    9: (I64, integer),
}
_CHUNKS = _structs({3: (STRUCT, _metadata)}, refused=(1, 8, 9))  # not: file_path, crypto_metadata, encrypted_column_metadata
_FILE = {4: _structs({1: _CHUNKS})}
