"""Reading a shard: verified and mapped when opened, then each clip by one copy into memory that is there already."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.errors import ChecksumError, StoreError
from stagebench.store import _seal
from stagebench.store._buffer import HostBuffer, split_frames
from stagebench.store._contents import page_of, read_contents, read_rows
from stagebench.store._format import ClipRow, RowMeta, stored_bytes, unpack_codes
from stagebench.store._mapping import MappedFile, map_file
from stagebench.store._pages import Page
from stagebench.store._seal import REMEDY

if TYPE_CHECKING:
    from stagebench.sources.events import Events

__all__ = ["Shard"]

_DISK = "Check the disk, or its connection, and run again; if that does not help, delete the file: it is extracted again."


class Shard:
    """An open shard. `Shard.open(path)`, then `frames`, `grid` or `events` by clip; use as a context manager, or close it.

    Not for several threads at once where `out` is left to the shard: its buffer is reused by every call.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self.verify_ms: float | None = None
        """What verification took; None when it was not asked for."""
        self._verified = self._sound = False  # every byte, and every byte but the bulk
        self._buffer = HostBuffer()
        self._packed = HostBuffer()
        self._mapping: MappedFile | None = None
        self._rows: Mapping[str, RowMeta] = {}
        try:
            self._footer, self._columns = _seal.check_tail(fd, path)  # before Arrow sees the file
            self._parquet = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
            if not os.path.samestat(os.fstat(fd), path.stat()):
                raise ValueError("replaced while it was opened")
            contents = read_contents(self._parquet, self._columns)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: not a shard of stagebench: {error}. {REMEDY}") from error
        self.kind, self.spec, self.writer, self.raw_events = contents.kind, contents.spec, contents.writer, contents.raw_events
        self.digests: Mapping[str, str] = contents.digests
        """Content digest of each clip's source files."""
        self.clips: tuple[str, ...] = tuple(contents.digests)
        self._index = {clip: row for row, clip in enumerate(self.clips)}
        self._body = contents.body
        self._chunks: list[_seal.Chunk] | None = None

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True, threads: int | None = None) -> Shard:
        """Open and, with `verify`, check every byte of the file, and map what was checked (where that is wise: see `_mapping`).

        threads: for verification; None takes the process's cores.
        Raises ChecksumError naming the shard (and the clip, where the damage lies in a clip's page), StoreError for what is
        missing, of another format, or of other types and shapes than its rows say.
        """
        path = Path(path)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{path}: the shard cannot be opened: {error.strerror}. Extract it again.") from error
        try:
            shard = cls(path, fd)
        except BaseException:
            os.close(fd)
            raise
        try:
            if verify:
                begin = time.perf_counter_ns()
                shard.verify(threads=threads)
                shard._verified = True
                shard._mapping = map_file(fd, path)
                if shard._mapping is not None:
                    shard._mapping.populate()
                shard.verify_ms = (time.perf_counter_ns() - begin) * 1e-6
            shard._rows = read_rows(shard._parquet, shard.digests, path)
            shard._find_pixels()
        except BaseException:
            shard.close()
            raise
        return shard

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Views into the shard's buffer stay valid."""
        if self._fd >= 0:
            self._parquet.close()
            if self._mapping is not None:
                self._mapping.close()
                self._mapping = None
            os.close(self._fd)
            self._fd = -1

    def verify(self, clips: Iterable[str] | None = None, *, threads: int | None = None) -> None:
        """Check the structure, and the bulk of `clips` (default: of all). Raises ChecksumError, StoreError where the disk fails."""
        try:
            self._verify(clips, threads)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read: {error}. {_DISK}") from error

    def _verify(self, clips: Iterable[str] | None, threads: int | None) -> None:
        chunks = self._all_chunks()
        try:
            sound = self._sound or _seal.structure_digest(self._fd, self._footer, chunks) == self._body
        except ValueError as error:
            raise ChecksumError(f"{self.path}: {error}. {REMEDY}") from None
        threads = threads or min(8, len(os.sched_getaffinity(0)))
        if not sound:
            _seal.check_payloads(self._fd, chunks, self.clips, self.path, threads)  # names the clip where a page is at fault
            raise ChecksumError(f"{self.path}: bytes outside the pages changed since they were written. {REMEDY}")
        self._sound = True
        wanted = set(range(len(self.clips))) if clips is None else {self._index[clip] for clip in clips}
        _seal.check_payloads(self._fd, [c for c in chunks if c.bulk and c.row in wanted], self.clips, self.path, threads)

    def row(self, clip: str) -> RowMeta:
        """The clip's row without its bulk. Raises StoreError for a clip that is not here."""
        try:
            return self._rows[clip]
        except KeyError:
            raise StoreError(f"{self.path}: no clip {clip} among {len(self.clips)}. Plan again: the shard is of another dataset.") from None

    def frames(self, clip: str, out: np.ndarray | None = None) -> list[np.ndarray]:
        """The clip's frames, uint8 [H, W, 3] each: views into `out`.

        out: uint8, contiguous, at least `row(clip).rgb_bytes` long. None takes the shard's own buffer, which the next call overwrites, or
        where `decompresses(clip)` new memory, which saves a copy.
        Raises StoreError for a failed clip (with its reason) and for a shard of raw events.
        """
        row = self._readable(clip)
        if out is None and self.decompresses(clip):
            return split_frames(self._pixels(clip), row.sizes)
        flat = self._target(row, out)
        if row.encoding == "rgb8":
            self._read_into(clip, flat)
        elif row.encoding == "codes2":
            unpack_codes(self._pixels(clip), row.sizes, flat)
        else:
            from stagebench.render import voxel_to_frames

            for frame, grey in zip(split_frames(flat, row.sizes), voxel_to_frames(self.grid(clip)), strict=True):
                frame[:] = grey
        return split_frames(flat, row.sizes)

    def view(self, clip: str) -> list[np.ndarray] | None:
        """The clip's frames where they stand in the file, uint8 [H, W, 3] each, read-only and without a copy.

        A view outlives `close`; but if the file is cut, or its disk fails, looking at one ends the process: `frames` is what jobs use.
        None where there are none to be had so: compressed or rendered clips, a shard that was not verified or is not mapped, bytes that are
        not in memory (reading them later would charge the disk to whoever looks). Raises as `frames`.
        """
        row = self._readable(clip)
        where = self._plain.get(clip)
        data = None if row.encoding != "rgb8" or where is None else self._mapped(where, row.rgb_bytes)
        return None if data is None else split_frames(data, row.sizes)

    def decompresses(self, clip: str) -> bool:
        """Whether the clip's frames stand compressed in the file, byte for byte as `frames` gives them."""
        return self._rows[clip].encoding == "rgb8" and clip not in self._plain

    def grid(self, clip: str) -> np.ndarray:
        """A clip's voxel grid, float32 [bins, H, W]; read-only. Raises StoreError for other contents."""
        row = self._readable(clip)
        if row.encoding != "f32":
            raise StoreError(f"{self.path}: clip {clip} holds {row.encoding}, no voxel grid. Set events.representation: voxel.")
        return self._pixels(clip).view(np.float32).reshape(row.count, *row.sizes[0])

    def events(self, clip: str) -> Events:
        """A clip's events, equal to those read from its source. Raises StoreError for a shard of pixels."""
        from stagebench.sources.events import Events

        row = self._readable(clip)
        xyp, t = self._event_arrays(clip)
        t = t.astype(np.int64)
        t += row.t0 or 0
        return Events(
            x=(xyp & 0xFFFF).astype(np.uint16),
            y=(xyp >> 16 & 0x7FFF).astype(np.uint16),
            p=(xyp >> 31).astype(np.uint8),
            t=t,
            t_dtype=row.t_dtype or "",
            p_coding=row.p_coding or "",
        )

    def clip_row(self, clip: str) -> ClipRow:
        """The row as it was added, to be written to another shard. Call `verify([clip])` first where the shard was opened unverified."""
        meta = self.row(clip)
        if not meta.ok:
            return ClipRow(meta)
        if self.raw_events:
            xyp, t = self._event_arrays(clip)
            return ClipRow(meta, xyp=xyp, t=t)
        return ClipRow(meta, pixels=self._pixels(clip))

    def reserve(self) -> int:
        """Make the shard's own buffer large enough for any of its clips, so that no timed read allocates; its size in bytes."""
        largest = max((row.rgb_bytes for row in self._rows.values()), default=0)
        self._buffer.reserve(largest)
        return largest

    def _readable(self, clip: str) -> RowMeta:
        row = self.row(clip)
        if not row.ok:
            raise StoreError(f"{self.path}: clip {clip} could not be extracted: {row.reason}. Mend the clip, or leave it out.")
        return row

    def _target(self, row: RowMeta, out: np.ndarray | None) -> np.ndarray:
        if self.raw_events:
            raise StoreError(f"{self.path}: holds events, not frames. Use `events` and render them.")
        if out is None:
            return self._buffer.take(row.rgb_bytes)
        if out.dtype != np.uint8 or not out.flags.c_contiguous or out.nbytes < row.rgb_bytes:
            raise StoreError(
                f"{self.path}: out is {out.dtype} of {out.nbytes} bytes, expected contiguous uint8 of {row.rgb_bytes} at least."
            )
        return out.reshape(-1)[: row.rgb_bytes]

    def _read_into(self, clip: str, flat: np.ndarray) -> None:
        where = self._plain.get(clip)
        if where is None:
            flat[:] = self._pixels(clip)
        elif (data := self._mapped(where, flat.size)) is not None:
            np.copyto(flat, data)
        else:
            self._read_range(clip, flat, where)

    def _mapped(self, where: int, size: int) -> np.ndarray | None:
        """Bytes of the file without a copy, read-only uint8 [size]; None where they are not mapped or not in memory."""
        if self._mapping is None or not self._mapping.holds(where, size):
            return None
        return self._mapping.data[where : where + size]

    def _read_range(self, clip: str, flat: np.ndarray, where: int) -> None:
        view, at = memoryview(flat.data), 0
        while at < len(view):
            try:
                got = os.preadv(self._fd, [view[at:]], where + at)
            except OSError as error:
                raise StoreError(f"{self.path}: clip {clip} cannot be read: {error}. {_DISK}") from error
            if not got:
                raise StoreError(f"{self.path}: the file ends inside clip {clip}: it was cut while in use. {REMEDY}")
            at += got

    def _pixels(self, clip: str) -> np.ndarray:
        """uint8 [bytes] as stored, decompressed, in memory of its own; the page's CRC is checked unless `verify` has done so."""
        row = self._rows[clip]
        size = stored_bytes(row.encoding or "", row.sizes)
        if not self._verified or clip in self._plain:
            data = self._column(clip, "pixels").buffers()[-1]
            pixels = np.frombuffer(data, dtype=np.uint8) if data is not None and data.size else np.empty(0, dtype=np.uint8)
        else:
            page = self._pages[clip]
            packed = self._mapped(page.payload, page.size)
            if packed is None:
                packed = self._packed.take(page.size)
                self._read_range(clip, packed, page.payload)
            try:
                data = self._codec.decompress(pa.py_buffer(packed), page.raw_size)
            except (OSError, pa.ArrowException) as error:
                raise ChecksumError(f"{self.path}: clip {clip}: {error}. {REMEDY}") from error
            pixels = np.frombuffer(data, dtype=np.uint8)[page.raw_size - size :]  # levels stand before the value
        if pixels.size != size:
            raise StoreError(f"{self.path}: clip {clip} holds {pixels.size} bytes of pixels, {size} expected. {REMEDY}")
        return pixels

    def _event_arrays(self, clip: str) -> tuple[np.ndarray, np.ndarray]:
        if not self.raw_events:
            raise StoreError(f"{self.path}: holds rendered events. Set events.representation: clip to keep the events themselves.")
        row = self._rows[clip]
        xyp, t = self._column(clip, "xyp"), self._column(clip, "t")
        if t.null_count:
            t = self._column(clip, "t_wide")
        xyp, t = _values(xyp), _values(t)
        if len(xyp) != row.n_events or len(t) != row.n_events:
            raise StoreError(f"{self.path}: clip {clip} holds {len(xyp)} events and {len(t)} times, {row.n_events} expected. {REMEDY}")
        return xyp, t

    def _column(self, clip: str, name: str) -> pa.Array:
        try:
            return self._parquet.read_row_group(self._index[clip], columns=[name], use_threads=False).column(0).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise ChecksumError(f"{self.path}: clip {clip}, column {name}: {error}. {REMEDY}") from error

    def _all_chunks(self) -> list[_seal.Chunk]:
        if self._chunks is None:
            self._chunks = _seal.locate(self._fd, self._columns, self.clips, self.path)
        return self._chunks

    def _find_pixels(self) -> None:
        """Where each clip's pixels lie, from the footer and the headers of their pages."""
        self._plain: dict[str, int] = {}
        """Offset of the bytes of a clip that is not compressed."""
        self._pages: dict[str, Page] = {}
        if self.raw_events:
            return
        columns = [column for column in self._columns if column.name == "pixels"]
        if self._chunks:
            chunks = [chunk for chunk in self._chunks if chunk.column == "pixels"]
        else:
            chunks = _seal.locate(self._fd, columns, self.clips, self.path)
        fixed = pa.types.is_fixed_size_binary(self._parquet.schema_arrow.field("pixels").type)
        for column, chunk in zip(columns, chunks, strict=True):
            row = self._rows[self.clips[chunk.row]]
            if not row.ok:
                continue
            page = self._pages[row.clip] = page_of(row, chunk.pages, column.codec, fixed=fixed, path=self.path)
            if column.codec == "none":
                self._plain[row.clip] = page.end - stored_bytes(row.encoding or "", row.sizes)
            else:
                self._codec = pa.Codec(column.codec)


def _values(lists: pa.Array) -> np.ndarray:
    """The values of an array of lists, without a copy; `to_numpy` would import pandas."""
    flat = lists.flatten()
    dtype = np.dtype(flat.type.to_pandas_dtype())
    data = flat.buffers()[1]
    return np.frombuffer(data, dtype)[flat.offset : flat.offset + len(flat)] if len(flat) else np.empty(0, dtype)
