"""The renderer's inner loops, compiled by numba. They hold no check: `render` has made sure that every event lies in its array.

One compiled form a kernel, for read-only and unaligned input: columns that view a file's bytes are both, and numba would otherwise compile
again, inside a timed load, for each combination that turns up. Not cached on disk: a cache beside the sources is written by whoever
runs first, and several jobs of a cluster start at once. Compiling takes 0.2 to 0.5 s a kernel; `render.prepare()` does it ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

__all__ = ["kernel"]


def _input(dtype: Any) -> Any:
    return types.Array(dtype, 1, "C", readonly=True, aligned=False)


_XYP = (_input(types.uint16), _input(types.uint16), _input(types.uint8))
_T = _input(types.int64)
_BYTES = types.Array(types.uint8, 1, "C")
_INT = types.int64
_FLOAT = types.float64


def _rgb_last(x, y, p, width, image):  # type: ignore[no-untyped-def]
    """Events in order into a white image, uint8 flat [H*W*3]: the last one at a pixel stays. p 0 (0,0,255), 1 (255,0,0), no branch."""
    for i in range(x.size):
        at = (np.int64(y[i]) * width + np.int64(x[i])) * 3
        red = np.uint8(-np.int64(p[i]) & 255)
        image[at] = red
        image[at + 1] = 0
        image[at + 2] = red ^ np.uint8(255)


def _rgb_negative(x, y, p, width, image):  # type: ignore[no-untyped-def]
    """As _rgb_last, but blue stays: once a p 0 event has cleared a pixel's red it never comes back (white has it set, too)."""
    for i in range(x.size):
        at = (np.int64(y[i]) * width + np.int64(x[i])) * 3
        red = np.uint8(image[at] & (-np.int64(p[i]) & 255))
        image[at] = red
        image[at + 1] = 0
        image[at + 2] = red ^ np.uint8(255)


def _codes_last(x, y, p, width, codes):  # type: ignore[no-untyped-def]
    """Colour codes, uint8 flat [H*W]: 0 untouched, 1 p==0, 2 p==1."""
    for i in range(x.size):
        codes[np.int64(y[i]) * width + np.int64(x[i])] = p[i] + 1


def _codes_negative(x, y, p, width, codes):  # type: ignore[no-untyped-def]
    """As _codes_last with p 0 on top: bits of both are gathered, then 3 becomes 1."""
    for i in range(x.size):
        codes[np.int64(y[i]) * width + np.int64(x[i])] |= p[i] + 1
    for i in range(codes.size):
        codes[i] = codes[i] if codes[i] < 3 else 1


def _voxel(x, y, p, t, edges, t0, scale, bins, width, plane, grid):  # type: ignore[no-untyped-def]
    """Each event's sign, shared between its two nearest bins in time, into a float32 flat [bins*H*W], which is overwritten.

    edges: int64 [bins + 1], the first event of each bin; scale: bins a microsecond. Events come in the order of time, so two planes are in
    use at a time, and each is cleared just before its first event: they stay in the processor's cache. Unsigned indices, for numba looks
    at the sign of every other one."""
    first = grid[:plane]  # a slice, for the compiler vectorises a plain index only
    for k in range(plane):
        first[k] = 0.0
    columns = np.uint32(width)
    for b in range(bins):
        left = grid[b * plane : (b + 1) * plane]
        if b + 1 < bins:
            right = grid[(b + 1) * plane : (b + 2) * plane]
            for k in range(plane):
                right[k] = 0.0
            for i in range(np.uint64(edges[b]), np.uint64(edges[b + 1])):
                pixel = np.uint64(np.uint32(y[i]) * columns + np.uint32(x[i]))
                sign = np.float32(2 * np.int32(p[i]) - 1)
                share = np.float32((np.float64(t[i]) - t0) * scale - b) * sign
                left[pixel] += sign - share
                right[pixel] += share
        else:
            for i in range(np.uint64(edges[b]), np.uint64(edges[b + 1])):
                pixel = np.uint64(np.uint32(y[i]) * columns + np.uint32(x[i]))
                sign = np.float32(2 * np.int32(p[i]) - 1)
                share = np.float32((np.float64(t[i]) - t0) * scale - b) * sign
                left[pixel] += sign - share


def _histogram(x, y, p, width, plane, counts):  # type: ignore[no-untyped-def]
    """Events a pixel and polarity into int32 flat [2*H*W]."""
    for i in range(x.size):
        counts[np.int64(p[i]) * plane + np.int64(y[i]) * width + np.int64(x[i])] += 1


_SOURCES: dict[str, tuple[Callable[..., None], Any]] = {
    "rgb_last": (_rgb_last, types.void(*_XYP, _INT, _BYTES)),
    "rgb_negative": (_rgb_negative, types.void(*_XYP, _INT, _BYTES)),
    "codes_last": (_codes_last, types.void(*_XYP, _INT, _BYTES)),
    "codes_negative": (_codes_negative, types.void(*_XYP, _INT, _BYTES)),
    "voxel": (
        _voxel,
        types.void(*_XYP, _T, types.Array(_INT, 1, "C"), _FLOAT, _FLOAT, _INT, _INT, _INT, types.Array(types.float32, 1, "C")),
    ),
    "histogram": (_histogram, types.void(*_XYP, _INT, _INT, types.Array(types.int32, 1, "C"))),
}


@functools.cache
def kernel(name: str) -> Callable[..., None]:
    """The compiled kernel. Releases the GIL while it runs."""
    function, signature = _SOURCES[name]
    compiled: Callable[..., None] = numba.njit(signature, nogil=True, fastmath=False)(function)
    return compiled
