"""Files that are whole or not there, and text that is no longer than it may be."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["bounded_text", "sync_folder", "whole_file"]


def bounded_text(path: Path, limit: int) -> str:
    """A UTF-8 file's text. Raises OSError (EFBIG) for more than `limit` bytes, of which no more are read, and UnicodeDecodeError."""
    with path.open("rb") as file:  # no question to the file system: a pipe has no size
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than the {limit:,} bytes that are read of such a file", str(path))
    return data.decode("utf-8")


@contextmanager
def whole_file(path: Path, error: Callable[[str], Exception], remedy: str = "Make room or check the folder's rights.") -> Iterator[Path]:
    """A temporary path beside `path` that becomes it when the block ends well (fsync, rename, fsync of the folder), and goes otherwise.

    Missing folders are made. What the disk does not take (full, read-only) is raised as `error`, with the path, the reason and `remedy`
    in its text; `path` is then as it was before, unless it was the folder that could not be brought to the disk: then it is the new file,
    whole, but a power cut may take it back.
    """
    # The suffix stays the last one: encoders and writers choose their format by it.
    # No process id: those of two containers on one folder are often equal.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
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
