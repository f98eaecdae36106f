"""A row as the bytes of its row group, made in any thread: so that a file's one writer has nothing left to do but put them down.

pyarrow encodes the small columns, as a file of one row in memory whose row group is taken out. It could encode the pixels as well, but
copies them three times to do so. Their page is made here instead: its header and its entry in the footer are those that pyarrow makes
for a page of one byte, with sizes and checksum set. The result is the file that pyarrow's writer would have written.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.store._compact import I32, I64, LIST, STRUCT
from stagebench.store._format import BULK, ClipRow, one_value, schema
from stagebench.store._trees import Struct, decode, encode

__all__ = ["Bytes", "EncodedRow", "RowEncoder", "placed"]

Bytes = bytes | memoryview

_MAGIC = 4
"""Bytes of "PAR1", which stand before the first row group of a file."""
_CODECS = {"lz4": "lz4_raw", "zstd": "zstd"}
# a nullable value's definition level, run-length encoded: int32 length, a run of one, the level
_LEVELS, _NULL = b"\x02\x00\x00\x00\x02\x01", b"\x02\x00\x00\x00\x02\x00"


@dataclass(frozen=True)
class EncodedRow:
    """A row group. Offsets in `group` count from its first byte."""

    row: ClipRow
    fixed: int | None
    """Bytes of every value of the pixel column it was made for; None for one that takes any size."""
    group: Struct
    """RowGroup of parquet.thrift, for one use: see `placed`."""
    pieces: tuple[tuple[Bytes, bool], ...]
    """The bytes in order, and whether they are the payload of a bulk column."""
    raw_bytes: int
    """Of the pixels' page before compression."""

    @property
    def nbytes(self) -> int:
        return sum(len(piece) for piece, _ in self.pieces)


class RowEncoder:
    """Rows of one shard to row groups, and row groups to a footer. Used by several threads at once."""

    def __init__(self, kind: str, *, raw_events: bool, codec: str) -> None:
        self._kind = kind
        self._raw_events = raw_events
        self._codec = codec
        self._level = 1 if codec == "zstd" else None
        self._templates: dict[tuple[bool, bool], tuple[bytes, bytes]] = {}

    def encode(self, row: ClipRow, fixed: int | None) -> EncodedRow:
        """A row for a shard whose pixel column holds values of `fixed` bytes, or of any size."""
        target = schema(self._kind, raw_events=self._raw_events, fixed=fixed)
        if not self._raw_events:
            target = target.remove(len(target) - 1)
        data = self._file(target, row.table(target))
        footer, end = _footer(data)
        group: Struct = footer[4][1][1][0]
        _shift(group, -_MAGIC)
        if self._raw_events:
            return EncodedRow(row, None, group, tuple(_split(data, group, end)), 0)
        header, page, chunk, raw = self._page(row, fixed)
        _, chunks = group[1][1]
        chunk[3][1][9] = (I64, end - _MAGIC)
        for field, more in ((2, 6), (6, 7)):  # total_byte_size, total_compressed_size
            group[field] = (I64, group[field][1] + chunk[3][1][more][1])
        chunks.append(chunk)
        return EncodedRow(row, fixed, group, ((data[_MAGIC:end] + header, False), *((part, True) for part in page)), raw)

    def footer(self, fixed: int | None, groups: Sequence[bytes], metadata: Mapping[str, str]) -> bytes:
        """FileMetaData of parquet.thrift. groups: as `placed` gives them."""
        target = schema(self._kind, raw_events=self._raw_events, fixed=fixed)
        footer, _ = _footer(self._file(target, None, metadata))
        footer[3] = (I64, len(groups))
        footer[4] = (LIST, (STRUCT, list(groups)))
        return encode(footer)

    def pixels(self, page: bytes, raw_bytes: int, fixed: int | None) -> np.ndarray:
        """The value in a page that `encode` made, uint8 [bytes]."""
        if self._codec != "none":
            page = pa.Codec(_CODECS[self._codec]).decompress(page, raw_bytes, asbytes=True)
        return np.frombuffer(page, np.uint8)[len(_LEVELS) + (0 if fixed else 4) :]

    def _page(self, row: ClipRow, fixed: int | None) -> tuple[bytes, list[Bytes], Struct, int]:
        """(header, payload in parts, ColumnChunk without its place, bytes of the payload before compression)."""
        head, chunk = (decode(data)[0] for data in self._template(fixed is None, row.pixels is None))
        if row.pixels is None:
            before, pixels, size = _NULL, memoryview(b""), 0
        else:
            pixels = np.ascontiguousarray(row.pixels).data.cast("B") if row.pixels.size else memoryview(b"")
            size = len(pixels)
            before = _LEVELS if fixed else _LEVELS + size.to_bytes(4, "little")
        raw = len(before) + size
        parts: list[Bytes]
        if self._codec == "none":
            parts = [before, pixels] if size else [before]
        else:
            parts = [self._compress(np.concatenate([np.frombuffer(before, np.uint8), np.frombuffer(pixels, np.uint8)]))]
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        stored = sum(map(len, parts))
        head[2], head[3], head[4] = (I32, raw), (I32, stored), (I32, crc - (crc >> 31 << 32))
        header = encode(head)
        meta = chunk[3][1]
        meta[6], meta[7] = (I64, len(header) + raw), (I64, len(header) + stored)
        if 16 in meta and 1 in meta[16][1]:  # SizeStatistics.unencoded_byte_array_data_bytes
            meta[16][1][1] = (I64, size)
        return header, parts, chunk, raw

    def _compress(self, data: np.ndarray) -> memoryview:
        packed = pa.Codec(_CODECS[self._codec], compression_level=self._level).compress(data)
        return memoryview(packed)[: packed.size]  # its view shows the memory that was set aside

    def _template(self, large: bool, null: bool) -> tuple[bytes, bytes]:
        """PageHeader and ColumnChunk of a page of one byte, or of a null."""
        if (large, null) not in self._templates:
            kind = pa.large_binary() if large else pa.binary(1)
            target = pa.schema([pa.field("pixels", kind)])
            value = one_value(kind, None if null else np.zeros(1, np.uint8))
            data = self._file(target, pa.Table.from_arrays([value], schema=target))
            _, end = decode(data, _MAGIC)
            group = _footer(data)[0][4][1][1][0]
            self._templates[large, null] = data[_MAGIC:end], encode(group[1][1][1][0])
        return self._templates[large, null]

    def _file(self, target: pa.Schema, table: pa.Table | None, metadata: Mapping[str, str] | None = None) -> bytes:
        """A Parquet file of one row or none."""
        bulk = [name if name == "pixels" else f"{name}.list.element" for name in target.names if name in BULK]
        leaves = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in target]
        encoding = {
            "xyp.list.element": "BYTE_STREAM_SPLIT",
            "t.list.element": "DELTA_BINARY_PACKED",
            "t_wide.list.element": "DELTA_BINARY_PACKED",
        }
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(
            sink,
            target,
            compression=dict.fromkeys(leaves, "none") | dict.fromkeys(bulk, self._codec),
            compression_level=dict.fromkeys(bulk, self._level) if self._level and bulk else None,
            use_dictionary=False,
            column_encoding={leaf: encoding.get(leaf, "PLAIN") for leaf in leaves},
            write_statistics=["clip"],
            write_page_checksum=True,
            data_page_version="1.0",
        ) as writer:
            if table is not None:
                writer.write_table(table)
            if metadata:
                writer.add_key_value_metadata(dict(metadata))
        return sink.getvalue().to_pybytes()


def placed(group: Struct, at: int) -> bytes:
    """RowGroup of a row whose first byte stands at `at` of the file. The tree is used up."""
    _shift(group, at)
    return encode(group)


def _shift(group: Struct, by: int) -> None:
    group[5] = (I64, group[5][1] + by)  # RowGroup.file_offset
    for chunk in group[1][1][1]:
        meta = chunk[3][1]
        meta[9] = (I64, meta[9][1] + by)  # ColumnMetaData.data_page_offset


def _footer(data: bytes) -> tuple[Struct, int]:
    """The footer of a Parquet file, and where it begins."""
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return decode(data, begin)[0], begin


def _split(data: bytes, group: Struct, end: int) -> list[tuple[Bytes, bool]]:
    """The bytes from the first row group to `end`, cut where the payloads of bulk columns begin and end."""
    view, pieces, at = memoryview(data), [], _MAGIC
    for chunk in group[1][1][1]:
        meta = chunk[3][1]
        if meta[3][1][1][0].decode() not in BULK:
            continue
        page = meta[9][1] + _MAGIC
        last = page + meta[7][1]
        while page < last:
            header, payload = decode(data, page)
            page = payload + header[3][1]
            pieces += [(view[at:payload], False), (view[payload:page], True)]
            at = page
    return [*pieces, (view[at:end], False)]
