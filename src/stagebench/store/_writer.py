"""Writing a shard: whole under its final name, or not there at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.errors import StoreError
from stagebench.store._format import FORMAT_VERSION, MAX_PIXELS, ClipRow, holds_raw_events, schema
from stagebench.store._seal import BODY_KEY, SEAL_KEY, UNSEALED, patch

__all__ = ["ShardWriter"]

CODECS = ("none", "lz4", "zstd")


class ShardWriter:
    """Context manager: `add` rows, and a clean exit commits the file (fsync, rename, fsync of the folder); an exception leaves nothing.

    path: the final name. kind: frames | events. spec: the extraction spec, kept in the file.
    codec: of the pixels of a frames shard; event shards are zstd-1 in any case.
    Raises StoreError where the disk is full or refuses, for a row of another content, and for a clip that is there already.
    """

    def __init__(self, path: Path, kind: str, spec: Mapping[str, Any], codec: str = "none") -> None:
        if codec not in CODECS:
            raise StoreError(f"codec {codec!r}: expected one of {', '.join(CODECS)}. Set cache.codec.")
        if kind not in ("frames", "events"):
            raise StoreError(f"kind {kind!r}: expected frames or events. Check the plan that names this shard.")
        self.path = Path(path)
        self.kind = kind
        self.spec = dict(spec)
        self.raw_events = holds_raw_events(kind, spec)
        self._codec = codec if kind == "frames" else "zstd"
        self._level = 1 if self._codec == "zstd" else None
        self._clips: dict[str, tuple[str, str]] = {}
        self._waiting: list[ClipRow] = []  # failed rows before the first with pixels: the schema is not known yet
        self._schema: pa.Schema | None = None
        self._file: pa.NativeFile | None = None
        self._writer: pq.ParquetWriter | None = None
        self._temp: Path | None = None
        self._lock = -1

    def __enter__(self) -> ShardWriter:
        with self._disk():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._new_temp()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with self._disk():
                    self._commit()
        finally:
            self._discard()

    def add(self, row: ClipRow) -> None:
        """Append one clip as one row group."""
        meta = row.meta
        if meta.clip in self._clips:
            raise StoreError(f"{self.path}: clip {meta.clip} is there already. Each clip is one row: check the plan.")
        if meta.ok and (row.xyp is not None) != self.raw_events:
            raise StoreError(
                f"{self.path}: clip {meta.clip} holds {'events' if row.xyp is not None else 'pixels'}, the spec asks for the other."
            )
        if row.nbytes > MAX_PIXELS:
            raise StoreError(
                f"{self.path}: clip {meta.clip} takes {row.nbytes} bytes, a row holds {MAX_PIXELS}. Lower frames.count or cache.resize."
            )
        self._clips[meta.clip] = (meta.digest, meta.status)
        with self._disk(row.nbytes):
            self._add(row)

    def _add(self, row: ClipRow) -> None:
        if self._schema is None:
            if not row.meta.ok and not self.raw_events:
                self._waiting.append(row)
                return
            self._start(row)
        elif row.pixels is not None:
            pixels = self._schema.field("pixels").type
            if pa.types.is_fixed_size_binary(pixels) and pixels.byte_width != row.pixels.nbytes:
                self._loosen()
        self._write(row.table(self._open_schema))

    @property
    def _open_schema(self) -> pa.Schema:
        if self._schema is None:
            raise StoreError(f"{self.path}: rows are added inside `with ShardWriter(...)` only. Open the writer first.")
        return self._schema

    def _start(self, row: ClipRow | None) -> None:
        fixed = row.pixels.nbytes if row is not None and row.pixels is not None and row.pixels.nbytes else None
        self._open(schema(self.kind, raw_events=self.raw_events, fixed=fixed))
        for early in self._waiting:
            self._write(early.table(self._open_schema))
        self._waiting.clear()

    def _open(self, target: pa.Schema) -> None:
        """A Parquet writer on the temporary file."""
        self._schema = target
        names = target.names
        bulk = [name for name in ("pixels", "xyp", "t", "t_wide") if name in names]
        leaves = {name: name if name == "pixels" else f"{name}.list.element" for name in bulk}
        compression = dict.fromkeys(_leaves(target), "none") | dict.fromkeys(leaves.values(), self._codec)
        encoding = {
            "xyp.list.element": "BYTE_STREAM_SPLIT",
            "t.list.element": "DELTA_BINARY_PACKED",
            "t_wide.list.element": "DELTA_BINARY_PACKED",
        }
        self._file = pa.OSFile(str(self._temp), "wb")
        self._writer = pq.ParquetWriter(
            self._file,
            target,
            compression=compression,
            compression_level=dict.fromkeys(leaves.values(), self._level) if self._level else None,
            use_dictionary=False,
            column_encoding={leaf: encoding.get(leaf, "PLAIN") for leaf in _leaves(target)},
            write_statistics=["clip"],
            write_page_checksum=True,
            data_page_version="1.0",
        )

    def _write(self, table: pa.Table) -> None:
        if self._writer is None:
            raise StoreError(f"{self.path}: the writer is closed. Add rows inside its `with` block.")
        self._writer.write_table(table)

    def _loosen(self) -> None:
        """A clip of another size: write the rows so far again, with a column that takes any size."""
        old, lock = self._temp, self._lock
        self._close_parquet()
        self._temp, self._lock = None, -1
        try:
            self._new_temp()
            target = schema(self.kind)
            self._open(target)
            with pq.ParquetFile(old, page_checksum_verification=True) as source:
                for group in range(source.metadata.num_row_groups):
                    self._write(source.read_row_group(group, use_threads=False).cast(target))
        finally:
            _remove(old, lock)

    def _close_parquet(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _commit(self) -> None:
        if self._schema is None:
            self._start(None)
        if self._writer is None or self._temp is None:
            raise StoreError(f"{self.path}: the writer is closed. Use each writer once.")
        clips = [{"clip": clip, "digest": digest, "status": status} for clip, (digest, status) in self._clips.items()]
        self._writer.add_key_value_metadata(
            {
                "stagebench.format": str(FORMAT_VERSION),
                "stagebench.kind": self.kind,
                "stagebench.spec": _json(self.spec),
                "stagebench.clips": _json(clips),
                "stagebench.writer": _json({name: _version(name) for name in ("stagebench", "pyarrow", "numpy", "av", "pillow")}),
                BODY_KEY: UNSEALED,
                SEAL_KEY: UNSEALED,
            }
        )
        self._close_parquet()
        fd = os.open(self._temp, os.O_RDWR)
        try:
            patch(self._temp, fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._temp.replace(self.path)
        self._temp = None
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _new_temp(self) -> None:
        self._temp = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        # the lock says that a living process writes here; the system drops it with the process
        self._lock = os.open(self._temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _sweep(self) -> None:
        """Remove what a killed writer of this shard left; leave what a living one holds locked."""
        for left in self.path.parent.glob(f".{_escape(self.path.name)}.*.tmp"):
            try:
                fd = os.open(left, os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink(missing_ok=True)
            except OSError:
                pass
            finally:
                os.close(fd)

    def _discard(self) -> None:
        with contextlib.suppress(Exception):  # closing writes a footer, which fails on a full disk
            self._close_parquet()
        self._writer = self._file = None
        _remove(self._temp, self._lock)
        self._temp, self._lock = None, -1

    @contextlib.contextmanager
    def _disk(self, nbytes: int = 0) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.path.parent).free
                asked = f" and {nbytes} bytes to write" if nbytes else ""
                raise StoreError(
                    f"{self.path}: the disk is full: {free} bytes free{asked}. Nothing was left under that name. "
                    "Free some space (`stagebench cache prune`), or set cache.codec: zstd or cache.resize."
                ) from error
            raise StoreError(f"{self.path}: cannot be written: {error}. Check the folder and its permissions.") from error


def _remove(temp: Path | None, lock: int) -> None:
    if temp is not None:
        temp.unlink(missing_ok=True)
    if lock >= 0:
        os.close(lock)


def _leaves(target: pa.Schema) -> list[str]:
    return [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in target]


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
