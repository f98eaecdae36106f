"""Reading a shard: verified and mapped when opened, then each clip by one copy into memory that is there already."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.errors import ChecksumError, StoreError
from stagebench.store import _seal
from stagebench.store._buffer import HostBuffer, split_frames
from stagebench.store._format import BULK, FORMAT_VERSION, ClipRow, RowMeta, holds_raw_events, schema, stored_bytes, unpack_codes
from stagebench.store._mapping import MappedFile, map_file
from stagebench.store._pages import Page

if TYPE_CHECKING:
    from stagebench.sources.events import Events

__all__ = ["Shard"]

_AGAIN = "Delete the file: the next run extracts it again."
_DISK = "Check the disk, or its connection, and run again; if that does not help, delete the file: it is extracted again."
_MAX_FRAMES = 1 << 20
"""Of one clip. A forged row would take memory for what it claims before its page is looked at."""


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
        try:
            self._footer, self._columns = _seal.check_tail(fd, path)  # before Arrow sees the file
            self._parquet = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
            if not os.path.samestat(os.fstat(fd), path.stat()):
                raise ValueError("replaced while it was opened")
            self._metadata = self._parquet.metadata
            self._read_meta()
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: not a shard of stagebench: {error}. {_AGAIN}") from error

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
            shard._read_rows()
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
            raise ChecksumError(f"{self.path}: {error}. {_AGAIN}") from None
        threads = threads or min(8, len(os.sched_getaffinity(0)))
        if not sound:
            _seal.check_payloads(self._fd, chunks, self.clips, self.path, threads)  # names the clip where a page is at fault
            raise ChecksumError(f"{self.path}: bytes outside the pages changed since they were written. {_AGAIN}")
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
                raise StoreError(f"{self.path}: the file ends inside clip {clip}: it was cut while in use. {_AGAIN}")
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
                raise ChecksumError(f"{self.path}: clip {clip}: {error}. {_AGAIN}") from error
            pixels = np.frombuffer(data, dtype=np.uint8)[page.raw_size - size :]  # levels stand before the value
        if pixels.size != size:
            raise StoreError(f"{self.path}: clip {clip} holds {pixels.size} bytes of pixels, {size} expected. {_AGAIN}")
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
            raise StoreError(f"{self.path}: clip {clip} holds {len(xyp)} events and {len(t)} times, {row.n_events} expected. {_AGAIN}")
        return xyp, t

    def _column(self, clip: str, name: str) -> pa.Array:
        try:
            return self._parquet.read_row_group(self._index[clip], columns=[name], use_threads=False).column(0).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise ChecksumError(f"{self.path}: clip {clip}, column {name}: {error}. {_AGAIN}") from error

    def _read_meta(self) -> None:
        values = {k.decode(): v.decode() for k, v in (self._metadata.metadata or {}).items() if k.startswith(b"stagebench.")}
        if values["stagebench.format"] != str(FORMAT_VERSION):
            raise ValueError(f"format {values['stagebench.format']}, expected {FORMAT_VERSION}")
        self.kind: str = values["stagebench.kind"]
        self.spec: Mapping[str, Any] = json.loads(values["stagebench.spec"])
        self.writer: Mapping[str, str] = json.loads(values["stagebench.writer"])
        """Versions of what wrote the shard."""
        listed = json.loads(values["stagebench.clips"])
        self.digests: Mapping[str, str] = {entry["clip"]: entry["digest"] for entry in listed}
        """Content digest of each clip's source files."""
        self.clips: tuple[str, ...] = tuple(self.digests)
        self._index = {clip: row for row, clip in enumerate(self.clips)}
        self._body = values[_seal.BODY_KEY]
        self._chunks: list[_seal.Chunk] | None = None
        self.raw_events = holds_raw_events(self.kind, self.spec)
        found = self._parquet.schema_arrow.remove_metadata()
        fixed = found.field("pixels").type if "pixels" in found.names else None
        expected = schema(
            self.kind, raw_events=self.raw_events, fixed=getattr(fixed, "byte_width", None) if fixed != pa.large_binary() else None
        )
        if not found.equals(expected):
            raise ValueError(f"columns {_differences(found, expected)}")
        if not len(listed) == len(self.clips) == self._metadata.num_row_groups == self._metadata.num_rows:
            raise ValueError(
                f"{len(listed)} clips named, {self._metadata.num_row_groups} row groups and {self._metadata.num_rows} rows found"
            )
        if [(c.row, c.name) for c in self._columns] != [(row, name) for row in range(len(self.clips)) for name in expected.names]:
            raise ValueError("row groups of other columns than the schema's")

    def _all_chunks(self) -> list[_seal.Chunk]:
        if self._chunks is None:
            self._chunks = _seal.locate(self._fd, self._columns, self.clips, self.path)
        return self._chunks

    def _read_rows(self) -> None:
        names = [name for name in self._parquet.schema_arrow.names if name not in BULK]
        try:
            table = self._parquet.read(columns=names, use_threads=False).to_pylist()
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise ChecksumError(f"{self.path}: {error}. {_AGAIN}") from error
        if len(table) != len(self.clips):
            raise StoreError(f"{self.path}: {len(table)} rows, {len(self.clips)} expected, one for each clip. {_AGAIN}")
        self._rows = {clip: _row(values) for clip, values in zip(self.clips, table, strict=True)}
        self._plain: dict[str, int] = {}
        self._pages: dict[str, Page] = {}
        for clip, row in self._rows.items():
            if row.clip != clip or row.digest != self.digests[clip]:
                raise StoreError(f"{self.path}: row of {row.clip} where the footer names {clip}. {_AGAIN}")
        if not self.raw_events:
            pixels = [column for column in self._columns if column.name == "pixels"]
            found = (
                (c for c in self._chunks if c.column == "pixels") if self._chunks else _seal.locate(self._fd, pixels, self.clips, self.path)
            )
            for column, chunk in zip(pixels, found, strict=True):
                self._place(self.clips[chunk.row], chunk.pages, column.codec)

    def _place(self, clip: str, pages: tuple[Page, ...], codec: str) -> None:
        """Note where an uncompressed clip's bytes lie, and refuse a page that cannot hold what the row says."""
        row = self._rows[clip]
        if not row.ok:
            return
        size = stored_bytes(row.encoding or "", row.sizes)
        fixed = pa.types.is_fixed_size_binary(self._parquet.schema_arrow.field("pixels").type)
        # a page of one nullable value: int32 length of the levels, 2 bytes of levels, (int32 length of the value,) the value
        expected = size + 6 + (0 if fixed else 4)
        raw, stored = sum(page.raw_size for page in pages), sum(page.size for page in pages)
        sizes = (raw, stored) if codec == "none" else (raw,)
        if len(pages) != 1 or pages[0].num_values != 1 or not pages[0].plain or any(found != expected for found in sizes):
            raise StoreError(
                f"{self.path}: clip {clip}: {raw} bytes, {stored} stored, in {len(pages)} page(s), "
                f"{expected} in one expected for {row.count} frames of {row.sizes[0] if row.sizes else ()}. {_AGAIN}"
            )
        self._pages[clip] = pages[0]
        if codec == "none":
            self._plain[clip] = pages[0].end - size
        else:
            self._codec = pa.Codec(codec)


def _row(values: Mapping[str, Any]) -> RowMeta:
    count, flat = values["count"], values["sizes"]
    if not 0 <= count <= _MAX_FRAMES:
        raise StoreError(f"clip {values['clip']}: {count} frames, at most {_MAX_FRAMES} are read. {_AGAIN}")
    sizes = ((values["height"], values["width"]),) * count if flat is None else tuple(zip(flat[::2], flat[1::2], strict=False))
    odd = flat is not None and len(flat) != 2 * count
    if odd or len(sizes) != count or any(h is None or w is None or h < 0 or w < 0 for h, w in sizes):
        raise StoreError(f"clip {values['clip']}: sizes {sizes} of {count} frames. {_AGAIN}")
    optional = ("encoding", "t0", "t1", "n_events", "t_dtype", "p_coding")
    return RowMeta(
        values["clip"],
        values["digest"],
        values["status"],
        values["reason"],
        **{name: values.get(name) for name in optional},
        count=count,
        sizes=sizes,
        pts=tuple(values["pts"] or ()),
        indices=tuple(values["indices"] or ()),
    )


def _values(lists: pa.Array) -> np.ndarray:
    """The values of an array of lists, without a copy; `to_numpy` would import pandas."""
    flat = lists.flatten()
    dtype = np.dtype(flat.type.to_pandas_dtype())
    data = flat.buffers()[1]
    return np.frombuffer(data, dtype)[flat.offset : flat.offset + len(flat)] if len(flat) else np.empty(0, dtype)


def _differences(found: pa.Schema, expected: pa.Schema) -> str:
    if found.names != expected.names:
        return f"{', '.join(found.names)}; expected {', '.join(expected.names)}"
    return "; ".join(f"{f.name} is {f.type}, expected {e.type}" for f, e in zip(found, expected, strict=True) if not f.equals(e))
