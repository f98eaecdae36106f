"""One run at a time in a results folder: a lock that dies with its process, with the owner's name in it."""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from stagebench.errors import BusyError

__all__ = ["Ownership", "owned"]

log = logging.getLogger(__name__)

NAME = ".owner"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Ownership:
    """This process's hold on a results folder, from the constructor until `release`, or the end of the process, kill -9 included.

    Raises BusyError that names the owner when another process has the folder, and when the lock file cannot be made.
    """

    def __init__(self, results: Path) -> None:
        self.path = Path(results) / NAME
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise BusyError(f"{self.path}: cannot be opened ({error.strerror}). Check the results folder and its rights.") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning("%s: this file system has no locks (%s); do not start a second run in this folder", self.path, error.strerror)
                return
            owner = _owner(self._fd)
            os.close(self._fd)
            raise BusyError(
                f"{self.path.parent}: {owner} is working in this results folder. Wait for that run to end, stop it, or give this one a "
                "folder (or study name) of its own."
            ) from None
        self._sign()

    def _sign(self) -> None:
        """Write who we are. The lock holds without it too: a full disk costs the next one only our name."""
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        who = {
            "user": _user(),
            "pid": os.getpid(),
            "host": platform.node(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
        }
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(who).encode(), 0)
        except OSError as error:
            log.warning("%s: the owner's name cannot be written (%s)", self.path, error.strerror)

    def release(self) -> None:
        """Let the next run in. The file stays: removing it would let two processes lock two files of one name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Ownership:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


@contextmanager
def owned(results: Path) -> Iterator[None]:
    """Own the folder for the length of the block. Raises BusyError as `Ownership` does."""
    with Ownership(results):
        yield


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


def _owner(fd: int) -> str:
    try:
        found = json.loads(os.pread(fd, 4096, 0))
        return f"{found['user']} (pid {found['pid']} on {found['host']}, since {found['since']}: {found['command']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
