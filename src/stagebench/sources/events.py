"""Event clips: one form for npy, npz and DSEC's HDF5, exact enough to be written back as they came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stagebench.errors import CorruptClipError, ShortClipError, SourceError
from stagebench.sources.safe_npy import load_events_dict

__all__ = ["Events", "read_events", "to_source_dict"]

_PM1 = "_pm1"
_KEYS = ("p", "t", "x", "y")


@dataclass(frozen=True, eq=False)
class Events:
    """Events of a clip in the order of time. Arrays may be read-only views of a file's bytes."""

    x: np.ndarray
    """uint16 [n], pixels from the left."""
    y: np.ndarray
    """uint16 [n], pixels from the top."""
    p: np.ndarray
    """uint8 [n]: 1 brighter, 0 darker."""
    t: np.ndarray
    """int64 [n], microseconds, never falling; absolute or from the clip's begin, as the source has it."""
    t_dtype: str = "<i8"
    """The source's dtype of t (numpy's string)."""
    p_coding: str = "uint8"
    """The source's dtype of p by name, with "_pm1" where it holds -1 for darker: "uint8", "bool", "int8_pm1"."""

    def __post_init__(self) -> None:
        n = len(self.x)
        for name, dtype in (("x", np.uint16), ("y", np.uint16), ("p", np.uint8), ("t", np.int64)):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != (n,):
                raise ValueError(
                    f"Events.{name}: {array.dtype} {array.shape}, expected {np.dtype(dtype)} ({n},). Use read_events, or convert it first."
                )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def t0(self) -> int:
        """Time of the first event in microseconds; 0 when there is none."""
        return int(self.t[0]) if len(self.t) else 0


def read_events(path: Path, *, window: tuple[int, int] | None = None) -> Events:
    """Read a clip.

    `.npy` holds a pickled dict (read by the restricted loader), `.npz` plain arrays: p uint8, bool or signed with 0/1 or -1/1; t any
    integer, microseconds; x, y integers below 65536. `.h5`/`.hdf5` is DSEC's layout; t becomes absolute by its `t_offset`.
    `.dat`, `.raw` (EVT 2.0, EVT 3.0) are Prophesee's, `.aedat4` is iniVation's (package `aedat`, extra `events-raw`).
    `window` takes events with t0 <= t < t1, in the file's own times (absolute for HDF5); the rest of an HDF5 or DAT file is not read.

    Times that fall are refused: they come from a uint16 clock that ran over (clips above 65.5 ms) or from files put together in the
    wrong order, and every split and every "last event wins" would be wrong in silence.

    Raises SourceError when the file or a library is missing, UnsafeFileError and CorruptClipError for what is in it, ShortClipError for
    no events.
    """
    path = Path(path)
    if window is not None and window[0] >= window[1]:
        raise SourceError(f"{path}: window {window}, expected [t0, t1) with t0 < t1 in microseconds. Correct the clip's event_window.")
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        events = from_arrays(load_events_dict(path), str(path))
        if window is not None:
            first, last = np.searchsorted(events.t, window)
            events = _cut(events, int(first), int(last))
    elif suffix in (".h5", ".hdf5"):
        from stagebench.sources._dsec import read_dsec

        events = from_arrays(read_dsec(path, window), str(path))
    elif suffix == ".aedat4":
        from stagebench.sources._aedat4 import read_aedat4

        events = from_arrays(read_aedat4(path, window), str(path))
    elif suffix in (".dat", ".raw"):
        from stagebench.sources._prophesee import read_dat, read_raw

        events = from_arrays(read_dat(path, window) if suffix == ".dat" else read_raw(path), str(path))
        if suffix == ".raw" and window is not None:
            first, last = np.searchsorted(events.t, window)
            events = _cut(events, int(first), int(last))
    else:
        raise SourceError(
            f"{path}: events are read from .npy, .npz, .h5, .hdf5, .dat, .raw and .aedat4, not {suffix or 'a name without suffix'}. "
            "Convert the clip, or rename it."
        )
    if len(events) == 0:
        where = "the file" if window is None else f"the window [{window[0]}, {window[1]}) µs"
        raise ShortClipError(f"{path}: no events in {where}. Leave the clip out of the index, or correct its window.")
    return events


def to_source_dict(events: Events) -> dict[str, np.ndarray]:
    """The dict that the source held: t and p in the source's own dtype and coding. The inverse of `read_events`."""
    coding = events.p_coding
    dtype = np.dtype(coding.removesuffix(_PM1))
    p = events.p.astype(dtype)
    if coding.endswith(_PM1):
        p = p * dtype.type(2) - dtype.type(1)
    return {"p": p, "t": events.t.astype(events.t_dtype), "x": events.x, "y": events.y}


def from_arrays(arrays: dict[str, np.ndarray], where: str) -> Events:
    """Check and normalise the four columns. `where` names the file in messages."""
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise CorruptClipError(
            f"{where}: no {', '.join(missing)} among {sorted(arrays)}, expected p, t, x, y. Save the events with these names."
        )
    sizes = {key: arrays[key].shape for key in _KEYS}
    n = len(arrays["t"]) if arrays["t"].ndim == 1 else -1
    if any(shape != (n,) for shape in sizes.values()):
        shown = ", ".join(f"{key} {shape}" for key, shape in sizes.items())
        raise CorruptClipError(
            f"{where}: columns of different or wrong shape: {shown}; expected one dimension and one length. Save the clip again."
        )
    p, coding = _polarity(arrays["p"], where)
    return Events(
        x=_coordinate(arrays["x"], "x", where),
        y=_coordinate(arrays["y"], "y", where),
        p=p,
        t=_times(arrays["t"], where),
        t_dtype=arrays["t"].dtype.str,
        p_coding=coding,
    )


def _coordinate(array: np.ndarray, name: str, where: str) -> np.ndarray:
    if array.dtype == np.uint16:
        return array
    if array.dtype.kind not in "iu":
        raise CorruptClipError(f"{where}: {name} is {array.dtype}, expected uint16 pixels. Round it and save it as uint16.")
    if array.size and (int(array.min()) < 0 or int(array.max()) > 0xFFFF):
        raise CorruptClipError(
            f"{where}: {name} runs from {int(array.min())} to {int(array.max())}, expected 0 to 65535. "
            "Drop the events outside of the sensor."
        )
    return array.astype(np.uint16)


def _polarity(array: np.ndarray, where: str) -> tuple[np.ndarray, str]:
    """(uint8 0/1, coding)."""
    if array.dtype == np.bool_:
        return array.view(np.uint8), "bool"
    if array.dtype.kind not in "iu":
        raise CorruptClipError(f"{where}: p is {array.dtype}, expected uint8, bool or int8. Save it as uint8 with 0 and 1.")
    name = array.dtype.name
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low >= 0 and high <= 1:
        return array.astype(np.uint8, copy=False), name
    if low == -1 and high <= 1 and not (array == 0).any():
        return (array > 0).view(np.uint8), name + _PM1
    raise CorruptClipError(
        f"{where}: p holds values from {low} to {high}, expected 0 and 1, or -1 and 1. Save it with one of these codings."
    )


def _times(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise CorruptClipError(
            f"{where}: t is {array.dtype}, expected whole microseconds. Multiply seconds by 1e6, round, and save as int64."
        )
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size and int(array.max()) >= 2**63:
        raise CorruptClipError(f"{where}: t goes up to {int(array.max())}, beyond int64. Save it in microseconds.")
    times = array.astype(np.int64, copy=False)
    falls = times[1:] < times[:-1]
    if falls.any():
        at = int(falls.argmax())
        clock = " A uint16 clock runs over every 65.5 ms: save absolute int64 times." if array.dtype.itemsize == 2 else ""
        raise CorruptClipError(
            f"{where}: t falls from {int(times[at])} to {int(times[at + 1])} at event {at + 1}, expected times in order."
            f"{clock or ' Sort the events by t (stable), and save the clip again.'}"
        )
    return times


def _cut(events: Events, first: int, last: int) -> Events:
    part = slice(first, last)
    return Events(events.x[part], events.y[part], events.p[part], events.t[part], events.t_dtype, events.p_coding)
