"""Reused host memory, so that a timed read pays for its bytes and not for page faults."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import numpy as np

__all__ = ["HostBuffer", "split_frames"]

_HUGE = 2 << 20


class HostBuffer:
    """Anonymous memory that grows, is touched once (outside any timed window when `reserve` is called first) and then reused."""

    def __init__(self, nbytes: int = 0) -> None:
        self._data = np.empty(0, dtype=np.uint8)
        if nbytes:
            self.reserve(nbytes)

    def reserve(self, nbytes: int) -> None:
        """Have at least `nbytes` bytes, all of them touched. What was read into the buffer before is not kept when it grows."""
        if nbytes <= self._data.size:
            return
        memory = mmap.mmap(-1, -(-nbytes // _HUGE) * _HUGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages: 4 KiB pages do as well
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._data = np.frombuffer(memory, dtype=np.uint8)
        self._data[:] = 0  # touch every page now

    def take(self, nbytes: int) -> np.ndarray:
        """The first `nbytes` bytes, uint8 [nbytes]. The next `take` gives the same memory."""
        self.reserve(nbytes)
        return self._data[:nbytes]


def split_frames(flat: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Views [H, W, 3] into uint8 `flat`, one after the other, for (H, W) in `sizes`."""
    frames, offset = [], 0
    for height, width in sizes:
        end = offset + height * width * 3
        frames.append(flat[offset:end].reshape(height, width, 3))
        offset = end
    return frames
