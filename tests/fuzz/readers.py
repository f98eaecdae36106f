"""The readers under fuzzing. Each takes bytes, and either gives what its module promises or raises its module's error: nothing else."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
from functools import cache
from typing import Any

import numpy as np
import yaml

from fuzz import results, shards
from fuzz.base import Broken, Reader, bytes_of, folder, in_file
from fuzz.mutate import changed_bytes, changed_value
from stagebench.config import DatasetConfig, load_config
from stagebench.errors import ConfigError, DatasetError, SourceError

__all__ = ["READERS", "Broken", "Reader"]


# ---- event files

SENSOR = (480, 640)

NPY_TOKENS = (
    b"cos\nsystem\n",
    b"\x93",
    b"R",
    b"b.",
    b"\x8c\x06posix\x94",
    b"numpy\nndarray\n",
    b"<i8",
    b"|O",
    b"(K\x00t",
    b"\x85",
    b"}",
    b"]",
    b"e",
)


@cache
def _npy_seeds() -> tuple[bytes, ...]:
    n = 20
    rng = np.random.default_rng(0)
    events = {
        "p": rng.integers(0, 2, n).astype(np.uint8),
        "t": 51_800_000_000 + np.cumsum(rng.integers(0, 90, n)),
        "x": rng.integers(0, 640, n).astype(np.uint16),
        "y": rng.integers(0, 480, n).astype(np.uint16),
    }
    seeds = []
    for protocol in range(6):
        body = pickle.dumps(np.array(events, dtype=object), protocol=protocol)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
        seeds.append(header.getvalue() + body)
    plain, archive, packed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(plain, events["t"])
    np.savez(archive, **events)
    np.savez_compressed(packed, **events)
    return (*seeds, plain.getvalue(), archive.getvalue(), packed.getvalue())


def _read_npy(data: bytes) -> object:
    from stagebench.render import event_codes, voxel_grid
    from stagebench.sources.events import read_events
    from stagebench.sources.safe_npy import load_events_dict

    path = in_file("clip.npz" if data[:2] == b"PK" else "clip.npy", data)
    arrays = load_events_dict(path)
    for name, array in arrays.items():
        if type(array) is not np.ndarray or array.dtype.kind not in "biuf" or array.nbytes > 100 * len(data) + (1 << 20):
            raise Broken(f"{name}: {type(array).__name__} of {array.dtype}, {array.nbytes} bytes out of {len(data)}")
    events = read_events(path)
    if not len(events.x) == len(events.y) == len(events.p) == len(events.t):
        raise Broken("columns of differing lengths")
    event_codes(events, parts=2, sensor=SENSOR)  # compiled code that looks at no bounds: what is beyond the sensor must not reach it
    voxel_grid(events, 3, SENSOR)
    return events


# ---- dataset index

INDEX_TOKENS = (
    b"../",
    b"/",
    b'"',
    b"[",
    b"{",
    b"]",
    b"}",
    b",",
    b":",
    b"\\u0000",
    b"\\ud800",
    b"null",
    b"1e999",
    b"NaN",
    b"[" * 3000,
    b"\xff",
    b"\\",
)


@cache
def _index_seeds() -> tuple[bytes, ...]:
    def entry(i: int, **more: Any) -> dict[str, Any]:
        turns = [{"from": "human", "value": f"<event>\nWhat is {i}?"}, {"from": "gpt", "value": "A road."}]
        return {"id": str(i), "split": "test", "event_data": f"s/{i:06d}.npy", "mp4_data": f"s/{i:06d}.mp4", "conversations": turns, **more}

    images = entry(3, event_image=["s/3_0.png", "s/3_10.png"], video_data="s/000003")
    window = entry(4, event_data="s/events.h5", event_window=[100, 900])
    return tuple(json.dumps(value).encode() for value in ([entry(0)], [entry(0), entry(1)], [images], [entry(2), window]))


def _read_index(data: bytes) -> object:
    from stagebench.dataset import load_dataset, resolve

    root = folder() / f"{os.getpid()}-root"
    root.mkdir(exist_ok=True)
    (root / "index.json").write_bytes(data)
    dataset = load_dataset("d", DatasetConfig(root=str(root), index="index.json"))
    for clip in dataset.clips.values():
        for value in clip.files.values():
            for name in value if isinstance(value, tuple) else (value,):
                if not resolve(root, name).is_relative_to(root.resolve()):
                    raise Broken(f"{name!r} leaves the root")
    keys = [sample.key for sample in dataset.samples]
    if keys != sorted(set(keys)):
        raise Broken("keys are not sorted and distinct")
    json.dumps([clip.key for clip in dataset.clips.values()]).encode("ascii")
    return dataset


# ---- configuration

CONFIG: dict[str, Any] = {
    "study": "s",
    "datasets": {"d": {"root": "r", "sensor": [4, 6], "query": None, "max_samples": 3}},
    "frames": {"source": "cache", "count": 8, "sampling": "linspace"},
    "models": {"v": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"}},
    "variants": {"engine": ["generate"], "batch": [1], "temperature": 0, "top_p": 1},
    "timing": {"warmup": 2, "repeats": {"min": 1, "max": 3, "target_cv": 0.1}, "lengths": ["natural", 16], "seed": 0},
    "compare": {"reference": "v", "confidence": 0.95, "resamples": 200},
}
YAML = b"study: s\ndatasets: {d: {root: r, sensor: [4, 6]}}\nmodels: {v: {adapter: hf, input: frames, weights: 'dummy:0', preset: tiny}}\n"
YAML_TOKENS = (
    b"&a",
    b"*a",
    b"!!python/object/apply:os.system ['x']",
    b"? ",
    b"- ",
    b"[" * 2000,
    b"<<: ",
    b"|\n",
    b"'",
    b"%",
    b"\t",
    b": ",
    b"#",
    b"!!int ''",
    b"!!timestamp x",
    b"2001-99-99",
)
TEXT_SHARE = 0.02
"""Of the configurations are changed as YAML text, which takes milliseconds to parse; the others as the values that it would hold."""


def _make_config(rng: random.Random) -> bytes:
    if rng.random() < TEXT_SHARE:
        return b"Y" + changed_bytes([YAML, yaml.safe_dump(CONFIG["timing"]).encode()], rng, YAML_TOKENS)
    return b"V" + json.dumps(changed_value(CONFIG, rng)).encode()


def _read_config(data: bytes) -> object:
    given = in_file("config.yaml", data[1:]) if data[:1] == b"Y" else json.loads(data[1:])
    config = load_config({"text": given} if isinstance(given, str) else given)  # a text would be a file's name
    json.dumps(config.model_dump(mode="json"), allow_nan=False)  # what is taken can be written to a plan
    return config


READERS = {
    reader.name: reader
    for reader in (
        Reader("npy", bytes_of(_npy_seeds, NPY_TOKENS), _read_npy, (SourceError,)),
        Reader("index", bytes_of(_index_seeds, INDEX_TOKENS), _read_index, (DatasetError, ConfigError)),
        Reader("config", _make_config, _read_config, (ConfigError,)),
        *shards.READERS,
        *results.READERS,
    )
}
