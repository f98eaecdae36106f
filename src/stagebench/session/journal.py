"""A timing job's journal: each finished sample is on disk before the next one begins, so that kill -9 costs one sample.

One JSON line a group (a sample, or a batch), with a checksum. The first line says which machine and study the rows belong to.
The journal lies beside its job's output, `<output>.journal`, because Snakemake deletes declared outputs of failed jobs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from stagebench.errors import TimingError

__all__ = ["Journal"]

log = logging.getLogger(__name__)

FORMAT = 1
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What network file systems say that are mounted without locks."""


class Journal:
    """Open for one job, and locked: two processes never write the same one.

    identity: what must agree for the rows to be gone on with: `machine` and `study` digests, `job`.
    Raises TimingError when another process holds it, or it cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)
        self.groups: dict[str, list[dict[str, Any]]] = {}
        """Rows by group key, as earlier processes left them."""
        self.fatal: dict[str, int] = {}
        """How often a group's run ended its process's use of the device."""
        self._fd = -1
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def resumed(self) -> int:
        """Groups that an earlier process finished."""
        return len(self.groups)

    def append(self, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """One finished group, on disk when this returns. Raises TimingError when the disk takes no more; what was there stays whole."""
        self._write({"group": key, "rows": list(rows)})

    def note_fatal(self, key: str) -> None:
        """This group's run broke the device: tried once more by the next process, then given up as an error row."""
        self._write({"fatal": key})

    def remove(self) -> None:
        """The job's output is in place: the journal has done its work."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
        data = _read(self._fd)
        lines, whole = _parse(data)
        header = lines[0].get("header", {}) if lines else {}
        changed = [name for name, value in self.identity.items() if header.get(name) != value]
        if lines and header.get("format") == FORMAT and not changed:
            self._take(lines[1:])
            os.ftruncate(self._fd, whole)  # a torn last line would otherwise swallow the next one
            if self.groups:
                log.info("%s: going on after %d finished groups", self.path, len(self.groups))
            return
        if data:
            known = f"{', '.join(changed)} changed" if changed else f"format {header.get('format')}, {FORMAT} expected"
            self._set_aside(known if lines else "its first line is not whole")
        self._write({"header": {"format": FORMAT, "pid": os.getpid(), "host": platform.node(), **self.identity}})

    def _lock(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning("%s: this file system has no locks (%s); do not run this job twice at a time", self.path, error.strerror)
                return
            lines, _ = _parse(_read(self._fd))
            owner = lines[0].get("header", {}) if lines else {}
            raise TimingError(
                f"{self.path}: this job is being run by pid {owner.get('pid', '?')} on {owner.get('host', '?')}. "
                "Wait for that run, or stop it; what it has finished is kept."
            ) from None

    def _set_aside(self, why: str) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}.aside")).exists():
            number += 1
        self.path.rename(aside)
        self.close()
        log.warning("%s: set aside as %s (%s); this block starts again from its first sample", self.path, aside.name, why)
        self._lock()

    def _take(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "group" in line:
                self.groups[line["group"]] = line["rows"]
            elif "fatal" in line:
                self.fatal[line["fatal"]] = self.fatal.get(line["fatal"], 0) + 1

    def _write(self, value: Mapping[str, Any]) -> None:
        body = json.dumps(value, separators=(",", ":"), allow_nan=False)
        data = f"{zlib.crc32(body.encode()):08x} {body}\n".encode()
        start = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, start)
            raise TimingError(
                f"{self.path}: the journal cannot be written ({error.strerror}). Make room and run the job again: it goes on from there."
            ) from error


def _read(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _parse(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Whole lines from the start, and how many bytes they are. Ends at the first line that is torn or changed."""
    lines: list[dict[str, Any]] = []
    whole = 0
    while (end := data.find(b"\n", whole)) >= 0:
        checksum, _, body = data[whole:end].partition(b" ")
        try:
            if int(checksum, 16) != zlib.crc32(body):
                break
            value = json.loads(body)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict):
            break
        lines.append(value)
        whole = end + 1
    return lines, whole
