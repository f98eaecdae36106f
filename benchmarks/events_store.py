"""Event clips on disk: bytes an event, and CPU time of writing and reading, against npy, HDF5 and Arrow; exact round trips checked first.

    .venv/bin/python benchmarks/events_store.py           # about a minute
    .venv/bin/python benchmarks/events_store.py --quick

All ways interleaved in one run, medians, from a warm page cache. Ours verifies what it reads (page checksums); no other way does. The
npy is what EventGPT's dataset holds (a pickled dict); Arrow is a Feather file of x, y, p, t with zstd; HDF5 is DSEC's columns with gzip-4
and shuffle, and with blosc-zstd where hdf5plugin is there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import feather

from common import interleaved, machine, ratio, real_events, synthetic_events, table
from stagebench.sources.events import Events, read_events, to_source_dict
from stagebench.store import ClipRow, Shard, ShardWriter

Columns = dict[str, np.ndarray]
SPEC = {"kind": "events", "representation": "clip"}


def ours(path: Path, events: Events) -> tuple[Callable[[], Any], Callable[[], Columns]]:
    def write() -> None:
        with ShardWriter(path, "events", SPEC) as writer:
            writer.add(ClipRow.from_events("clip", "d", events))

    def read() -> Columns:
        with Shard.open(path, verify=True) as shard:
            return to_source_dict(shard.events("clip"))

    return write, read


def npy(path: Path, events: Events) -> tuple[Callable[[], Any], Callable[[], Columns]]:
    columns = to_source_dict(events)
    return lambda: np.save(path, np.array(columns, dtype=object), allow_pickle=True), lambda: to_source_dict(read_events(path))


def arrow(path: Path, events: Events) -> tuple[Callable[[], Any], Callable[[], Columns]]:
    given = pa.table({key: np.ascontiguousarray(value) for key, value in to_source_dict(events).items()})

    def read() -> Columns:
        found = feather.read_table(path, memory_map=False)
        return {key: found[key].to_numpy() for key in ("p", "t", "x", "y")}

    return lambda: feather.write_feather(given, path, compression="zstd", compression_level=1), read


def hdf5(path: Path, events: Events, blosc: bool) -> tuple[Callable[[], Any], Callable[[], Columns]]:
    import h5py

    options: Any = {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    if blosc:
        import hdf5plugin

        options = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE)
    columns = to_source_dict(events)

    def write() -> None:
        with h5py.File(path, "w") as file:
            for key, value in columns.items():
                file.create_dataset(f"events/{key}", data=value, chunks=(min(len(value), 65536),), **options)

    def read() -> Columns:
        with h5py.File(path, "r") as file:
            return {key: file[f"events/{key}"][:] for key in ("p", "t", "x", "y")}

    return write, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="measuring time of a comparison")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    seconds = 0.5 if arguments.quick else arguments.seconds
    print(machine("pyarrow", "numpy", "h5py", "hdf5plugin"))
    clips = real_events() | {"synthetic 2M": synthetic_events(2_000_000)}
    if arguments.quick:
        clips = dict(list(clips.items())[:1])
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, events in clips.items():
            ways = {
                "ours": (folder / "a.parquet", ours),
                "npy (pickled dict)": (folder / "a.npy", npy),
                "Arrow Feather zstd-1": (folder / "a.arrow", arrow),
                "HDF5 gzip-4": (folder / "a.h5", lambda p, e: hdf5(p, e, False)),
                "HDF5 blosc-zstd-1": (folder / "b.h5", lambda p, e: hdf5(p, e, True)),
            }
            writers, readers, exact, sizes = {}, {}, {}, {}
            want = to_source_dict(events)
            for way, (path, make) in ways.items():
                try:
                    write, read = make(path, events)
                    write()
                    got = read()
                except ImportError as error:
                    print(f"left out: {way}: {error}")
                    continue
                exact[way] = all(np.array_equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want)
                sizes[way] = path.stat().st_size / len(events)
                writers[way], readers[way] = write, read
            wrote, read_times = interleaved(writers, seconds), interleaved(readers, seconds)
            for way in writers:
                cells = [f"{np.median(t[way]) / len(events) * 1e9:.1f} ({ratio(t, way, 'ours'):.2f})" for t in (wrote, read_times)]
                rows.append((name, f"{len(events):,}", way, f"{sizes[way]:.2f}", *cells, exact[way]))
    table("clip | events | way | bytes/event | write ns/event (x ours) | read ns/event (x ours) | exact", rows)


if __name__ == "__main__":
    main()
