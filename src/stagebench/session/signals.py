"""SIGTERM ends a job between two instructions of Python, with its journal closed and a message, instead of in silence."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Terminated", "terminated"]


class Terminated(BaseException):
    """SIGTERM came. Not an Exception, so that no sample's own error handling takes it for a failed run."""


@contextmanager
def terminated() -> Iterator[None]:
    """Raise Terminated here when SIGTERM comes. Does nothing outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
