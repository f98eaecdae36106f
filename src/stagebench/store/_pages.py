"""Where a Parquet file's pages lie: page headers (Thrift compact protocol) read straight from the file.

pyarrow tells where a column chunk lies, not where in it a page's payload begins or what its CRC is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stagebench.store._compact import I32, STRUCT, Parser, ShortError, ThriftError, integer, struct

__all__ = ["Page", "PageError", "pages", "pread"]

_PEEK = 96
_MAX_HEADER = 1 << 20

_DATA_V1, _DICTIONARY = 0, 2
_SIZE_RAW, _SIZE, _CRC, _BODY = 2, 3, 4, 5
_PLAIN = 0


class PageError(ThriftError):
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
        except ShortError:
            if peek >= min(end - at, _MAX_HEADER):
                raise PageError(f"no page header at byte {at}") from None
            peek *= 16


def _parse(data: bytes, at: int) -> Page:
    found, length = struct(data, 0, _HEADER)
    size, raw, body = found.get(_SIZE, -1), found.get(_SIZE_RAW, -1), found.get(_BODY, {})
    if found.get(1) not in (_DATA_V1, _DICTIONARY) or size < 0 or raw < 0:
        raise PageError(f"no page header at byte {at}")
    crc = found.get(_CRC)
    return Page(at, at + length, size, raw, None if crc is None else crc & 0xFFFFFFFF, body.get(1, 0), body.get(2, -1))


def _data_page(data: bytes, at: int) -> tuple[Any, int]:
    return struct(data, at, {1: (I32, integer), 2: (I32, integer)})  # num_values, encoding


_HEADER: dict[int, tuple[int, Parser]] = {
    **dict.fromkeys((1, _SIZE_RAW, _SIZE, _CRC), (I32, integer)),
    _BODY: (STRUCT, _data_page),
}
