"""Written bytes on their way to the disk while the next ones are made, so that the last fsync finds little left to wait for."""

from __future__ import annotations

import contextlib
import os
import threading

__all__ = ["Flusher"]

_STEP = 32 << 20
"""Bytes between two flushes: each costs a commit of the file system's journal."""


class Flusher:
    """Flushes a file from a thread of its own, which waits for the disk and takes no processor time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._new = 0
        self._due = threading.Condition()
        self._closed = False
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None

    def wrote(self, size: int) -> None:
        """`size` more bytes were written. For any thread."""
        with self._due:
            self._new += size
            if self._new >= _STEP:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="flush", daemon=True)
                    with contextlib.suppress(RuntimeError):  # no thread to be had: the last fsync waits for longer
                        thread.start()
                        self._thread = thread
                self._due.notify()

    def close(self) -> None:
        """End the thread. Raises the OSError that a flush met: the system tells of a lost write once, and would not tell fsync again."""
        with self._due:
            self._closed = True
            self._due.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        while True:
            with self._due:
                self._due.wait_for(lambda: self._closed or self._new >= _STEP)
                if self._closed:
                    return
                self._new = 0
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._error = error
                return
