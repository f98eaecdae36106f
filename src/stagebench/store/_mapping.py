"""A shard's file in memory: mapped, so that a read is a copy made in user space and not one made by the kernel, page by page."""

from __future__ import annotations

import contextlib
import errno
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
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay")


class MappedFile:
    """Read-only bytes of a whole file. Reading beyond the file's end, or where the disk fails, ends the process: see `holds`."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        self.data = np.frombuffer(self._map, np.uint8)
        """uint8 [size]."""

    def populate(self) -> None:
        """Enter the pages into the process's page table, so that no later read pays for it; nothing where they are not in memory.

        By `holds`'s sample of them: what is missing between is read from the disk.
        """
        if self.holds(0, self.data.size):
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
        except OSError as error:
            return error.errno in (errno.EOPNOTSUPP, errno.ENOTSUP)  # a file system that cannot tell, as tmpfs: it is memory

    def close(self) -> None:
        """Unmap, once no view is left."""
        del self.data
        with contextlib.suppress(BufferError):  # the last view's end does it
            self._map.close()


def map_file(fd: int, path: Path) -> MappedFile | None:
    """The file, mapped; None where that is not possible or not wise: a server may withdraw a mapped page, and end the process.

    path: for the log; the file may have lost its name.
    """
    kind = _file_system(fd)
    if kind not in _LOCAL:
        log.info("%s: read by system calls, for it is on %s", path, kind or "an unknown file system")
        return None
    try:
        return MappedFile(fd, os.fstat(fd).st_size)
    except (OSError, ValueError) as error:
        log.info("%s: read by system calls, for it cannot be mapped: %s", path, error)
        return None


def _file_system(fd: int, process: Path = Path("/proc/self")) -> str:
    """Type of the file system that an open file is on; "" where the system does not say."""
    device = os.fstat(fd).st_dev
    # By the mount, too: the device of a file in a subvolume of btrfs is not its mount's. A system may name no mount (gVisor).
    wanted = {f"{os.major(device)}:{os.minor(device)}"}
    try:
        wanted |= set((process / "fdinfo" / str(fd)).read_text().partition("mnt_id:")[2].split()[:1])
        lines = (process / "mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    kinds = [line.split(" - ")[1].split()[0] for line in lines if " - " in line and wanted.intersection(line.split()[:3:2])]
    return kinds[-1] if kinds else ""
