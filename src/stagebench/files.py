"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["sync_folder", "whole_file"]


@contextmanager
def whole_file(path: Path, error: Callable[[str], Exception], remedy: str = "Make room or check the folder's rights.") -> Iterator[Path]:
    """A temporary path beside `path` that becomes it when the block ends well (fsync, rename, fsync of the folder), and goes otherwise.

    Missing folders are made. What the disk does not take (full, read-only) is raised as `error`, with the path, the reason and `remedy`
    in its text; `path` is then as it was before.
    """
    # The suffix stays the last one: encoders and writers choose their format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as reason:
        raise error(f"{path}: cannot be written ({reason.strerror or reason}). {remedy}") from reason
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (a rename) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
