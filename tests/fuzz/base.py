"""What a reader under fuzzing is, and where its inputs are written."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fuzz.mutate import changed_bytes
from stagebench.errors import StagebenchError

__all__ = ["Broken", "Reader", "bytes_of", "folder", "in_file"]


class Broken(AssertionError):
    """A reader took an input and gave something that it must not give."""


@dataclass(frozen=True)
class Reader:
    """One reader: how inputs are made, how one is read, and which errors are answers."""

    name: str
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]
    answers: tuple[type[StagebenchError], ...]

    def holds(self, data: bytes) -> bool:
        """Whether the input was taken (True) or refused by an error of ours (False). Anything else is raised."""
        try:
            self.read(data)
        except self.answers as error:
            if not str(error).strip():
                raise Broken("refused without a word") from error
            return False
        return True


@cache
def folder() -> Path:
    """A folder in memory where there is one: millions of files are written here. It goes with the process that asked first."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="stagebench-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    atexit.register(_remove, path, os.getpid())
    return path


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def in_file(name: str, data: bytes) -> Path:
    path = folder() / f"{os.getpid()}-{name}"
    path.write_bytes(data)
    return path


def bytes_of(seeds: Callable[[], Sequence[bytes]], tokens: Sequence[bytes] = ()) -> Callable[[random.Random], bytes]:
    return lambda rng: changed_bytes(seeds(), rng, tokens)
