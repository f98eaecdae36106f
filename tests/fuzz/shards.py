"""Shards under fuzzing: changed ones, and ones whose digests were made right again after the change."""

from __future__ import annotations

import contextlib
import os
import random
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from fuzz.base import Broken, Reader, bytes_of, folder, in_file
from fuzz.mutate import changed_bytes
from fuzz.thrift import changed_footer, changed_page, changed_payload
from stagebench.errors import SourceError, StoreError

__all__ = ["READERS", "resealed", "seeds"]


@cache
def seeds() -> tuple[bytes, ...]:
    from stagebench.sources.events import Events
    from stagebench.store import ClipRow, ShardWriter

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 3, 6, 8, 3), dtype=np.uint8)
    events = Events(*(rng.integers(0, 2, 12).astype(d) for d in (np.uint16, np.uint16, np.uint8)), np.arange(12, dtype=np.int64))
    seeds = []
    for number, (kind, spec, codec) in enumerate(
        (("frames", {}, "none"), ("frames", {}, "zstd"), ("events", {"representation": "clip"}, "none"))
    ):
        path = folder() / f"{os.getpid()}-seed-{number}.parquet"
        with ShardWriter(path, kind, spec, codec) as writer:
            for i in range(1):
                row = ClipRow.from_events(f"c{i}", "d", events) if kind == "events" else ClipRow.from_frames(f"c{i}", "d", frames[i])
                writer.add(row)
            writer.add(ClipRow.failed("bad", "d", "zero events"))
        seeds.append(path.read_bytes())
    return tuple(seeds)


def _read_shard(data: bytes) -> object:
    """A changed file is refused when it is verified, whatever the change; read without that, it may give pixels or an error of ours."""
    from stagebench.store import Shard

    path = in_file("shard.parquet", data)
    try:
        Shard.open(path, verify=True, threads=1).close()
        if data not in seeds():
            raise Broken("a changed shard was taken for a good one")
    except StoreError:
        pass
    return _drain(path)


def resealed(data: bytes, *, body: bool = True) -> Path:
    """The file with right digests: what whoever can write the cache can make.

    body: the digest that verification looks at, too, and not only the seal on the footer. Raises ValueError or StoreError for a footer in
    which there is no place for them, or nothing to take them over.
    """
    from stagebench.store import _seal
    from stagebench.store._footer import read_columns

    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer, digest = data[max(begin, 0) : -8], _seal.UNSEALED
    path = in_file("shard.parquet", data)
    if body:
        fd = os.open(path, os.O_RDONLY)
        try:
            columns = read_columns(footer, begin)
            digest = _seal.structure_digest(fd, begin, _seal.locate(fd, columns, [str(c.row) for c in columns], path))
        finally:
            os.close(fd)
    path.write_bytes(data[: max(begin, 0)] + _seal.sealed(footer, digest, path))
    return path


def _make_resealed(rng: random.Random) -> bytes:
    """Bytes changed anywhere, fields of the footer or of a page's header, or values under a right checksum."""
    what = rng.random()
    if what < 0.2:
        return changed_bytes(seeds(), rng)
    change = changed_footer if what < 0.6 else changed_page if what < 0.75 else changed_payload
    return change(rng.choice(seeds()), rng)


def _read_resealed(data: bytes) -> object:
    """What is inside is checked, whatever the digests say."""
    from stagebench.store import Shard

    verified = zlib.crc32(data) % 4 == 0
    try:
        path = resealed(data, body=verified)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise StoreError(f"cannot be sealed: {error}") from error
    if verified:
        with contextlib.suppress(StoreError):  # a page's CRC is seen by verification alone
            Shard.open(path, verify=True, threads=1).close()
    return _drain(path)


def _drain(path: Path) -> object:
    from stagebench.store import Shard

    with Shard.open(path, verify=False) as shard:
        for clip in shard.clips:
            if not shard.row(clip).ok:
                continue
            shard.clip_row(clip)
            if shard.raw_events:
                shard.events(clip)
            else:
                for frame in shard.frames(clip):
                    if frame.dtype != np.uint8 or frame.shape[-1] != 3:
                        raise Broken(f"frame of {frame.dtype} {frame.shape}")
        return shard.clips


READERS: tuple[Reader, ...] = (
    Reader("shard", bytes_of(seeds), _read_shard, (StoreError,)),
    Reader("resealed", _make_resealed, _read_resealed, (StoreError, SourceError)),
)
