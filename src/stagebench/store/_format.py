"""What a shard's columns mean: schema, row values, and the packing of colour codes and events.

Columns of every shard: clip, digest, status, reason, count, height, width, sizes, encoding, pts, indices; event shards add
t0, t1, n_events, t_dtype, p_coding. The bulk stands last: `pixels` (rendered clips), or `xyp` and `t` or `t_wide` (raw events).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from stagebench.errors import SourceError, StoreError

if TYPE_CHECKING:
    from stagebench.sources.events import Events

__all__ = [
    "BULK",
    "FORMAT_VERSION",
    "MAX_PIXELS",
    "ClipRow",
    "RowMeta",
    "holds_raw_events",
    "one_value",
    "pack_codes",
    "rgb_bytes",
    "schema",
    "stored_bytes",
    "unpack_codes",
]

FORMAT_VERSION = 1
"""Part of every extraction spec: raise it when a shard's bytes come to mean something else."""

ENCODINGS = ("rgb8", "codes2", "f32")
"""rgb8: uint8 [H, W, 3] a frame. codes2: event colours, 4 pixels a byte, first pixel in the low bits. f32: float32 [count, H, W]."""

BULK = ("pixels", "xyp", "t", "t_wide")
"""Columns guarded by page CRC alone; every other byte of the file is guarded by the structure digest."""

MAX_PIXELS = 2**31 - 64
"""A Parquet page's size is an int32."""

# white, p == 0 blue, p == 1 red, as `stagebench.render`; 3 is not written
_COLOURS = np.array([[255, 255, 255], [0, 0, 255], [255, 0, 0], [0, 0, 0]], dtype=np.uint8)
# [256, 12]: the four RGB pixels that a packed byte stands for
_LUT = _COLOURS[np.arange(256)[:, None] >> np.array([0, 2, 4, 6]) & 3].reshape(256, 12)


def holds_raw_events(kind: str, spec: Mapping[str, Any]) -> bool:
    """Whether a shard of this kind and spec holds events rather than pixels."""
    return kind == "events" and spec.get("representation") == "clip"


def schema(kind: str, *, raw_events: bool = False, fixed: int | None = None) -> pa.Schema:
    """Arrow schema of a shard. fixed: every clip's pixel bytes, or None where clips differ in size."""
    integers = pa.list_(pa.field("element", pa.int64(), nullable=False))
    fields = [
        pa.field("clip", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("count", pa.int32(), nullable=False),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("sizes", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        pa.field("encoding", pa.string()),
        pa.field("pts", integers),
        pa.field("indices", integers),
    ]
    if kind == "events":
        fields += [
            pa.field("t0", pa.int64()),
            pa.field("t1", pa.int64()),
            pa.field("n_events", pa.int64()),
            pa.field("t_dtype", pa.string()),
            pa.field("p_coding", pa.string()),
        ]
    if raw_events:
        fields += [
            pa.field("xyp", pa.list_(pa.field("element", pa.uint32(), nullable=False))),
            pa.field("t", pa.list_(pa.field("element", pa.int32(), nullable=False))),
            pa.field("t_wide", pa.list_(pa.field("element", pa.int64(), nullable=False))),
        ]
    else:
        fields.append(pa.field("pixels", pa.large_binary() if fixed is None else pa.binary(fixed)))
    return pa.schema(fields)


def stored_bytes(encoding: str, sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes of a row's pixels before compression."""
    if encoding == "rgb8":
        return rgb_bytes(sizes)
    if encoding == "codes2":
        return sum(-(-h * w // 4) for h, w in sizes)
    if encoding == "f32":
        return sum(4 * h * w for h, w in sizes)
    raise StoreError(
        f"encoding {encoding!r}: expected one of {', '.join(ENCODINGS)}. The shard is of another stagebench: extract it again."
    )


def rgb_bytes(sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes of the uint8 [H, W, 3] frames of a row."""
    return sum(3 * h * w for h, w in sizes)


def pack_codes(codes: Sequence[np.ndarray]) -> np.ndarray:
    """Event colour codes (uint8 [H, W], 0 white, 1 blue, 2 red) at 2 bits a pixel, uint8 [bytes]; each frame begins at a byte."""
    packed = []
    for frame in codes:
        flat = np.ascontiguousarray(frame, dtype=np.uint8).reshape(-1)
        if flat.size and int(flat.max()) > 2:
            raise ValueError(f"colour code {int(flat.max())}: expected 0 (white), 1 (blue) or 2 (red)")
        if flat.size % 4:
            flat = np.concatenate([flat, np.zeros(-flat.size % 4, dtype=np.uint8)])
        quads = flat.reshape(-1, 4)
        packed.append(quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6)
    return np.concatenate(packed) if packed else np.empty(0, dtype=np.uint8)


def unpack_codes(packed: np.ndarray, sizes: Sequence[tuple[int, int]], out: np.ndarray) -> None:
    """Colour packed codes into `out`, uint8 [sum of 3 H W], frame after frame."""
    pixels = [h * w for h, w in sizes]
    if not any(n % 4 for n in pixels):
        np.take(_LUT, packed, axis=0, out=out.reshape(-1, 12), mode="clip")
        return
    begin = byte = 0
    for n in pixels:
        used = -(-n // 4)
        out[begin : begin + 3 * n] = np.take(_LUT, packed[byte : byte + used], axis=0).reshape(-1)[: 3 * n]
        begin, byte = begin + 3 * n, byte + used


@dataclass(frozen=True)
class RowMeta:
    """A clip's row without its bulk."""

    clip: str
    digest: str
    """Content digest of the files that the row was made from."""
    status: str
    """ok, or error: then `reason` says why and there is no bulk."""
    reason: str
    count: int = 0
    """Frames, bins, or for raw events 0."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) of each frame."""
    encoding: str | None = None
    pts: tuple[int, ...] = ()
    """When each frame was: the stream's time base for video, µs for events, an ordinal for folders."""
    indices: tuple[int, ...] = ()
    """Which of the clip's frames these are, in presentation order."""
    t0: int | None = None
    """First event, µs as the source has it; offsets are taken from here."""
    t1: int | None = None
    n_events: int | None = None
    t_dtype: str | None = None
    p_coding: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def rgb_bytes(self) -> int:
        """Host memory that the clip's frames take as uint8 [H, W, 3]."""
        return rgb_bytes(self.sizes)


@dataclass(frozen=True)
class ClipRow:
    """A row to write. Made by one of the class methods."""

    meta: RowMeta
    pixels: np.ndarray | None = None
    """uint8 [bytes], as `encoding` says."""
    xyp: np.ndarray | None = None
    """uint32 [n]: p << 31 | y << 16 | x."""
    t: np.ndarray | None = None
    """int32 or int64 [n], µs since t0."""

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.pixels, self.xyp, self.t) if a is not None)

    @classmethod
    def failed(cls, clip: str, digest: str, reason: str) -> ClipRow:
        """A clip that could not be read."""
        return cls(RowMeta(clip, digest, "error", reason))

    @classmethod
    def from_frames(cls, clip: str, digest: str, frames: Any, *, pts: Any = (), indices: Any = (), **event_meta: Any) -> ClipRow:
        """frames: uint8 [T, H, W, 3], or a sequence of uint8 [H, W, 3] of any sizes."""
        for frame in frames:
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise StoreError(
                    f"{clip}: frame of {frame.dtype} {frame.shape}, expected uint8 [H, W, 3]. Convert it to RGB before it is stored."
                )
        if isinstance(frames, np.ndarray):
            flat = np.ascontiguousarray(frames).reshape(-1)
        else:
            flat = np.concatenate([np.ascontiguousarray(f).reshape(-1) for f in frames]) if len(frames) else np.empty(0, np.uint8)
        sizes = [f.shape[:2] for f in frames]
        return cls(_meta(clip, digest, "rgb8", sizes, pts, indices, event_meta), pixels=flat)

    @classmethod
    def from_codes(
        cls, clip: str, digest: str, codes: Sequence[np.ndarray], *, pts: Any = (), indices: Any = (), **event_meta: Any
    ) -> ClipRow:
        """codes: uint8 [H, W] a frame, 0 white, 1 blue, 2 red."""
        return cls(_meta(clip, digest, "codes2", [c.shape for c in codes], pts, indices, event_meta), pixels=pack_codes(codes))

    @classmethod
    def from_grid(cls, clip: str, digest: str, grid: np.ndarray, *, pts: Any = (), indices: Any = (), **event_meta: Any) -> ClipRow:
        """grid: float32 [bins, H, W]."""
        if grid.dtype != np.float32 or grid.ndim != 3:
            raise StoreError(
                f"{clip}: voxel grid of {grid.dtype} {grid.shape}, expected float32 [bins, H, W]. Cast it before it is stored."
            )
        sizes = [grid.shape[1:]] * grid.shape[0]
        flat = np.ascontiguousarray(grid).reshape(-1).view(np.uint8)
        return cls(_meta(clip, digest, "f32", sizes, pts, indices, event_meta), pixels=flat)

    @classmethod
    def from_events(cls, clip: str, digest: str, events: Events) -> ClipRow:
        """The events themselves, so that `Shard.events` gives back equal arrays, dtypes and codings.

        Raises SourceError for y above 32767, which 15 bits do not hold.
        """
        n = len(events.t)
        if n and int(events.y.max()) > 0x7FFF:
            raise SourceError(
                f"{clip}: y up to {int(events.y.max())}, a packed event holds 32767. Crop the recording, or use representation: frames."
            )
        xyp = events.p.astype(np.uint32)
        xyp <<= 31
        xyp |= events.y.astype(np.uint32) << 16
        xyp |= events.x
        t = np.asarray(events.t, dtype=np.int64)
        t0 = int(t[0]) if n else 0
        low, high = (int(t.min()), int(t.max())) if n else (0, 0)
        narrow = low - t0 >= -(2**31) and high - t0 < 2**31
        if not narrow and high - low >= 2**63:
            raise SourceError(f"{clip}: times span {low} to {high} µs, beyond int64. The recording is damaged: remove the clip.")
        offsets = (t - t0).astype(np.int32) if narrow else t - t0
        meta = RowMeta(clip, digest, "ok", "", t0=t0, t1=high if n else None, n_events=n, t_dtype=events.t_dtype, p_coding=events.p_coding)
        return cls(meta, xyp=xyp, t=offsets)

    def table(self, target: pa.Schema) -> pa.Table:
        """One row in the target schema; bulk arrays are wrapped, not copied."""
        meta = self.meta
        same = len(set(meta.sizes)) == 1
        values: dict[str, Any] = {
            "clip": meta.clip,
            "digest": meta.digest,
            "status": meta.status,
            "reason": meta.reason,
            "count": meta.count,
            "height": max((h for h, _ in meta.sizes), default=None),
            "width": max((w for _, w in meta.sizes), default=None),
            "sizes": None if same or not meta.sizes else [n for size in meta.sizes for n in size],
            "encoding": meta.encoding,
            "pts": list(meta.pts) if meta.ok else None,
            "indices": list(meta.indices) if meta.ok else None,
            **{name: getattr(meta, name) for name in ("t0", "t1", "n_events", "t_dtype", "p_coding")},
        }
        bulk = {"pixels": self.pixels, "xyp": self.xyp}
        if self.t is not None:
            bulk["t" if self.t.dtype == np.int32 else "t_wide"] = self.t
        columns = [one_value(f.type, bulk.get(f.name) if f.name in BULK else values[f.name]) for f in target]
        return pa.Table.from_arrays(columns, schema=target)


def _meta(
    clip: str, digest: str, encoding: str, sizes: Sequence[Sequence[int]], pts: Any, indices: Any, event_meta: Mapping[str, Any]
) -> RowMeta:
    sized = tuple((int(h), int(w)) for h, w in sizes)
    for name, values in (("pts", pts), ("indices", indices)):
        if len(values) not in (0, len(sized)):
            raise StoreError(f"{clip}: {len(values)} {name} for {len(sized)} frames. Give one a frame, or none.")
    return RowMeta(
        clip,
        digest,
        "ok",
        "",
        count=len(sized),
        sizes=sized,
        encoding=encoding,
        pts=tuple(int(v) for v in pts),
        indices=tuple(int(v) for v in indices),
        **event_meta,
    )


def one_value(kind: pa.DataType, value: Any) -> pa.Array:
    """An Arrow array of one value. From buffers, which copies nothing; `pa.array` and `pa.scalar` also import pandas, for half a second."""
    if value is None:
        return pa.nulls(1, kind)
    if pa.types.is_fixed_size_binary(kind):
        return pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(value)])
    if pa.types.is_list(kind):
        data = np.ascontiguousarray(value, dtype=kind.value_type.to_pandas_dtype())
        child = pa.Array.from_buffers(kind.value_type, data.size, [None, pa.py_buffer(data)])
        return pa.Array.from_buffers(kind, 1, [None, _offsets(data.size, np.int32)], children=[child])
    if pa.types.is_string(kind):
        data = value.encode()
        return pa.Array.from_buffers(kind, 1, [None, _offsets(len(data), np.int32), pa.py_buffer(data)])
    if pa.types.is_large_binary(kind):
        return pa.Array.from_buffers(kind, 1, [None, _offsets(value.nbytes, np.int64), pa.py_buffer(value)])
    return pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(np.array([value], dtype=kind.to_pandas_dtype()))])


def _offsets(size: int, dtype: type) -> pa.Buffer:
    return pa.py_buffer(np.array([0, size], dtype=dtype))
