"""The files that clips are read from, held against the plan: what is read must be what was planned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stagebench.digests import DigestIndex, combine
from stagebench.errors import PlanError

if TYPE_CHECKING:
    from stagebench.dataset import Clip

__all__ = ["Originals"]


class Originals:
    """A dataset's files, each hashed once while its stat stays the same. For any thread.

    root: the dataset's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._hashed: dict[tuple[object, ...], str] = {}

    def check(self, clip: Clip, entry: str | None, planned: str) -> None:
        """Raises PlanError unless the bytes of `clip.files[entry]` have the digest that was planned; None has nothing to check."""
        if entry is None:
            return
        files = clip.files[entry]
        paths = (files,) if isinstance(files, str) else tuple(files)
        digests = {path: self._digest(path) for path in paths}
        found = digests[files] if isinstance(files, str) else combine({f"{n:06d}": digests[path] for n, path in enumerate(paths)})
        if found != planned:
            raise PlanError(f"{clip.key}: {paths[0]} is not what it was when the study was planned. Run snakemake again: it plans anew.")

    def _digest(self, path: str) -> str:
        key: tuple[object, ...]
        try:
            status = (self._root / path).stat()
            key = (path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except (OSError, ValueError):
            key = (path,)
        if key not in self._hashed:  # many clips may be windows of one long recording
            # an index that is not entered remembers nothing: the bytes are read
            self._hashed[key] = DigestIndex(self._root / "unused").digests("", self._root, [path])[path]
        return self._hashed[key]
