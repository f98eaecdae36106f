"""Where a Parquet file's pages lie: page headers (Thrift compact protocol) read straight from the file.

pyarrow tells where a column chunk lies, not where in it a page's payload begins or what its CRC is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Page", "PageError", "pages", "pread"]

_PEEK = 96
_MAX_HEADER = 1 << 20

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DATA_V1, _DICTIONARY = 0, 2
_SIZE_RAW, _SIZE, _CRC = 2, 3, 4
_PLAIN = 0


class PageError(ValueError):
    """Bytes that are no page header, or a page that leaves its column chunk."""


@dataclass(frozen=True)
class Page:
    """One page. Offsets from the start of the file, in bytes."""

    header: int
    payload: int
    size: int
    """As stored."""
    raw_size: int
    """Uncompressed."""
    crc: int | None
    """CRC-32 of the stored payload, unsigned."""
    num_values: int
    encoding: int

    @property
    def end(self) -> int:
        return self.payload + self.size

    @property
    def plain(self) -> bool:
        return self.encoding == _PLAIN


class _Short(Exception):
    """The bytes at hand end inside the header."""


def pread(fd: int, size: int, offset: int) -> bytes:
    """Exactly `size` bytes. Raises PageError at the file's end."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise PageError(f"the file ends at byte {offset + len(data)}, inside {size} bytes at {offset}")
        data += more
    return data


def pages(fd: int, begin: int, end: int) -> Iterator[Page]:
    """The pages of the column chunk in bytes [begin, end). Raises PageError where they do not fill it exactly."""
    at = begin
    while at < end:
        page = _read(fd, at, end)
        if page.end > end:
            raise PageError(f"page at byte {at} ends at {page.end}, its column chunk at {end}")
        yield page
        at = page.end


def _read(fd: int, at: int, end: int) -> Page:
    peek = _PEEK
    while True:
        data = pread(fd, min(peek, end - at), at)
        try:
            return _parse(data, at)
        except _Short:
            if peek >= min(end - at, _MAX_HEADER):
                raise PageError(f"no page header at byte {at}") from None
            peek *= 16


def _parse(data: bytes, at: int) -> Page:
    reader = _Reader(data)
    numbers: dict[int, int] = {}
    body: dict[int, int] = {}
    for field, kind in reader.fields():
        if kind == _I32:
            numbers[field] = reader.zigzag()
        elif kind == _STRUCT and field == 5:  # DataPageHeader: 1 num_values, 2 encoding
            for inner, inner_kind in reader.fields():
                if inner_kind == _I32:
                    body[inner] = reader.zigzag()
                else:
                    reader.skip(inner_kind)
        else:
            reader.skip(kind)
    size, raw = numbers.get(_SIZE, -1), numbers.get(_SIZE_RAW, -1)
    if numbers.get(1) not in (_DATA_V1, _DICTIONARY) or size < 0 or raw < 0:
        raise PageError(f"no page header at byte {at}")
    crc = numbers.get(_CRC)
    return Page(at, at + reader.at, size, raw, None if crc is None else crc & 0xFFFFFFFF, body.get(1, 0), body.get(2, -1))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """(field id, type) of a struct; the caller consumes each value before the next step."""
        field = 0
        while True:
            head = self.byte()
            if head == 0:
                return
            kind, delta = head & 15, head >> 4
            field = field + delta if delta else self.zigzag()
            yield field, kind

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise _Short
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise PageError("a number longer than 64 bits in a page header")

    def zigzag(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def skip(self, kind: int, depth: int = 0) -> None:
        if depth > 8:
            raise PageError("a page header nested too deep")
        if kind in (_TRUE, _FALSE):
            return
        if kind == _BYTE:
            self.byte()
        elif kind in (_I16, _I32, _I64):
            self.varint()
        elif kind in (_DOUBLE, _BINARY):
            length = 8 if kind == _DOUBLE else self.varint()
            self.at += length
            if self.at > len(self.data):
                raise _Short
        elif kind in (_LIST, _SET):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            if count > len(self.data):
                raise _Short
            for _ in range(count):
                self.skip(_BYTE if head & 15 in (_TRUE, _FALSE) else head & 15, depth + 1)
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        else:
            raise PageError(f"type {kind} in a page header")
