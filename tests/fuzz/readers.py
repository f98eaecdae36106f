"""The readers under fuzzing. Each takes bytes, and either gives what its module promises or raises its module's error: nothing else."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from fuzz.mutate import changed_bytes, changed_value
from stagebench.config import DatasetConfig, load_config
from stagebench.errors import ConfigError, DatasetError, MergeError, SourceError, StagebenchError, StoreError, TimingError

__all__ = ["READERS", "Broken", "Reader"]


class Broken(AssertionError):
    """A reader took an input and gave something that it must not give."""


@dataclass(frozen=True)
class Reader:
    """One reader: how inputs are made, how one is read, and which errors are answers."""

    name: str
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]
    answers: tuple[type[StagebenchError], ...]

    def holds(self, data: bytes) -> bool:
        """Whether the input was taken (True) or refused by an error of ours (False). Anything else is raised."""
        try:
            self.read(data)
        except self.answers as error:
            if not str(error).strip():
                raise Broken("refused without a word") from error
            return False
        return True


@cache
def _folder() -> Path:
    """A folder in memory where there is one: millions of files are written here."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="stagebench-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))


def _file(name: str, data: bytes) -> Path:
    path = _folder() / f"{os.getpid()}-{name}"
    path.write_bytes(data)
    return path


# ---- event files

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
    from stagebench.sources.events import read_events
    from stagebench.sources.safe_npy import load_events_dict

    path = _file("clip.npz" if data[:2] == b"PK" else "clip.npy", data)
    arrays = load_events_dict(path)
    for name, array in arrays.items():
        if type(array) is not np.ndarray or array.dtype.kind not in "biuf" or array.nbytes > 100 * len(data) + (1 << 20):
            raise Broken(f"{name}: {type(array).__name__} of {array.dtype}, {array.nbytes} bytes out of {len(data)}")
    events = read_events(path)
    if not len(events.x) == len(events.y) == len(events.p) == len(events.t):
        raise Broken("columns of differing lengths")
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

    root = _folder() / f"{os.getpid()}-root"
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


# ---- shards


@cache
def _shard_seeds() -> tuple[bytes, ...]:
    from stagebench.sources.events import Events
    from stagebench.store import ClipRow, ShardWriter

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 3, 6, 8, 3), dtype=np.uint8)
    events = Events(*(rng.integers(0, 2, 12).astype(d) for d in (np.uint16, np.uint16, np.uint8)), np.arange(12, dtype=np.int64))
    seeds = []
    for number, (kind, spec, codec) in enumerate(
        (("frames", {}, "none"), ("frames", {}, "zstd"), ("events", {"representation": "clip"}, "none"))
    ):
        path = _folder() / f"{os.getpid()}-seed-{number}.parquet"
        with ShardWriter(path, kind, spec, codec) as writer:
            for i in range(2):
                row = ClipRow.from_events(f"c{i}", "d", events) if kind == "events" else ClipRow.from_frames(f"c{i}", "d", frames[i])
                writer.add(row)
            writer.add(ClipRow.failed("bad", "d", "zero events"))
        seeds.append(path.read_bytes())
    return tuple(seeds)


def _read_shard(data: bytes) -> object:
    """A changed file is refused when it is verified, whatever the change; read without that, it may give pixels or an error of ours."""
    from stagebench.store import Shard

    path = _file("shard.parquet", data)
    try:
        Shard.open(path, verify=True, threads=1).close()
        if data not in _shard_seeds():
            raise Broken("a changed shard was taken for a good one")
    except StoreError:
        pass
    return _drain(path)


def _read_resealed(data: bytes) -> object:
    """A stranger's shard, whose digests are right: what is inside is still checked."""
    from stagebench.store import _seal

    path = _file("shard.parquet", data)
    blank = bytearray(data)
    for key in (_seal.BODY_KEY, _seal.SEAL_KEY):
        at = blank.rfind(key.encode())
        if at >= 0:
            value = blank.find(next(iter(_digits(blank, at + len(key)))), at) if _digits(blank, at + len(key)) else -1
            if value >= 0:
                blank[value : value + 64] = _seal.UNSEALED.encode()
    path.write_bytes(blank)
    fd = os.open(path, os.O_RDWR)
    try:
        _seal.patch(path, fd)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise StoreError(f"cannot be sealed: {error}") from error
    finally:
        os.close(fd)
    return _drain(path)


def _digits(data: bytearray, begin: int) -> list[bytes]:
    import re

    found = re.search(rb"[0-9a-f]{64}", bytes(data[begin : begin + 90]))
    return [found.group()] if found else []


def _drain(path: Path) -> object:
    from stagebench.store import Shard

    with Shard.open(path, verify=False) as shard:
        for clip in shard.clips:
            if not shard.row(clip).ok:
                continue
            if shard.raw_events:
                shard.events(clip)
            else:
                for frame in shard.frames(clip):
                    if frame.dtype != np.uint8 or frame.shape[-1] != 3:
                        raise Broken(f"frame of {frame.dtype} {frame.shape}")
        return shard.clips


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
)
TEXT_SHARE = 0.02
"""Of the configurations are changed as YAML text, which takes milliseconds to parse; the others as the values that it would hold."""


def _make_config(rng: random.Random) -> bytes:
    if rng.random() < TEXT_SHARE:
        return b"Y" + changed_bytes([YAML, yaml.safe_dump(CONFIG["timing"]).encode()], rng, YAML_TOKENS)
    return b"V" + json.dumps(changed_value(CONFIG, rng)).encode()


def _read_config(data: bytes) -> object:
    given = _file("config.yaml", data[1:]) if data[:1] == b"Y" else json.loads(data[1:])
    config = load_config({"text": given} if isinstance(given, str) else given)  # a text would be a file's name
    json.dumps(config.model_dump(mode="json"), allow_nan=False)  # what is taken can be written to a plan
    return config


# ---- results

JSON_TOKENS = (b"NaN", b"Infinity", b"null", b"{}", b"[]", b'"', b"[" * 3000, b"-1", b"1e400", b'{"a":', b"\\ud800", b"\xff")


@cache
def _results_seeds() -> Mapping[str, bytes]:
    from factories import BASE_MS, make_study

    folder = _folder() / f"{os.getpid()}-results"
    plan = make_study(folder, samples=2, sequences=1, blocks=1, models={"eventgpt": {}}, lengths=("natural",), repeats=1)
    assert BASE_MS
    summary = {"config": plan.config.model_dump(mode="json"), "machines": {}, "studies": {}, "verdict": "VALID", "reasons": []}
    journal = _file("job.journal", b"")
    journal.unlink()
    from stagebench.session.journal import Journal

    with Journal(journal, IDENTITY) as opened:
        opened.append("g0", [{"sample": "a", "total_ms": 1.5}])
        opened.append("g1", [{"sample": "b", "total_ms": 2.5}])
    return {
        "T": (folder / plan.jobs[0].path).read_bytes(),
        "S": json.dumps(summary).encode(),
        "J": journal.read_bytes(),
        "V": (folder / "verify/eventgpt.json").read_bytes(),
    }


IDENTITY = {"job": "j", "study": "s", "machine": "m"}


def _make_results(rng: random.Random) -> bytes:
    kind = rng.choice("TSJV")
    return kind.encode() + changed_bytes([_results_seeds()[kind]], rng, JSON_TOKENS)


def _read_results(data: bytes) -> object:
    from stagebench.compare import _summary
    from stagebench.merge import gather as _gather
    from stagebench.merge import validity as _validity
    from stagebench.session.journal import Journal

    kind, data = data[:1], data[1:]
    folder = _folder() / f"{os.getpid()}-read"
    folder.mkdir(exist_ok=True)
    if kind == b"T":
        plan = _plan()
        path = folder / plan.jobs[0].path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return _gather._rows(_gather._planned(plan, plan.jobs[0], _gather._open(plan.jobs[0], folder)))
    if kind == b"S":
        (folder / "summary.json").write_bytes(data)
        return _summary(folder)
    if kind == b"V":
        (folder / "eventgpt.json").write_bytes(data)
        reports, findings = _validity.read_verifications(folder, ["eventgpt.json"])
        if not reports and not findings:
            raise Broken("a proof that cannot be read went without a finding")
        return reports
    for old in folder.glob("job.journal*"):
        old.unlink()
    (folder / "job.journal").write_bytes(data)
    with Journal(folder / "job.journal", IDENTITY) as journal:
        good = {"g0": [{"sample": "a", "total_ms": 1.5}], "g1": [{"sample": "b", "total_ms": 2.5}]}
        for key, rows in journal.groups.items():
            if good.get(key) != rows:
                raise Broken(f"group {key} came back as {rows}")
    return None


@cache
def _plan() -> Any:
    from factories import make_study

    return make_study(
        _folder() / f"{os.getpid()}-plan", samples=2, sequences=1, blocks=1, models={"eventgpt": {}}, lengths=("natural",), repeats=1
    )


def _bytes_of(seeds: Callable[[], Sequence[bytes]], tokens: Sequence[bytes] = ()) -> Callable[[random.Random], bytes]:
    return lambda rng: changed_bytes(seeds(), rng, tokens)


READERS = {
    reader.name: reader
    for reader in (
        Reader("npy", _bytes_of(_npy_seeds, NPY_TOKENS), _read_npy, (SourceError,)),
        Reader("index", _bytes_of(_index_seeds, INDEX_TOKENS), _read_index, (DatasetError, ConfigError)),
        Reader("shard", _bytes_of(_shard_seeds), _read_shard, (StoreError,)),
        Reader("resealed", _bytes_of(_shard_seeds, JSON_TOKENS), _read_resealed, (StoreError, SourceError)),
        Reader("config", _make_config, _read_config, (ConfigError,)),
        Reader("results", _make_results, _read_results, (MergeError, TimingError)),
    )
}
