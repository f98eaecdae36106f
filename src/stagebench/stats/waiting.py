"""When a time waited for a CPU for so long that it says more about the machine's neighbours than about a model."""

from __future__ import annotations

__all__ = ["CPU_WAIT_MS", "DISTURBED_SHARE", "disturbed"]

CPU_WAIT_MS = 3.0
"""A time slice: a thread that stood ready for no longer was scheduled, not kept from its work, however short its run was."""
DISTURBED_SHARE = 0.10
"""Above this share of its time spent waiting for a CPU, a side's times are its neighbours', and no ratio to it has a clear word."""


def disturbed(share: float | None) -> bool:
    """Whether a ratio to times that waited for this share (waits up to `CPU_WAIT_MS` counted as none) says nothing about a model."""
    return share is not None and share > DISTURBED_SHARE
