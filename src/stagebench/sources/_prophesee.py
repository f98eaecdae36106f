"""Prophesee recordings: DAT version 2, raw EVT 2.0 and raw EVT 3.0, decoded by numpy.

The formats are published: https://docs.prophesee.ai/stable/data/file_formats/ (dat, raw) and .../data/encoding_formats/ (evt2, evt3).
All are little-endian behind a header of text lines "% keyword value". Read here rather than by a library: the ones that are kept read
untrusted files in C or have no wheel for every Python that we run on, and a decoder is a few array operations.

Times are the sensor's microseconds. EVT 2.0 carries 34 bits of them, EVT 3.0 24 bits (a turn of 16.8 s); turns are counted.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from pathlib import Path

import numpy as np

from stagebench.errors import CorruptClipError, SourceError, UnsafeFileError

__all__ = ["read_dat", "read_raw"]

MAX_HEADER = 1 << 16
MAX_EVENTS = 300_000_000
"""Of one clip: about 4 GiB in memory."""
_LINE = re.compile(rb"% ?([^\n\x80-\xff\x00-\x08\x0e-\x1f]{0,500})\n")

Columns = dict[str, np.ndarray]


def read_dat(path: Path, window: tuple[int, int] | None) -> Columns:
    """Columns p, t, x, y. A window [t0, t1) in µs is searched in the file, and only its events are read.

    Raises SourceError for a missing file, CorruptClipError for another type or version, a cut file, or times that fall where a window
    is searched, UnsafeFileError above MAX_EVENTS.
    """
    header, start = _header(path)
    if header.get("version", "2") != "2":
        raise CorruptClipError(f"{path}: DAT version {header['version']}, expected 2. Convert the recording with metavision_file_to_dat.")
    with path.open("rb") as file:
        file.seek(start)
        kind = file.read(2)
    if len(kind) < 2 or kind[0] not in (0x00, 0x0C) or kind[1] != 8:
        raise CorruptClipError(f"{path}: event type and size {list(kind)}, expected [0 or 12, 8]: CD events. Convert the recording.")
    words = _words(path, start + 2, np.dtype([("t", "<u4"), ("xyp", "<u4")]))
    first, last = 0, len(words)
    if window is not None:
        _check_rising(words["t"], path)
        first, last = (bisect_left(words, edge, key=lambda word: int(word["t"])) for edge in window)  # numpy's search would copy all
    _check_count(last - first, path)
    t, xyp = words["t"][first:last].astype(np.int64), np.ascontiguousarray(words["xyp"][first:last])
    # x: bits 0 to 13, y: 14 to 27, p: 28 to 31
    return {"t": t, "x": (xyp & 0x3FFF).astype(np.uint16), "y": (xyp >> 14 & 0x3FFF).astype(np.uint16), "p": (xyp >> 28).astype(np.uint8)}


def _check_rising(t: np.ndarray, path: Path) -> None:
    """That a search by time finds its place: 32 bits of microseconds turn after 71.6 minutes. 256 words show a turn."""
    at = np.unique(np.linspace(0, len(t) - 1, 256, dtype=np.int64)) if len(t) else np.empty(0, np.int64)
    times = t[at].astype(np.int64)
    falls = np.flatnonzero(np.diff(times) < 0)
    if len(falls):
        n = int(falls[0])
        raise CorruptClipError(
            f"{path}: t falls from {times[n]} to {times[n + 1]} between events {at[n]} and {at[n + 1]}, expected times in order (32 bits "
            "of microseconds turn after 71.6 minutes). Cut the recording into clips of their own."
        )


def read_raw(path: Path) -> Columns:
    """Columns p, t, x, y of a raw file in EVT 2.0 or EVT 3.0, which its header names. Triggers and vendor words are passed over.

    Raises SourceError for a missing file, CorruptClipError for another encoding or a cut file, UnsafeFileError above MAX_EVENTS.
    """
    header, start = _header(path)
    named = header.get("evt") or header.get("format", "").split(";")[0]
    encoding = {"2.0": "2", "3.0": "3", "EVT2": "2", "EVT3": "3", "2": "2", "3": "3"}.get(named)
    if encoding is None:
        raise CorruptClipError(
            f"{path}: raw encoding {named or 'not named in the header'}, expected EVT 2.0 or EVT 3.0. Convert it to DAT."
        )
    if header.get("endianness", "little") != "little":
        raise CorruptClipError(f"{path}: endianness {header['endianness']}, expected little. Convert it to DAT.")
    columns = _evt2(_words(path, start, np.dtype("<u4")), path) if encoding == "2" else _evt3(_words(path, start, np.dtype("<u2")), path)
    _check_count(len(columns["t"]), path)
    return columns


def _header(path: Path) -> tuple[dict[str, str], int]:
    """Keywords of the text lines in lower case, and where the data begins."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file. Check the dataset's root and the index.")
    with path.open("rb") as file:
        head = file.read(MAX_HEADER)
    found: dict[str, str] = {}
    at = 0
    while line := _LINE.match(head, at):
        at = line.end()
        words = line[1].decode("ascii").strip().split(" ", 1)
        if words[0] == "end":
            break
        found.setdefault(words[0].lower(), words[1].strip() if len(words) > 1 else "")
    if not at:
        raise CorruptClipError(f"{path}: begins with {head[:8]!r}, expected a header of lines '% keyword value'. Is it a Prophesee file?")
    return found, at


def _words(path: Path, start: int, dtype: np.dtype) -> np.ndarray:
    """The data as a map of the file: nothing is read yet."""
    size = path.stat().st_size - start
    if size % dtype.itemsize:
        raise CorruptClipError(f"{path}: {size} bytes of data, expected a multiple of {dtype.itemsize}. The file was cut; copy it again.")
    if size <= 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset=start)


def _check_count(count: int, path: Path) -> None:
    if count > MAX_EVENTS:
        raise UnsafeFileError(f"{path}: {count:,} events, at most {MAX_EVENTS:,} at once. Cut the recording into clips.")


def _evt2(words: np.ndarray, path: Path) -> Columns:
    """CD words: 4 bits type (polarity), 6 bits time, 11 bits x, 11 bits y; EVT_TIME_HIGH (8) carries bits 6 to 33 of the time."""
    _check_count(len(words), path)
    kind = (words >> 28).astype(np.uint8)
    marks = np.flatnonzero(kind == 8)
    events = np.flatnonzero(kind <= 1)
    if len(marks) == 0 or len(events) == 0:
        return _none()
    events = events[events > marks[0]]  # before the first mark nothing says when
    high = _unrolled(words[marks].astype(np.int64) & 0x0FFF_FFFF, 28)
    cd = words[events]
    t = (high[np.searchsorted(marks, events) - 1] << 6) + (cd >> 22 & 0x3F)
    return {"t": t, "x": (cd >> 11 & 0x7FF).astype(np.uint16), "y": (cd & 0x7FF).astype(np.uint16), "p": kind[events]}


_ADDR_Y, _ADDR_X, _BASE_X, _VECT_12, _VECT_8, _LOW, _HIGH = 0, 2, 3, 4, 5, 6, 8


def _evt3(words: np.ndarray, path: Path) -> Columns:
    """A state machine over 16-bit words, done by "the last word of that kind before this one".

    EVT_ADDR_Y sets y; EVT_ADDR_X is an event; VECT_BASE_X sets x and polarity for vectors, each of which stands for 12 or 8 neighbouring
    pixels and moves x on by as many; EVT_TIME_HIGH and EVT_TIME_LOW set 12 bits of time each, and another high part clears the low
    one; one that is sent again does not, as in Prophesee's own decoder (OpenEB).
    """
    _check_count(len(words), path)
    kind, low = (words >> 12).astype(np.uint8), words & np.uint16(0xFFF)
    highs = np.flatnonzero(kind == _HIGH)
    at = np.flatnonzero((kind == _ADDR_X) | (kind == _VECT_12) | (kind == _VECT_8))
    rows = np.flatnonzero(kind == _ADDR_Y)
    if len(highs) == 0 or len(rows) == 0 or len(at) == 0:
        return _none()
    at = at[(at > highs[0]) & (at > rows[0])]
    bases = np.flatnonzero(kind == _BASE_X)
    vector = kind[at] != _ADDR_X
    if len(bases) == 0:
        at, vector = at[~vector], vector[~vector]
    else:
        known = ~vector | (at > bases[0])
        at, vector = at[known], vector[known]
    # time
    mark = np.searchsorted(highs, at) - 1
    time = _unrolled(low[highs].astype(np.int64), 12)[mark] << 12
    lows = np.flatnonzero(kind == _LOW)
    if len(lows):
        last = np.searchsorted(lows, at) - 1
        others = highs[np.diff(low[highs].astype(np.int64), prepend=-1) != 0]
        fresh = (last >= 0) & (lows[last] > others[np.searchsorted(others, at) - 1])
        time += np.where(fresh, low[lows[last]], 0)
    y = low[rows[np.searchsorted(rows, at) - 1]] & 0x7FF
    # what vectors have moved x by since their base
    step = np.where(kind == _VECT_12, 12, np.where(kind == _VECT_8, 8, 0))
    moved = np.cumsum(step) - step
    x, p, mask = (low[at] & 0x7FF).astype(np.int64), (low[at] >> 11).astype(np.uint8), np.ones(len(at), np.uint16)
    if vector.any():
        held = at[vector]
        base = bases[np.searchsorted(bases, held) - 1]
        x[vector] = (low[base] & 0x7FF) + moved[held] - moved[base]
        p[vector] = low[base] >> 11
        mask[vector] = np.where(kind[held] == _VECT_8, low[held] & 0xFF, low[held])
    # a vector's pixels in order, lowest bit first
    bits = (mask[:, None] >> np.arange(12, dtype=np.uint16)) & 1
    which, bit = np.nonzero(bits)
    _check_count(len(which), path)
    return {"t": time[which], "x": (x[which] + bit).astype(np.uint16), "y": y[which], "p": p[which]}


def _unrolled(values: np.ndarray, bits: int) -> np.ndarray:
    """Counter values with its turns added: a fall by more than half of its range is a turn. A smaller one stays, and is refused later."""
    turns = np.cumsum(np.diff(values, prepend=values[:1]) < -(1 << (bits - 1)))
    return values + (turns << bits)


def _none() -> Columns:
    return {"t": np.empty(0, np.int64), "x": np.empty(0, np.uint16), "y": np.empty(0, np.uint16), "p": np.empty(0, np.uint8)}
