"""A shard's file in memory: mapped, so that a read is a copy made in user space and not one made by the kernel, page by page."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from pathlib import Path

import numpy as np

__all__ = ["MappedFile", "map_file"]

log = logging.getLogger(__name__)

_POPULATE_READ = 22
"""madvise's MADV_POPULATE_READ (Linux 5.14), which the module mmap does not name."""
_PROBE = 4 << 20
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs", "orangefs", "fuse")


class MappedFile:
    """Read-only bytes of a whole file. Reading beyond the file's end, or where the disk fails, ends the process: see `holds`."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        self.data = np.frombuffer(self._map, np.uint8)
        """uint8 [size]."""

    def populate(self) -> None:
        """Enter every page that is in memory into the process's page table, so that no later read pays for it."""
        with contextlib.suppress(OSError):  # an older kernel: the first read of each page enters it
            self._map.madvise(_POPULATE_READ)

    def holds(self, begin: int, size: int) -> bool:
        """Whether [begin, begin + size) is in the file and, by a sample of it every 4 MiB, in memory.

        What is not is better read by system calls: they read far ahead, and a failing disk or a file that was cut is an error there.
        """
        if begin < 0 or begin + size > os.fstat(self._fd).st_size:
            return False
        probe = bytearray(1)
        try:
            return all(os.preadv(self._fd, [probe], at, os.RWF_NOWAIT) for at in range(begin, begin + size, _PROBE))
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system that cannot tell, as tmpfs: it is memory

    def close(self) -> None:
        """Unmap, once no view is left."""
        del self.data
        with contextlib.suppress(BufferError):  # the last view's end does it
            self._map.close()


def map_file(fd: int, path: Path) -> MappedFile | None:
    """The file, mapped; None where that is not possible or not wise: a server may withdraw a mapped page, and end the process."""
    kind = _file_system(path)
    if kind.split(".")[0] in _REMOTE:
        log.info("%s: read by system calls, for it is on %s", path, kind)
        return None
    try:
        return MappedFile(fd, os.fstat(fd).st_size)
    except (OSError, ValueError) as error:
        log.info("%s: read by system calls, for it cannot be mapped: %s", path, error)
        return None


def _file_system(path: Path, table: Path = Path("/proc/self/mountinfo")) -> str:
    """Type of the file system that a file is on; "" where the system does not say."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = table.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    kinds = [line.split(" - ")[1].split()[0] for line in lines if line.split()[2] == wanted and " - " in line]
    return kinds[-1] if kinds else ""
