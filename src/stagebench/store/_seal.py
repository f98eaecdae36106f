"""What makes a flipped bit anywhere in a shard an error.

    "PAR1" | page header, payload | page header, payload | ... | footer | footer length | "PAR1"
    '-------------------- body ------------------------------' '----------- tail -----------'

* Payloads of the bulk columns (`_format.BULK`): CRC-32 in their page header, as Parquet defines it.
* The rest of the body (magic, all page headers, with those CRCs, pages of the small columns): blake2b-256 over it and over where
  it lies, in the footer as `stagebench.body`.
* The tail: blake2b-256 as `stagebench.seal` in the footer itself, taken with the seal's own 64 digits as zeros. It is checked
  before anything else reads the footer, so a damaged one never reaches the Thrift parser.

Both digests have a fixed width: the writer puts zeros, and replaces them before the footer is written.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stagebench.errors import ChecksumError
from stagebench.store._compact import ThriftError
from stagebench.store._footer import Column, read_columns
from stagebench.store._format import BULK
from stagebench.store._pages import Page, PageError, pages, pread

__all__ = [
    "BODY_KEY",
    "REMEDY",
    "SEAL_KEY",
    "UNSEALED",
    "Chunk",
    "Structure",
    "check_payloads",
    "check_tail",
    "locate",
    "sealed",
    "structure_digest",
]

BODY_KEY = "stagebench.body"
SEAL_KEY = "stagebench.seal"
UNSEALED = "0" * 64
_MAGIC = b"PAR1"
_MAX_FOOTER = 1 << 28
_BLOCK = 1 << 20
REMEDY = "Delete the file: the next run extracts it again."
"""What to do about a shard that is damaged, or none of ours."""


@dataclass(frozen=True)
class Chunk:
    """One column of one row (row group) and its pages."""

    row: int
    column: str
    pages: tuple[Page, ...]

    @property
    def bulk(self) -> bool:
        return self.column in BULK


def check_tail(fd: int, path: Path) -> tuple[int, list[Column]]:
    """Where the footer begins, once its seal holds, and the columns that it names.

    Raises ChecksumError for a damaged file and for what is no shard, ThriftError for a footer with right digests that makes no sense.
    """
    begin, tail = _tail(fd, path)
    found = _digits(tail, SEAL_KEY, path)
    if _seal(tail, found) != tail[found : found + 64]:
        raise ChecksumError(f"{path}: the footer's bytes changed since they were written. {REMEDY}")
    return begin, read_columns(tail[:-8], begin)


def locate(fd: int, columns: Iterable[Column], clips: Sequence[str], path: Path) -> list[Chunk]:
    """The columns' chunks, in their order. Raises ChecksumError, naming the clip, where pages do not fill their chunk."""
    chunks = []
    for column in columns:
        try:
            chunks.append(Chunk(column.row, column.name, tuple(pages(fd, column.begin, column.end))))
        except (ThriftError, OSError) as error:
            raise ChecksumError(f"{path}: clip {clips[column.row]}, column {column.name}: {error}. {REMEDY}") from None
    return chunks


def structure_digest(fd: int, footer: int, chunks: Iterable[Chunk]) -> str:
    """blake2b-256, as hex, over every byte before the footer that is no payload of a bulk column."""
    digest = hashlib.blake2b(digest_size=32)
    at = 0

    def take(begin: int, end: int) -> None:
        if end < begin:
            raise PageError(f"pages overlap at byte {end}")
        digest.update(begin.to_bytes(8, "little") + end.to_bytes(8, "little"))
        for offset in range(begin, end, _BLOCK):
            digest.update(pread(fd, min(_BLOCK, end - offset), offset))

    for page in sorted((p for c in chunks if c.bulk for p in c.pages), key=lambda p: p.header):
        take(at, page.payload)
        at = page.end
    take(at, footer)
    return digest.hexdigest()


def check_payloads(fd: int, chunks: Iterable[Chunk], clips: Sequence[str], path: Path, threads: int = 1) -> None:
    """Compare every page's CRC. Raises ChecksumError that names the first damaged clip and its column."""
    work = [(chunk, page) for chunk in chunks for page in chunk.pages]
    local = threading.local()

    def wrong(item: tuple[Chunk, Page]) -> bool:
        page = item[1]
        if page.crc is None:
            return True
        if not hasattr(local, "block"):
            local.block = memoryview(bytearray(_BLOCK))
        value, at = 0, page.payload
        while at < page.end:
            got = os.preadv(fd, [local.block[: min(_BLOCK, page.end - at)]], at)
            if not got:
                return True
            value, at = zlib.crc32(local.block[:got], value), at + got
        return value != page.crc

    def report(item: tuple[Chunk, Page], bad: bool) -> None:
        if bad:
            chunk, page = item
            raise ChecksumError(
                f"{path}: clip {clips[chunk.row]}, column {chunk.column}: the {page.size} bytes at {page.payload} changed since they were "
                f"written (CRC). {REMEDY}"
            )

    if threads <= 1 or len(work) < 2:
        for item in work:
            report(item, wrong(item))
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for item, bad in zip(work, pool.map(wrong, work), strict=True):
            report(item, bad)


class Structure:
    """`structure_digest` of a file that is being written: told of its bytes in their order, from the first on."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=32)
        self._begin = 0
        self._gap = bytearray()

    def add(self, data: bytes | memoryview) -> None:
        """Bytes that are no payload of a bulk column."""
        self._gap += data

    def skip(self, size: int) -> None:
        """A payload of a bulk column, or a part of one."""
        if self._gap:  # page headers stand between two payloads: no gap, the same payload
            self._take()
        self._begin += size

    def hexdigest(self) -> str:
        """With nothing but the footer to come."""
        self._take()
        return self._digest.hexdigest()

    def _take(self) -> None:
        end = self._begin + len(self._gap)
        self._digest.update(self._begin.to_bytes(8, "little") + end.to_bytes(8, "little"))
        self._digest.update(self._gap)
        self._begin = end
        self._gap.clear()


def sealed(footer: bytes, body: str, path: Path) -> bytes:
    """The file's tail: a footer that holds zeros for both digests, with the digests, its length and the magic."""
    tail = footer + len(footer).to_bytes(4, "little") + _MAGIC
    at = _digits(tail, BODY_KEY, path)
    tail = tail[:at] + body.encode() + tail[at + 64 :]
    at = _digits(tail, SEAL_KEY, path)
    return tail[:at] + _seal(tail, at) + tail[at + 64 :]


def _tail(fd: int, path: Path) -> tuple[int, bytes]:
    """Offset of the footer, and its bytes with the length and magic that follow."""
    size = os.fstat(fd).st_size
    damaged = f"{path}: {size} bytes that do not end as a Parquet file: cut short, or damaged. {REMEDY}"
    if size < 12:
        raise ChecksumError(damaged)
    last = pread(fd, 8, size - 8)
    length = int.from_bytes(last[:4], "little")
    if last[4:] != _MAGIC or length > min(size - 12, _MAX_FOOTER):
        raise ChecksumError(damaged)
    begin = size - 8 - length
    return begin, pread(fd, length + 8, begin)


def _digits(tail: bytes, key: str, path: Path) -> int:
    """Where the 64 digits of a key stand: a Thrift KeyValue, its value of 64 bytes. Keys in other values are escaped JSON or base64."""
    found = [m.end() for m in re.finditer(rb"\x18" + bytes([len(key)]) + re.escape(key.encode()) + rb"\x18\x40(?=[0-9a-f]{64})", tail)]
    if len(found) != 1:
        raise ChecksumError(
            f"{path}: {len(found)} values of {key} in the footer, expected 1: not a shard of stagebench, or damaged. {REMEDY}"
        )
    return found[0]


def _seal(tail: bytes, at: int) -> bytes:
    digest = hashlib.blake2b(tail[:at], digest_size=32)
    digest.update(UNSEALED.encode())
    digest.update(tail[at + 64 :])
    return digest.hexdigest().encode()
