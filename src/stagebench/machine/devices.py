"""A free device, under a lock, so that several timing jobs on one machine take different GPUs."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from stagebench.errors import TimingError
from stagebench.machine._nvml import device_uuid
from stagebench.machine.monitor import Monitor

__all__ = ["Lease", "pick_device"]

log = logging.getLogger(__name__)

POLL_S = 2.0


@dataclass
class Lease:
    """A device that is ours until `release` or the end of the process, kill -9 included: the lock is the kernel's."""

    device: str
    pids_before: frozenset[int] = frozenset()
    """Processes that were on the device before we made a context there."""
    _fd: int | None = field(default=None, repr=False)

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)  # closing gives the lock back; the file stays, for unlinking it would race with who waits
            self._fd = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def pick_device(requested: str | None = None, *, folder: Path | None = None, wait_s: float = 600.0) -> Lease:
    """A device for one timing job.

    requested: "cpu"; "cuda:1" for that GPU; "cuda" for any; None takes a GPU where there is one, else the CPU. Only what
        CUDA_VISIBLE_DEVICES shows is seen, and counted as CUDA counts it.
    folder: where the lock files live, one for each GPU of this host; null is the host's temporary folder.
    wait_s: how long to wait for a GPU that other timing jobs hold.
    Raises TimingError when there is no such GPU, or all stay taken; it names who holds them.
    """
    if requested is not None and requested != "cpu" and not requested.startswith("cuda"):
        raise TimingError(f"device {requested!r}: expected cpu, cuda or cuda:<n>. Change --device.")
    if requested == "cpu":
        return Lease("cpu")
    candidates = visible_gpus()
    if requested is None and not candidates:
        return Lease("cpu")
    if requested is not None and ":" in requested:
        if requested not in candidates:
            raise TimingError(
                f"device {requested}: this process sees {', '.join(candidates) or 'no GPU'}. Check CUDA_VISIBLE_DEVICES and --device."
            )
        candidates = {requested: candidates[requested]}
    if not candidates:
        raise TimingError(f"device {requested}: no GPU is visible here. Use --device cpu, or check the driver and CUDA_VISIBLE_DEVICES.")
    return lock_one(candidates, folder or Path(tempfile.gettempdir()), wait_s)


def visible_gpus() -> dict[str, str]:
    """`cuda:<n>` -> a name that is the same for all processes of this host (the UUID), quiet devices first."""
    import torch

    if not torch.cuda.is_available():
        return {}
    names = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    busy = {name: len(Monitor(name).pids()) for name in names}
    return {name: device_uuid(name) or f"index-{name[5:]}" for name in sorted(names, key=lambda name: busy[name])}


def lock_one(candidates: Mapping[str, str], folder: Path, wait_s: float) -> Lease:
    """The first candidate whose lock is free; waits and tries again while all are taken. Raises TimingError after wait_s."""
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        for device, name in candidates.items():
            fd = _try_lock(folder / f"stagebench-{name}.lock")
            if fd is not None:
                return Lease(device, _pids(device), fd)
        holders = "; ".join(f"{device} by {_holder(folder / f'stagebench-{name}.lock')}" for device, name in candidates.items())
        if time.monotonic() >= deadline:
            raise TimingError(
                f"every GPU is taken by another timing job: {holders}. Wait, or give Snakemake --resources gpu=<GPUs of this machine>."
            )
        if not told:
            log.info("waiting for a GPU: %s", holders)
            told = True
        time.sleep(min(POLL_S, max(0.05, deadline - time.monotonic())))


def _pids(device: str) -> frozenset[int]:
    return Monitor(device).pids()


def _try_lock(path: Path) -> int | None:
    try:
        # another user's lock file in a sticky folder may not be opened with O_CREAT or for writing; flock needs neither
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666) if not path.exists() or os.access(path, os.W_OK) else os.open(path, os.O_RDONLY)
    except OSError as error:
        raise TimingError(
            f"{path}: the lock file cannot be opened ({error.strerror}). Set TMPDIR to a folder that you may write."
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)
    except OSError:
        pass  # read-only for us: the lock holds all the same, only without our name
    return fd


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"pid {held['pid']} on {held['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"the holder of {path}"
