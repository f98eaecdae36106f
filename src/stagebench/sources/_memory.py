"""Memory for frames that is used again once nobody holds them: the system clears each fresh page, which costs as much as writing it."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections import deque

import numpy as np

__all__ = ["empty"]

_HUGE = 2 << 20
_LEAST = 32 << 20
"""Bytes from which on glibc's malloc gives a block back to the system at once (DEFAULT_MMAP_THRESHOLD_MAX); smaller ones it keeps."""
_LARGEST = 256 << 20
"""Bytes that are not kept: a process must not hold on to the memory of one large clip."""
_KEPT = 4
"""Blocks that wait for use: at most 1 GiB, and 150 MB for clips of 8 x 1440x1080. A system that runs short takes their memory back."""

# Appending and popping are atomic, so this needs no lock, which a collector that runs within it could wait for in vain.
_free: deque[mmap.mmap] = deque(maxlen=_KEPT)


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of that shape, its values undefined. Safe in threads; after a fork each process has its own. Raises MemoryError."""
    size = math.prod(shape)
    try:
        if not _LEAST <= size <= _LARGEST:
            return np.empty(shape, np.uint8)
        block = _take(-(-size // _HUGE) * _HUGE)
    except (OSError, MemoryError):  # mmap says it as an OSError
        _free.clear()
        return np.empty(shape, np.uint8)
    whole = np.frombuffer(block, np.uint8, size)
    # `whole` is the base of every view of these bytes: it ends with the last of them
    weakref.finalize(whole, _wait, block).atexit = False
    return whole.reshape(shape)


def _wait(block: mmap.mmap) -> None:
    """Keep a block for use. A system that runs short may drop its pages until they are written again; in huge pages that costs 10 us."""
    if hasattr(mmap, "MADV_FREE"):
        with contextlib.suppress(OSError):
            block.madvise(mmap.MADV_FREE)
    _free.append(block)


def _take(size: int) -> mmap.mmap:
    for _ in range(len(_free)):
        try:
            block = _free.popleft()
        except IndexError:  # another thread was faster
            break
        if len(block) == size:
            return block
        _free.append(block)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared, the default, would be the child's as well
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
