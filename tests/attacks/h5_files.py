"""Hostile DSEC HDF5 files. `ATTACKS` maps a name to (builder taking a path, words that the refusal must hold)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np


def recording(
    path: Path, t: np.ndarray, *, offset: int | None = 51_835_000_000, index: bool = True, chunk: int = 500, **options: object
) -> None:
    """A good recording in DSEC's layout: x, y, p follow from the event's number."""
    import h5py

    number = np.arange(len(t))
    with h5py.File(path, "w") as file:
        for key, values in (("x", number % 640), ("y", number % 480), ("p", number % 2), ("t", t)):
            dtype = {"p": np.uint8, "t": np.uint32}.get(key, np.uint16)
            file.create_dataset(f"events/{key}", data=values.astype(dtype), chunks=(min(chunk, max(1, len(t))),), **options)
        if offset is not None:
            file["t_offset"] = np.int64(offset)
        if index:
            milliseconds = np.arange(int(t[-1]) // 1000 + 1 if len(t) else 1)
            file["ms_to_idx"] = np.searchsorted(t, milliseconds * 1000).astype(np.uint64)


_T = np.arange(1000) * 37


def _replace(name: str, make: Callable) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        import h5py

        recording(path, _T)
        outside = path.with_name("outside.h5")
        recording(outside, _T)
        with h5py.File(path, "a") as file:
            del file[name]
            make(h5py, file, outside)

    return build


def _virtual(h5py, file, outside: Path) -> None:
    layout = h5py.VirtualLayout(shape=(1000,), dtype="u4")
    layout[:] = h5py.VirtualSource(str(outside), "events/t", shape=(1000,))
    file.create_virtual_dataset("events/t", layout)


def _external_storage(h5py, file, outside: Path) -> None:
    file.create_dataset("events/x", shape=(1000,), dtype="u2", external=[(str(outside), 0, 2000)])


def _set(name: str, value: object) -> Callable:
    def make(h5py, file, outside: Path) -> None:
        file[name] = value

    return make


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "external_link": (_replace("events/x", lambda h, f, o: f.__setitem__("events/x", h.ExternalLink(str(o), "events/x"))), "ExternalLink"),
    "external_group": (_replace("events", lambda h, f, o: f.__setitem__("events", h.ExternalLink(str(o), "events"))), "ExternalLink"),
    "soft_link": (_replace("events/x", lambda h, f, o: f.__setitem__("events/x", h.SoftLink("/events/y"))), "SoftLink"),
    "virtual": (_replace("events/t", _virtual), "other files"),
    "external_storage": (_replace("events/x", _external_storage), "other files"),
    "claims_terabytes": (_replace("events/x", lambda h, f, o: f.create_dataset("events/x", (2**40,), "u2", chunks=(1000,))), "claims"),
    "index_claims_terabytes": (
        _replace("ms_to_idx", lambda h, f, o: f.create_dataset("ms_to_idx", (2**40,), "u8", chunks=(1000,))),
        "claims",
    ),
    "objects": (_replace("events/x", lambda h, f, o: f.create_dataset("events/x", data=["a"] * 1000)), "expected integers"),
    "floats": (_replace("events/t", _set("events/t", np.arange(1000.0))), "expected integers"),
    "no_group": (_replace("events", lambda h, f, o: None), "no events/p"),
    "group_as_column": (_replace("events/x", lambda h, f, o: f.create_group("events/x")), "no dataset"),
    "other_length": (_replace("events/x", _set("events/x", np.zeros(999, np.uint16))), "one length"),
    "index_beyond_the_end": (_replace("ms_to_idx", _set("ms_to_idx", np.full(37, 10**9, np.uint64))), "ms_to_idx"),
    "index_too_late": (_replace("ms_to_idx", _set("ms_to_idx", np.full(37, 900, np.uint64))), "ms_to_idx"),
    "index_too_early": (_replace("ms_to_idx", _set("ms_to_idx", np.zeros(37, np.uint64))), "ms_to_idx"),
}
