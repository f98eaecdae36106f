"""How the C library deals with memory that is let go of."""

from __future__ import annotations

import ctypes
import functools
import sys

__all__ = ["keep_freed"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 256 << 20
_LARGEST = 32 << 20


@functools.cache
def keep_freed() -> bool:
    """Have glibc keep up to 256 MiB of what this process frees, for its next allocations. Whether it does; elsewhere nothing is done.

    A decoder lets go of all its pictures at a clip's end, and takes as many for the next. By default that memory goes back to the
    system in between, which must then clear its pages once more, one thread of a process at a time. For the process's whole life.
    Blocks above 32 MiB, glibc's limit, are mapped as ever.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # both: setting either ends their being adapted to what is freed, and would leave the other at 128 KiB
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))
