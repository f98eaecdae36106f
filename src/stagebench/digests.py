"""Content digests of a dataset's files, remembered by path and stat: planning stats every file and reads only what changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from stagebench.errors import PlanError
from stagebench.files import whole_file

__all__ = ["MISSING", "UNREADABLE", "DigestIndex", "Look", "Progress", "combine", "stamps"]

log = logging.getLogger(__name__)

MISSING = "missing"
"""Digest of a file that is not there: the clip becomes a failed row, and another shard once the file turns up."""
UNREADABLE = "unreadable"

Progress = Callable[[int, int], None]
"""Called with (files hashed, files to hash)."""

# A file as young as the filesystem's clock is coarse can change again without a trace in its times: it is hashed again next time.
SETTLED_NS = 2_000_000_000
KEEP_DAYS = 90
BATCH = 4096
"""Files that are handed to the hashing threads at a time."""
WAIT_S = 10.0


class _Stamp(NamedTuple):
    path: str
    size: int
    mtime_ns: int
    # changes with the content even where a tool sets mtime back (rsync -t, tar); a rename of the dataset's folder leaves it alone
    ctime_ns: int
    # tells apart files of one size that were written in one tick of the clock, when a folder of them is renamed to where another was
    inode: int

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> _Stamp:
        """inode: as it fits Parquet's and array's 64 signed bits; numbers as large as that are some network file systems' own."""
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (1 << 63) - 1)


@dataclass(frozen=True)
class Look:
    """What one call of `DigestIndex.digests` saw: as long as `stamps` gives the same for these paths, so would the call."""

    name: str
    root: Path
    paths: Sequence[str]
    links: Mapping[str, str]
    """As they were given."""
    stamps: str | None
    """None where that does not follow: a file was too young, changed meanwhile, or could not be read."""


class _Seen:
    """Stamps of files in the order of the look, and what is no file: folders with what is in them, missing paths."""

    def __init__(self) -> None:
        self.numbers = array("q")
        self.others: list[tuple[str, str | dict[str, str]]] = []
        self.sure = True

    def add(self, path: str, found: _Stamp | str | dict[str, str]) -> None:
        if isinstance(found, _Stamp):
            self.numbers.extend(found[1:])
            return
        self.others.append((path, found))
        if found == UNREADABLE:  # may be readable next time without a trace in its times
            self.sure = False

    def digest(self) -> str | None:
        """None when what was seen is no evidence."""
        if not self.sure:
            return None
        whole = hashlib.blake2b(json.dumps(self.others).encode(), digest_size=16)
        whole.update(self.numbers)
        return whole.hexdigest()


class DigestIndex:
    """The digests in one Parquet file. Held open by one planner at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.looks: list[Look] = []
        """What was seen since it was opened, in the order of the calls."""
        self._known: dict[_Stamp, str] = {}
        self._seen: dict[_Stamp, int] = {}
        self._dirty = False
        self._lock = FileLock(path.with_suffix(".lock"))

    def __enter__(self) -> DigestIndex:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=WAIT_S)
            except Timeout:
                log.info("%s: another planner is hashing; waiting for it to end", self.path)
                self._lock.acquire()
        except OSError as error:
            log.warning("%s: cannot be locked (%s); digests are not remembered", self.path, error)
        self._load()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._dirty and self._lock.is_locked:
                self._save()
        finally:
            self._lock.release()

    def digests(
        self,
        name: str,
        root: Path,
        paths: Iterable[str],
        *,
        links: Mapping[str, str] | None = None,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> dict[str, str]:
        """Digest of each path (a file, or a folder of files) relative to root; a missing or unreadable one has a digest that says so.

        name: the dataset's, so that two datasets with equal relative paths do not push each other out. Hidden files in folders are ignored.
        links: where those of the paths lead that are links. A file is remembered by its name, and a link by this, too: led elsewhere it
        has that file's size and times, which may well be the same.
        """
        wanted = dict.fromkeys(paths)
        links = links or {}
        folders: dict[str, dict[str, str]] = {}
        digest: dict[str, str] = {}
        fresh: dict[str, _Stamp] = {}  # a file may be asked for by itself and in its folder
        today = int(time.time() // 86400)
        seen = _Seen()

        def look(path: str, leads: str | None) -> dict[str, str] | None:
            """Settle a file's digest, or put it on the list of those to be read. A folder's paths, and where they lead."""
            found = _look(root, name, path)
            seen.add(path, found)
            if isinstance(found, _Stamp):
                if leads:
                    found = found._replace(path=f"{found.path} -> {leads}")
                if (known := self._known.get(found)) is None:
                    fresh[path] = found
                else:
                    digest[path] = known
                    self._seen[found] = today
            elif isinstance(found, str):
                digest[path] = found
            else:
                return found
            return None

        for path in wanted:
            if (inside := look(path, links.get(path))) is not None:
                folders[path] = inside
                for inner, leads in inside.items():
                    if look(inner, leads) is not None:  # was a file a moment ago
                        digest[inner] = UNREADABLE
                        seen.sure = False
        if fresh and not self._read(root, list(fresh.items()), digest, today, threads, progress):
            seen.sure = False
        self.looks.append(Look(name, root, tuple(wanted), links, seen.digest()))
        for folder, names in folders.items():
            digest[folder] = combine({inner: digest[inner] for inner in names}, strip=folder)
        return {path: digest[path] for path in wanted}

    def _read(
        self, root: Path, fresh: list[tuple[str, _Stamp]], digest: dict[str, str], today: int, threads: int, progress: Progress | None
    ) -> bool:
        """Hash what is not known, and remember it. Whether all of it could be remembered."""

        def read(item: tuple[str, _Stamp]) -> tuple[str, bool]:
            return _hash(root / item[0], item[1])

        sure = True
        threads = min(threads, len(fresh))
        with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:  # a clip is hashed before a thread has started
            for begin in range(0, len(fresh), BATCH):  # a pool takes all that it is given at once, in a future each
                batch = fresh[begin : begin + BATCH]
                hashed = map(read, batch) if pool is None else pool.map(read, batch)
                for done, ((path, stamp), (value, settled)) in enumerate(zip(batch, hashed, strict=True), begin + 1):
                    digest[path] = value
                    if settled:
                        self._known[stamp], self._seen[stamp], self._dirty = value, today, True
                    else:
                        sure = False
                    if progress is not None:
                        progress(done, len(fresh))
        return sure

    def _load(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.path.exists():
            return
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:  # read_table would import pandas
                columns = file.read().to_pydict()
            stamps = map(_Stamp, *(columns[name] for name in _Stamp._fields))
            for stamp, value, seen in zip(stamps, columns["digest"], columns["seen"], strict=True):
                self._known[stamp], self._seen[stamp] = value, seen
        except (OSError, KeyError, pa.ArrowException) as error:
            log.warning("%s: cannot be read (%s); every file is hashed again", self.path, error)
            self._known, self._seen = {}, {}

    def _save(self) -> None:
        import polars as pl
        import pyarrow.parquet as pq

        oldest = int(time.time() // 86400) - KEEP_DAYS
        rows = sorted(stamp for stamp, seen in self._seen.items() if seen >= oldest and _is_text(stamp.path))
        columns = {name: [getattr(row, name) for row in rows] for name in _Stamp._fields}
        columns |= {"digest": [self._known[row] for row in rows], "seen": [self._seen[row] for row in rows]}
        table = pl.DataFrame(columns).to_arrow()  # pa.array would import pandas
        try:
            with whole_file(self.path, PlanError, "The files are hashed again next time.") as temporary:
                pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        except PlanError as error:
            log.warning("%s", error)


_FIELDS = attrgetter("st_mode", "st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")


def stamps(root: Path, paths: Iterable[str]) -> str | None:
    """A digest over the stat of these files, and over what is no file: equal to a `Look`'s as long as nothing has changed.

    About 2 µs of CPU a file, most of it the system's. None where something cannot be read.
    """
    wanted = list(paths)
    seen = _Seen()
    try:
        numbers = array("q", chain.from_iterable(map(_FIELDS, map(os.stat, [f"{root}/{path}" for path in wanted]))))
        plain = all(map(stat.S_ISREG, set(numbers[::5])))
    except (OSError, ValueError, OverflowError):  # OverflowError: a large inode
        plain = False
    if plain:
        del numbers[::5]
        seen.numbers = numbers
        return seen.digest()
    for path in wanted:
        found = _look(root, "", path)
        seen.add(path, found)
        for inner in found if isinstance(found, dict) else ():
            seen.add(inner, again := _look(root, "", inner))
            if isinstance(again, dict):
                return None
    return seen.digest()


def combine(digests: Mapping[str, str], *, strip: str = "") -> str:
    """One digest over names and contents, in the order of the names; `strip` is the folder that the names are taken relative to."""
    whole = hashlib.blake2b(digest_size=16)
    for path in sorted(digests):
        name = path.removeprefix(strip).lstrip("/")
        whole.update(f"{len(name)}:{name}{digests[path]}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _look(root: Path, name: str, path: str) -> _Stamp | str | dict[str, str]:
    """A file's stamp, the paths of a folder's files (sorted) and where those lead that are links, or why there is neither."""
    full = f"{root}/{path}"
    try:
        status = os.stat(full)  # noqa: PTH116  # pathlib takes four times as long, once for every file
        if stat.S_ISREG(status.st_mode):
            return _Stamp.of(f"{name}/{path}", status)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(full) as entries:
                inside = sorted((e.name, e.is_symlink()) for e in entries if not e.name.startswith(".") and e.is_file())
            return {f"{path}/{inner}": os.path.realpath(f"{full}/{inner}") if link else "" for inner, link in inside}
    except FileNotFoundError:
        return MISSING
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return UNREADABLE
    return UNREADABLE  # a socket, a pipe, a device


def _is_text(name: str) -> bool:
    """Whether Parquet takes it: a file's name may be any bytes. Files with other names are hashed each time."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hash(path: Path, stamp: _Stamp) -> tuple[str, bool]:
    """The file's digest, and whether it may be remembered: not when it changed while it was read, or a moment before."""
    begun = time.time_ns()
    try:
        with path.open("rb") as handle:
            value = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            after = os.fstat(handle.fileno())
    except OSError:
        return UNREADABLE, False
    return value, _Stamp.of(stamp.path, after) == stamp and max(stamp.mtime_ns, stamp.ctime_ns) < begun - SETTLED_NS
