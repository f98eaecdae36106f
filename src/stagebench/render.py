"""Events to pictures: event frames by the two published rules, voxel grids, histograms.

The rules, pixel for pixel (white background, p == 0 blue (0, 0, 255), p == 1 red (255, 0, 0)):

* `original` (EventGPT's own code): events in order, the last one at a pixel wins.
* `negative_on_top` (the other published renderer): p == 0 wins over p == 1 wherever both are.

A clip is cut into parts of equal count, floor(n / parts) events each and the rest in the last one, as the original does; or of equal time.
numba's kernels and the numpy way give the same pixels; numba is used when it can be imported.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from stagebench.errors import ConfigError, CorruptClipError, ShortClipError

if TYPE_CHECKING:
    from stagebench.sources.events import Events

__all__ = [
    "KERNELS",
    "Policy",
    "Size",
    "Split",
    "codes_to_rgb",
    "event_codes",
    "event_frames",
    "event_histogram",
    "prepare",
    "split_events",
    "voxel_grid",
    "voxel_to_frames",
]

Policy = Literal["original", "negative_on_top"]
Split = Literal["count", "time"]
Size = Literal["sensor", "clip", "part"]

MAX_PIXELS = 1 << 25
"""Of one frame. Coordinates are 16 bits: two stray events could ask for 12 GiB a frame."""

KERNELS = ("rgb_last", "rgb_negative", "codes_last", "codes_negative", "voxel", "histogram")
"""Compiled loops: event frames and codes by policy (original, negative_on_top), voxel grid, histogram."""

_PALETTE = np.array([[255, 255, 255], [0, 0, 255], [255, 0, 0]], np.uint8)

log = logging.getLogger(__name__)


def event_frames(
    events: Events,
    *,
    parts: int,
    split: Split = "count",
    policy: Policy = "original",
    size: Size = "sensor",
    sensor: tuple[int, int] | None = None,
) -> list[np.ndarray]:
    """Event frames of a clip: `parts` uint8 arrays [H, W, 3], RGB.

    size "sensor": `sensor` (height, width). "clip": the clip's own extent, max+1. "part": each part's own extent, as the original code;
    then frames differ in size. With `sensor` given, an event beyond it is an error whatever the size.
    A part of equal time may hold no event: it is white ("part" has no extent then, and refuses).

    Raises ShortClipError for no events, or fewer than parts where that leaves a part without size or events by count; CorruptClipError
    for events beyond the sensor or a frame above MAX_PIXELS; ConfigError for size "sensor" without a sensor.
    """
    return [_render(events, part, shape, policy, rgb=True) for part, shape in _plan(events, parts, split, policy, size, sensor)]


def event_codes(
    events: Events,
    *,
    parts: int,
    split: Split = "count",
    policy: Policy = "original",
    size: Size = "sensor",
    sensor: tuple[int, int] | None = None,
) -> list[np.ndarray]:
    """As event_frames, in colour codes: uint8 [H, W], 0 white, 1 blue, 2 red. What the store packs into 2 bits."""
    return [_render(events, part, shape, policy, rgb=False) for part, shape in _plan(events, parts, split, policy, size, sensor)]


def codes_to_rgb(codes: np.ndarray) -> np.ndarray:
    """uint8 codes [...] -> uint8 RGB [..., 3]."""
    return _PALETTE[codes]


def split_events(events: Events, parts: int, split: Split = "count") -> list[slice]:
    """Where the clip is cut: `parts` slices of its events, together all of them."""
    n = len(events)
    if parts < 1:
        raise ConfigError(f"events.parts: {parts}, expected 1 or more.")
    if n == 0:
        raise ShortClipError("the clip holds no events. Leave it out of the index.")
    if split == "count":
        if n < parts:
            raise ShortClipError(f"the clip holds {n} events, {parts} parts were asked for. Lower events.parts, or leave the clip out.")
        each = n // parts
        edges = [i * each for i in range(parts)] + [n]
    elif split == "time":
        # Integers: part k holds first + k*span//parts <= t < first + (k+1)*span//parts, and the last event falls into the last part.
        first, span = int(events.t[0]), int(events.t[-1]) - int(events.t[0]) + 1
        inner = [first + k * span // parts for k in range(1, parts)]
        edges = [0, *(int(i) for i in np.searchsorted(events.t, np.array(inner, np.int64))), n]
    else:
        raise ConfigError(f"events.split: {split!r}, expected one of {get_args(Split)}.")
    return [slice(a, b) for a, b in pairwise(edges)]


def voxel_grid(events: Events, bins: int, sensor: tuple[int, int]) -> np.ndarray:
    """float32 [bins, H, W]: each event adds its sign (+1, -1), shared linearly between the two nearest time bins (tonic's `to_voxel_grid`).

    With t scaled to [0, bins]: floor(t) gets 1 - frac(t), floor(t) + 1 gets frac(t), what falls on bin `bins` is dropped. Shares and sums
    are float32 in the order of the events: a value that n events add to is off the exact sum by at most n * (n + 5) * 2**-25 (half a
    unit in the last place at each step); numba and numpy give the same bits. All events at one time count for bin 0,
    where tonic divides by zero. Raises as event_frames does.
    """
    if bins < 1:
        raise ConfigError(f"voxel bins: {bins}, expected 1 or more. Set events.parts.")
    if len(events) == 0:
        raise ShortClipError("the clip holds no events. Leave it out of the index.")
    height, width = _checked_sensor(events, sensor, bins)
    plane = height * width
    first, span = int(events.t[0]), int(events.t[-1]) - int(events.t[0])
    # integers: bin b begins at the first t with bins * (t - first) >= b * span
    inner = np.array([first - (-b * span // bins) for b in range(1, bins + 1)], np.int64)
    edges = np.append(0, np.searchsorted(events.t, inner) if span else np.full(bins, len(events))).astype(np.int64)
    t0, scale = float(first), bins / (float(span) or 1.0)
    kernel = _kernel()
    if kernel is not None:
        grid = np.empty(bins * plane, np.float32)
        kernel("voxel")(events.x, events.y, events.p, events.t, edges, t0, scale, bins, width, plane, grid)
    else:
        grid = np.zeros(bins * plane, np.float32)
        bin_ = np.repeat(np.arange(bins), np.diff(edges))
        kept = slice(0, int(edges[-1]))
        sign = events.p[kept].astype(np.float32) * np.float32(2) - np.float32(1)
        share = ((events.t[kept].astype(np.float64) - t0) * scale - bin_).astype(np.float32) * sign
        cell = bin_ * plane + events.y[kept].astype(np.int64) * width + events.x[kept]
        right = bin_ + 1 < bins
        np.add.at(grid, cell[right] + plane, share[right])  # a bin's right shares come before the next one's left ones
        np.add.at(grid, cell, sign - share)
    return grid.reshape(bins, height, width)


def event_histogram(events: Events, sensor: tuple[int, int]) -> np.ndarray:
    """int32 [2, H, W]: events a pixel, p == 0 first (tonic's `to_frame` with one bin, in 32 bits where its 16 run over)."""
    height, width = _checked_sensor(events, sensor, 2)
    plane = height * width
    kernel = _kernel()
    if kernel is not None:
        counts = np.zeros(2 * plane, np.int32)
        kernel("histogram")(events.x, events.y, events.p, width, plane, counts)
    else:
        pixel = events.p.astype(np.int64) * plane + events.y.astype(np.int64) * width + events.x
        counts = np.bincount(pixel, minlength=2 * plane).astype(np.int32)
    return counts.reshape(2, height, width)


def voxel_to_frames(grid: np.ndarray) -> list[np.ndarray]:
    """A voxel grid as pictures that an image encoder takes: uint8 [H, W, 3] a bin, grey, 128 for zero, one scale for the whole clip
    so that its largest magnitude lands on 1 or 255."""
    peak = float(np.abs(grid).max()) if grid.size else 0.0
    scaled = np.rint(grid * np.float32(127.0 / peak if peak else 0.0)) + 128.0
    grey = scaled.astype(np.uint8)
    return [np.repeat(plane[:, :, None], 3, axis=2) for plane in grey]


def prepare(names: Sequence[str] = KERNELS) -> float:
    """Compile kernels now, so that no timed load pays for it. Returns the milliseconds it took; 0 without numba, or the second time."""
    kernel = _kernel()
    if kernel is None:
        return 0.0
    began = time.perf_counter_ns()
    for name in names:
        kernel(name)
    return (time.perf_counter_ns() - began) / 1e6


@functools.cache
def _kernel() -> Callable[[str], Callable[..., None]] | None:
    """Gives compiled kernels by name; None where numba cannot be imported."""
    try:
        from stagebench._kernels import kernel
    except ImportError as error:
        # numba lags behind numpy and Python releases, and says so by an ImportError of its own
        log.info("numba cannot be used (%s): events are rendered by numpy, same pixels, several times slower", error)
        return None
    return kernel


def _extent(events: Events, part: slice) -> tuple[int, int]:
    return int(events.y[part].max()) + 1, int(events.x[part].max()) + 1


def _checked_sensor(events: Events, sensor: tuple[int, int], planes: int = 1) -> tuple[int, int]:
    height, width = sensor
    if len(events):
        need = _extent(events, slice(None))
        if need[0] > height or need[1] > width:
            raise CorruptClipError(
                f"events reach {need[0]} rows and {need[1]} columns, the sensor has {height} and {width}. Correct sensor: "
                "[height, width], or leave the clip out."
            )
    _check_pixels((height, width), planes)
    return height, width


def _check_pixels(shape: tuple[int, int], planes: int = 1) -> None:
    if shape[0] * shape[1] * max(1, planes // 16) > MAX_PIXELS:
        raise CorruptClipError(
            f"a frame of {shape[1]}x{shape[0]} pixels, at most {MAX_PIXELS:,} are drawn. "
            "Stray coordinates? Set the dataset's sensor to refuse them."
        )


def _plan(
    events: Events, parts: int, split: Split, policy: Policy, size: Size, sensor: tuple[int, int] | None
) -> list[tuple[slice, tuple[int, int]]]:
    """What each frame shows, and its (height, width)."""
    if policy not in get_args(Policy):
        raise ConfigError(f"events.policy: {policy!r}, expected one of {get_args(Policy)}.")
    if size not in get_args(Size):
        raise ConfigError(f"events.size: {size!r}, expected one of {get_args(Size)}.")
    cuts = split_events(events, parts, split)
    if sensor is not None:
        _checked_sensor(events, sensor)
    if size == "part":
        empty = [k for k, part in enumerate(cuts) if part.stop == part.start]
        if empty:
            raise ShortClipError(
                f"part {empty[0]} of {parts} holds no event and so has no extent. Use events.size: sensor or clip, or split: count."
            )
        shapes = [_extent(events, part) for part in cuts]
    elif size == "clip":
        shapes = [_extent(events, slice(None))] * parts
    else:
        if sensor is None:
            raise ConfigError("events.size: sensor needs the dataset's sensor: [height, width]. Set it, or use size: clip.")
        shapes = [sensor] * parts
    for shape in shapes:
        _check_pixels(shape)
    return list(zip(cuts, shapes, strict=True))


def _render(events: Events, part: slice, shape: tuple[int, int], policy: Policy, *, rgb: bool) -> np.ndarray:
    height, width = shape
    x, y, p = events.x[part], events.y[part], events.p[part]
    negative = policy == "negative_on_top"
    kernel = _kernel()
    if kernel is not None and rgb:
        image = np.full(height * width * 3, 255, np.uint8)
        kernel("rgb_negative" if negative else "rgb_last")(x, y, p, width, image)
        return image.reshape(height, width, 3)
    codes = np.zeros(height * width, np.uint8)
    if kernel is not None:
        kernel("codes_negative" if negative else "codes_last")(x, y, p, width, codes)
    else:
        pixel = y.astype(np.int64) * width + x
        if negative:
            codes[pixel[p == 1]] = 2
            codes[pixel[p == 0]] = 1
        else:
            codes[pixel] = p + np.uint8(1)  # numpy keeps the last of several assignments to one place
    picture = codes.reshape(height, width)
    return codes_to_rgb(picture) if rgb else picture
