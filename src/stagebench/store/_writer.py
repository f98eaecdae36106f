"""Writing a shard: whole under its final name, or not there at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from stagebench.errors import StoreError
from stagebench.files import sync_folder
from stagebench.store._encode import Bytes, EncodedRow, RowEncoder, placed
from stagebench.store._flush import Flusher
from stagebench.store._format import FORMAT_VERSION, MAX_PIXELS, ClipRow, RowMeta, holds_raw_events
from stagebench.store._pages import pread
from stagebench.store._seal import BODY_KEY, SEAL_KEY, UNSEALED, Structure, sealed

__all__ = ["ShardWriter"]

CODECS = ("none", "lz4", "zstd")
_MAGIC = b"PAR1"


class _Placed(NamedTuple):
    """A row in the file."""

    meta: RowMeta
    page: int
    """Where its pixels' page begins, behind the header."""
    size: int
    raw_size: int


class ShardWriter:
    """Context manager: `add` rows, and a clean exit commits the file (fsync, rename, fsync of the folder); an exception leaves nothing.

    path: the final name. kind: frames | events. spec: the extraction spec, kept in the file.
    codec: of the pixels of a frames shard; event shards are zstd-1 in any case.
    One thread adds rows. It writes them, too: several that write one file wait for each other in the system. The file's bytes are the
    rows' in their order, whoever encoded them.
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
        self._encoder = RowEncoder(kind, raw_events=self.raw_events, codec=codec if kind == "frames" else "zstd")
        self._clips: dict[str, tuple[str, str]] = {}
        self._failed_first: list[ClipRow] = []  # before the first row with pixels: their column's type is not known yet
        self._known = self.raw_events  # whether it is
        self._fixed: int | None = None  # bytes of each value of that column, or None for any
        self._temp: Path | None = None
        self._fd = -1
        self._flusher: Flusher | None = None
        self._broken = False
        """While a row is added, and for good once that failed: the file has a hole."""
        self._begin()

    def _begin(self) -> None:
        """An empty file."""
        self._at = 0
        self._groups: list[bytes] = []
        self._placed: list[_Placed] = []
        self._structure = Structure()

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

    def encode(self, row: ClipRow) -> EncodedRow | ClipRow:
        """What `add` takes, so that it has little left to do. For any thread, in any order."""
        if not row.meta.ok or row.nbytes > MAX_PIXELS or (row.xyp is not None) != self.raw_events:
            return row  # for `add` to judge
        return self._encoder.encode(row, self._fixed if self._known else self._own_size(row))

    def add(self, row: ClipRow | EncodedRow) -> None:
        """Append one clip as one row group, which is in the file when this returns.

        Once a row could not be written, nothing can: no further row is taken, and the exit commits nothing. A row that is refused
        for what it is (of another content, too large, there already) harms no other.
        """
        self._check_whole()
        encoded, row = (row, row.row) if isinstance(row, EncodedRow) else (None, row)
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
        if self._fd < 0:
            raise StoreError(f"{self.path}: rows are added inside `with ShardWriter(...)` only. Open the writer first.")
        self._broken = True
        self._clips[meta.clip] = (meta.digest, meta.status)
        with self._disk(row.nbytes):
            self._add(row, encoded)
        self._broken = False

    def _check_whole(self) -> None:
        if self._broken:
            raise StoreError(
                f"{self.path}: an earlier row could not be written, so nothing is. See the first error, and write the shard again."
            )

    def _add(self, row: ClipRow, encoded: EncodedRow | None) -> None:
        if not self._known:
            if not row.meta.ok:
                self._failed_first.append(row)
                return
            self._settle(self._own_size(row))
        elif row.pixels is not None and self._fixed is not None and row.pixels.nbytes != self._fixed:
            self._loosen()
        self._append(row, encoded)

    @staticmethod
    def _own_size(row: ClipRow) -> int | None:
        return row.pixels.nbytes or None if row.pixels is not None else None

    def _settle(self, fixed: int | None) -> None:
        """The pixel column's type, and the rows that waited for it."""
        self._fixed, self._known = fixed, True
        for early in self._failed_first:
            self._append(early)
        self._failed_first.clear()

    def _append(self, row: ClipRow, encoded: EncodedRow | None = None) -> None:
        if encoded is None or encoded.fixed != self._fixed:
            encoded = self._encoder.encode(row, self._fixed)
        at = self._at
        self._groups.append(placed(encoded.group, at))
        bulk = sum(len(piece) for piece, is_bulk in encoded.pieces if is_bulk)
        self._placed.append(_Placed(row.meta, at + encoded.nbytes - bulk, bulk, encoded.raw_bytes))
        for piece, is_bulk in encoded.pieces:
            if is_bulk:
                self._structure.skip(len(piece))
            else:
                self._structure.add(piece)
        self._at += encoded.nbytes
        self._write([piece for piece, _ in encoded.pieces], at)

    def _write(self, pieces: Sequence[Bytes], at: int) -> None:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                done = os.pwrite(self._fd, view, at)
                view, at = view[done:], at + done
        if self._flusher is not None:
            self._flusher.wrote(sum(map(len, pieces)))

    def _loosen(self) -> None:
        """A clip of another size: write the rows so far again, with a column that takes any size."""
        old, fd, earlier, fixed = self._temp, self._fd, self._placed, self._fixed
        flusher, self._flusher = self._flusher, None
        self._temp, self._fd = None, -1
        try:
            self._new_temp()
            self._fixed = None
            for row in earlier:
                pixels = None
                if row.meta.ok:
                    pixels = self._encoder.pixels(pread(fd, row.size, row.page), row.raw_size, fixed)
                self._append(ClipRow(row.meta, pixels=pixels))
        finally:
            try:
                if flusher is not None:
                    flusher.close()
            finally:
                _remove(old, fd)

    def _commit(self) -> None:
        self._check_whole()
        if not self._known:
            self._settle(None)
        if self._temp is None:
            raise StoreError(f"{self.path}: the writer is closed. Use each writer once.")
        clips = [{"clip": clip, "digest": digest, "status": status} for clip, (digest, status) in self._clips.items()]
        metadata = {
            "stagebench.format": str(FORMAT_VERSION),
            "stagebench.kind": self.kind,
            "stagebench.spec": _json(self.spec),
            "stagebench.clips": _json(clips),
            "stagebench.writer": _json({name: _version(name) for name in ("stagebench", "pyarrow", "numpy", "av", "pillow")}),
            BODY_KEY: UNSEALED,
            SEAL_KEY: UNSEALED,
        }
        footer = self._encoder.footer(self._fixed, self._groups, metadata)
        self._write([sealed(footer, self._structure.hexdigest(), self.path)], self._at)
        if self._flusher is not None:
            self._flusher.close()
        os.fsync(self._fd)
        self._temp.replace(self.path)
        self._temp = None
        sync_folder(self.path.parent)

    def _new_temp(self) -> None:
        self._temp = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        self._fd = os.open(self._temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            # the lock says that a living process writes here; the system drops it with the process
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._begin()
        self._flusher = Flusher(self._fd)
        self._structure.add(_MAGIC)
        self._at = len(_MAGIC)
        self._write([_MAGIC], 0)

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
        try:
            if self._flusher is not None:
                with contextlib.suppress(OSError):
                    self._flusher.close()
        finally:
            _remove(self._temp, self._fd)
            self._temp, self._fd, self._flusher = None, -1, None

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


def _remove(temp: Path | None, fd: int) -> None:
    try:
        if temp is not None:
            temp.unlink(missing_ok=True)
    finally:
        if fd >= 0:
            os.close(fd)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
