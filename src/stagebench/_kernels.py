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


def _voxel(x, y, p, t, t0, span, bins, width, sums, grid):  # type: ignore[no-untyped-def]
    """Each event's sign, shared between its two nearest bins in time, into a float32 flat [bins*H*W].

    sums: float64 flat [H*W], overwritten. Events come in the order of time, so a bin's are one run of them and only one plane of sums
    is in use, which stays in the processor's cache. All left shares come before all right ones: floating-point sums depend on their
    order, and this is the order of the definition."""
    plane = sums.size
    for k in range(plane):
        sums[k] = 0.0
    before = 0  # first event of the bin before
    i = 0
    for b in range(bins):
        begin = i
        while i < x.size:
            at = bins * (np.float64(t[i]) - t0) / span
            if np.int64(at) != b:
                break
            sums[np.int64(y[i]) * width + np.int64(x[i])] += (2.0 * p[i] - 1.0) * (1.0 - (at - b))
            i += 1
        for j in range(before, begin):
            at = bins * (np.float64(t[j]) - t0) / span
            sums[np.int64(y[j]) * width + np.int64(x[j])] += (2.0 * p[j] - 1.0) * (at - (b - 1))
        before = begin
        out = grid[b * plane : (b + 1) * plane]  # a slice, for the compiler vectorises a plain index only
        for k in range(plane):
            out[k] = np.float32(sums[k])
            sums[k] = 0.0


def _histogram(x, y, p, width, plane, counts):  # type: ignore[no-untyped-def]
    """Events a pixel and polarity into int32 flat [2*H*W]."""
    for i in range(x.size):
        counts[np.int64(p[i]) * plane + np.int64(y[i]) * width + np.int64(x[i])] += 1


_SOURCES: dict[str, tuple[Callable[..., None], Any]] = {
    "rgb_last": (_rgb_last, types.void(*_XYP, _INT, _BYTES)),
    "rgb_negative": (_rgb_negative, types.void(*_XYP, _INT, _BYTES)),
    "codes_last": (_codes_last, types.void(*_XYP, _INT, _BYTES)),
    "codes_negative": (_codes_negative, types.void(*_XYP, _INT, _BYTES)),
    "voxel": (_voxel, types.void(*_XYP, _T, _FLOAT, _FLOAT, _INT, _INT, types.Array(_FLOAT, 1, "C"), types.Array(types.float32, 1, "C"))),
    "histogram": (_histogram, types.void(*_XYP, _INT, _INT, types.Array(types.int32, 1, "C"))),
}


@functools.cache
def kernel(name: str) -> Callable[..., None]:
    """The compiled kernel. Releases the GIL while it runs."""
    function, signature = _SOURCES[name]
    compiled: Callable[..., None] = numba.njit(signature, nogil=True, fastmath=False)(function)
    return compiled
