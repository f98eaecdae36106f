"""DSEC's HDF5 recordings: `events/{x,y,t,p}`, `ms_to_idx`, `t_offset`; microsecond-exact windows without reading the whole file.

`ms_to_idx[ms]` is the first event with t >= 1000 ms (t from the recording's begin, `t_offset` added gives absolute time). It narrows the
window to whole milliseconds, the rest is searched in the times themselves; and it is not believed: the events at both borders are checked.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from stagebench.errors import CorruptClipError, SourceError, UnsafeFileError

__all__ = ["read_dsec"]

MAX_EVENTS = 300_000_000
"""Events of one window: about 4 GiB in memory."""
MAX_UNFOLD = 2000
"""Bytes a dataset may claim for each byte stored; blosc and deflate stay below 300 on real recordings."""
_FILTERS = {
    1: "deflate",
    2: "shuffle",
    3: "fletcher32",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32015: "zstd",
    32026: "blosc2",
    0x8ECF: "ECF",
}


def read_dsec(path: Path, window: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """Columns p, t, x, y; t int64 absolute microseconds. `window` [t0, t1) absolute; None reads everything.

    Raises SourceError for a missing file, library or filter, UnsafeFileError for links, external or virtual data and claims beyond the
    file's size, CorruptClipError for another layout or an index that does not fit the times.
    """
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError:
        raise SourceError(f"{path}: HDF5 needs h5py, which is not installed. pip install 'stagebench[events]'") from None
    if not path.is_file():
        raise SourceError(f"{path}: no such file. Check the dataset's root and the index.")
    try:
        with h5py.File(path, "r") as file:
            return _read(h5py, file, path, window)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise CorruptClipError(f"{path}: not readable as HDF5 ({str(error)[:200]}). Copy it again, or leave the clip out.") from None


def _read(h5py: Any, file: Any, path: Path, window: tuple[int, int] | None) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    columns = {key: _dataset(h5py, file, f"events/{key}", path, size) for key in ("p", "t", "x", "y")}
    count = columns["t"].shape[0]
    if any(column.shape != (count,) for column in columns.values()):
        raise CorruptClipError(
            f"{path}: {', '.join(f'{k} {c.shape}' for k, c in columns.items())}: expected one length. The recording is damaged; "
            "copy it again."
        )
    offset = 0
    if "t_offset" in file:
        offset = int(_dataset(h5py, file, "t_offset", path, size)[()])
    first, last = (0, count) if window is None else _borders(h5py, file, columns["t"], path, size, window[0] - offset, window[1] - offset)
    if last - first > MAX_EVENTS:
        raise UnsafeFileError(f"{path}: {last - first:,} events, at most {MAX_EVENTS:,} at once. Give the clip an event_window.")
    arrays: dict[str, np.ndarray] = {key: columns[key][first:last] for key in ("p", "x", "y")}
    arrays["t"] = columns["t"][first:last].astype(np.int64) + offset
    return arrays


def _dataset(h5py: Any, file: Any, name: str, path: Path, size: int) -> Any:
    """A dataset that lies in this very file, at a size that its bytes can give, and whose filters are here."""
    parent: Any = file
    for part in name.split("/"):
        link = parent.get(part, getlink=True) if part in parent else None
        if link is None:
            raise CorruptClipError(
                f"{path}: no {name}, expected DSEC's layout (events/x, y, t, p, ms_to_idx, t_offset). Convert the recording."
            )
        if not isinstance(link, h5py.HardLink):
            raise UnsafeFileError(
                f"{path}: {name} is a {type(link).__name__}, which may lead to another file. Write the data itself into the file."
            )
        parent = parent[part]
    if not isinstance(parent, h5py.Dataset):
        raise CorruptClipError(f"{path}: {name} is no dataset, expected DSEC's layout. Convert the recording.")
    if parent.is_virtual or parent.external:
        raise UnsafeFileError(f"{path}: {name} takes its data from other files. Write the data itself into the file.")
    if parent.dtype.kind not in "iub":
        raise CorruptClipError(f"{path}: {name} is {parent.dtype}, expected integers. Convert the recording.")
    if parent.nbytes > MAX_UNFOLD * size:
        raise UnsafeFileError(
            f"{path}: {name} claims {parent.nbytes:,} bytes in a file of {size:,}. Copy the recording again from its publisher."
        )
    _need_filters(h5py, parent, name, path)
    return parent


def _need_filters(h5py: Any, dataset: Any, name: str, path: Path) -> None:
    properties = dataset.id.get_create_plist()
    for index in range(properties.get_nfilters()):
        code = properties.get_filter(index)[0]
        if h5py.h5z.filter_avail(code):
            continue
        with contextlib.suppress(ImportError):
            importlib.import_module("hdf5plugin")  # registers its filters with h5py when imported
        if not h5py.h5z.filter_avail(code):
            raise SourceError(
                f"{path}: {name} is compressed by {_FILTERS.get(code, 'a filter')} (HDF5 filter {code}), which is not installed. "
                "pip install 'stagebench[events]' brings hdf5plugin."
            )


def _borders(h5py: Any, file: Any, times: Any, path: Path, size: int, begin: int, end: int) -> tuple[int, int]:
    """Indices [first, last) of the events with begin <= t < end, in the recording's own time."""
    count = times.shape[0]
    low, high = 0, count
    if "ms_to_idx" in file:
        index = _dataset(h5py, file, "ms_to_idx", path, size)
        length = index.shape[0]
        if begin > 0 and length:
            low = int(index[min(begin // 1000, length - 1)])
        upper = -(-end // 1000)
        if upper <= 0:
            high = 0
        elif upper < length:
            high = int(index[upper])
        if not 0 <= low <= count or not 0 <= high <= count:
            raise CorruptClipError(
                f"{path}: ms_to_idx points at events {low} and {high} of {count}. The recording is damaged; copy it again."
            )
        high = max(low, high)
    first = _bisect(times, begin, low, high)
    last = _bisect(times, end, first, high)
    # A wrong index shows at the borders: an event left out before the first, or after the last.
    before = int(times[first - 1]) if first > 0 else None
    after = int(times[last]) if last < count else None
    if (before is not None and before >= begin) or (after is not None and after < end):
        raise CorruptClipError(
            f"{path}: ms_to_idx does not fit the times around [{begin}, {end}) µs. The recording is damaged; copy it again."
        )
    return first, last


_CHUNK = 1 << 16


def _bisect(times: Any, value: int, low: int, high: int) -> int:
    """First index in [low, high) with times[index] >= value; reads a few elements, then one block."""
    while high - low > _CHUNK:
        middle = (low + high) // 2
        if int(times[middle]) < value:
            low = middle + 1
        else:
            high = middle
    return low + int(np.searchsorted(times[low:high].astype(np.int64), value))
