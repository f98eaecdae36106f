"""AEDAT4 recordings (iniVation's DV), read by the `aedat` package: pip install 'stagebench[events-raw]'."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from stagebench.errors import CorruptClipError, SourceError, UnsafeFileError

__all__ = ["read_aedat4"]

MAX_EVENTS = 300_000_000


def read_aedat4(path: Path, window: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """Columns p (bool), t (int64 µs since 1970), x, y of the file's event stream. Packets outside of a window [t0, t1) are dropped at once.

    Raises SourceError for a missing file or library, CorruptClipError for a damaged file or one without exactly one event stream,
    UnsafeFileError above MAX_EVENTS.
    """
    try:
        aedat: Any = importlib.import_module("aedat")
    except ImportError:
        raise SourceError(f"{path}: AEDAT4 needs the package aedat, which is not installed. pip install 'stagebench[events-raw]'") from None
    if not path.is_file():
        raise SourceError(f"{path}: no such file. Check the dataset's root and the index.")
    kept: list[np.ndarray] = []
    count = 0
    try:
        decoder = aedat.Decoder(path)
        streams = [number for number, about in decoder.id_to_stream().items() if about["type"] == "events"]
        if len(streams) != 1:
            raise CorruptClipError(f"{path}: {len(streams)} event streams, expected one. Export one camera's events alone.")
        for packet in decoder:
            if packet["stream_id"] != streams[0] or "events" not in packet:
                continue
            events = packet["events"]
            if window is not None:
                events = events[(events["t"].astype(np.int64) >= window[0]) & (events["t"].astype(np.int64) < window[1])]
            count += len(events)
            if count > MAX_EVENTS:
                raise UnsafeFileError(f"{path}: more than {MAX_EVENTS:,} events. Give the clip an event_window.")
            kept.append(events.copy())
    except SourceError:
        raise
    except BaseException as error:  # the library is Rust: a panic is a BaseException of its own
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit)):
            raise
        raise CorruptClipError(f"{path}: not readable as AEDAT4 ({str(error)[:200]}). Copy it again, or leave the clip out.") from None
    if not kept:
        kept = [np.empty(0, np.dtype([("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")]))]
    names = kept[0].dtype.names or ()
    polarity = next((name for name in ("on", "p") if name in names), None)
    if polarity is None:
        raise SourceError(f"{path}: the package aedat gives {names}, expected t, x, y, on. Install aedat >= 2.")
    # absolute times fit int64: they are microseconds
    joined = {name: np.concatenate([part[name] for part in kept]) for name in ("t", "x", "y", polarity)}
    return {"p": joined[polarity].astype(np.bool_), "t": joined["t"].astype(np.int64), "x": joined["x"], "y": joined["y"]}
