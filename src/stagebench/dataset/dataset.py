"""The dataset's index: clips, samples, their keys, and the guard on every path that the index names.

The layout is the one that EventGPT users have:

    <root>/EventGPT_Instruction_Subset.json   list of entries {id, split, event_data, mp4_data, video_data, event_image[], conversations[]}
    <root>/event_npy/<event_data>             events: `.npy`, `.npz` (`.h5`, `.hdf5` lie under <root>/event_h5/)
    <root>/mp4/<mp4_data>                     video
    <root>/video/<video_data>/                the same video as a folder of images
    <root>/event_image/<event_image[i]>       rendered event frames

An entry needs at least one of the four. Of a long `.h5` recording `event_window: [t0, t1]` (absolute microseconds) takes a clip.
An index is untrusted input: its size and nesting are bounded, and no path in it may leave the root.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from stagebench.config import DatasetConfig
from stagebench.dataset.guard import MAX_PATH_CHARS, PLAIN, clean_path, guard_links, resolve
from stagebench.dataset.index import iterate_index, read_index, read_questions
from stagebench.errors import ConfigError, DatasetError

__all__ = ["Clip", "Dataset", "Sample", "Source", "load_dataset", "read_source"]

_FOLDERS = {"events": "event_npy", "mp4": "mp4", "frames": "video", "images": "event_image"}
_H5 = (".h5", ".hdf5")
_CAMERA = (".raw", ".dat", ".aedat4")
_EVENT_TAG = re.compile(r"<event>\n|\n<event>|<event>")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording. Several samples (questions) may be about it; its pixels are stored once."""

    key: str
    """Relative name without suffix, shared by the clip's event and video files; joined by "+" where they differ."""
    sequence: str
    """The key's folders: what bootstrap intervals are clustered by. "" when there are none."""
    files: Mapping[str, Any]
    """kind -> path relative to the root: "events" and "mp4" a file, "frames" a folder, "images" a folder or a tuple of files."""
    window: tuple[int, int] | None = None
    """[t0, t1) in absolute microseconds: the part of the event recording that is the clip; None takes all of it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one clip."""

    key: str
    """Clip key, "#", 8 hex digits of blake2b over the query: stays the same when a dataset is built again with fresh ids."""
    clip: str
    sequence: str
    id: str
    """The index's own label; not unique, never used to find anything."""
    query: str
    split: str


@dataclass(frozen=True)
class Dataset:
    """What an index says, checked."""

    name: str
    root: Path
    clips: Mapping[str, Clip]
    samples: tuple[Sample, ...]
    """Sorted by key."""
    source: str = ""
    """Digest of the text that this was read from: `Source.digest`."""
    base: str = ""
    """Where the root really lies."""
    links: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Names of the links in each folder that holds any file of the index, by the folder's path below the root."""
    linked: Mapping[str, str] = field(default_factory=dict)
    """Where each file lies that is a link or is reached through one; both paths below the root."""


@dataclass(frozen=True)
class Source:
    """The text that a dataset is made from, not looked into yet."""

    root: Path
    base: str
    """Where the root really lies."""
    path: Path
    """The index."""
    text: str
    queries: list[str] | None
    """What is asked of every clip, or None: each entry's own question."""

    @cached_property
    def digest(self) -> str:
        """Digest of index and queries, by content."""
        whole = blake2b(self.text.encode(), digest_size=16)
        whole.update(json.dumps(self.queries).encode())
        return whole.hexdigest()


def read_source(name: str, config: DatasetConfig) -> Source:
    """Read a dataset's index, and its list of questions where the configuration names one.

    Raises DatasetError or ConfigError for what is not there, too large or no text, UnsafePathError for an index outside the root.
    """
    root = Path(config.root)
    base = os.path.realpath(root)
    if not root.is_dir():
        raise DatasetError(
            f"datasets.{name}.root: no folder at {root.resolve()}. Set datasets.{name}.root to the folder that holds {config.index}."
        )
    if config.query is not None and config.questions_file is not None:
        raise ConfigError(f"datasets.{name}: query and questions_file are both set. Keep one.")
    queries = None
    if config.query is not None:
        if not config.query.strip():
            raise ConfigError(f"datasets.{name}.query is empty. Write a question, or null to take each sample's own.")
        queries = [config.query]
    elif config.questions_file is not None:
        queries = read_questions(Path(config.questions_file))
    path = resolve(root, config.index)
    return Source(root, base, path, read_index(path), queries)


def load_dataset(name: str, config: DatasetConfig) -> Dataset:
    """Read, check and key the index of a dataset.

    Every path is guarded here; whether the files are there is found out when they are read (a missing file is a failed clip).

    Raises DatasetError for an index that is not what it should be, UnsafePathError for a path that leaves the root; both name the entry.
    """
    source = read_source(name, config)
    root, path = source.root, source.path
    # Millions of small objects, none of them garbage: the collector would walk them again and again (half of the time).
    collecting = gc.isenabled()
    gc.disable()
    try:
        clips, samples = _read_entries(name, path, source.text, source.queries)
        links, linked = guard_links(root, ((clip.key, clip.files) for clip in clips.values()), path)
    finally:
        if collecting:
            gc.enable()
    ordered = sorted(samples.values(), key=lambda sample: sample.key)
    if not ordered:
        raise DatasetError(f"{path}: the list is empty. An index needs at least one entry; check datasets.{name}.index.")
    if config.max_samples is not None:
        ordered = ordered[: config.max_samples]
        wanted = {sample.clip for sample in ordered}
        clips = {key: clip for key, clip in clips.items() if key in wanted}
    return Dataset(name, root, clips, tuple(ordered), source.digest, source.base, links, linked)


def _read_entries(name: str, path: Path, text: str, queries: list[str] | None) -> tuple[dict[str, Clip], dict[str, Sample]]:
    clips: dict[str, Clip] = {}
    samples: dict[str, Sample] = {}
    digests: dict[str, str] = {}
    first_of: dict[str, int] = {}
    for number, entry in iterate_index(path, text):
        if not isinstance(entry, dict):
            raise DatasetError(
                f"{path}: entry {number} is a {type(entry).__name__}, expected an object with id, event_data or mp4_data, conversations."
            )
        label = entry.get("id")
        if label is None:
            label = str(number)
        elif not isinstance(label, (str, int)) or isinstance(label, bool):
            raise DatasetError(f"{path}: entry {number}: id is a {type(label).__name__}, expected a string. Quote it.")
        label = str(label)
        split = entry.get("split", "")
        if not isinstance(split, str):
            raise DatasetError(f"{_where(path, number, label)}: split is a {type(split).__name__}, expected a string. Quote it.")
        clip = _clip(entry, path, number, label)
        known = clips.get(clip.key)
        if known is None:
            clips[clip.key] = clip
            first_of[clip.key] = number
        elif known.files != clip.files or known.window != clip.window:
            other = first_of[clip.key]
            raise DatasetError(
                f"{_where(path, number, label)}: clip {clip.key} has other files than in entry {other}: {_differ(known, clip)}. "
                "Entries about one clip must name the same files; rename one of the clips."
            )
        else:
            clip = known
        for query in queries if queries is not None else (_query(entry, path, number, label, name),):
            digest = digests.get(query)
            if digest is None:
                digest = digests[query] = _query_digest(query, path, number, label)
            key = f"{clip.key}#{digest}"
            if key in samples:
                if queries is not None:
                    continue  # the index asked several questions of this clip; the config replaces them all
                earlier = list(samples).index(key)  # each entry so far gave one sample
                raise DatasetError(
                    f"{_where(path, number, label)}: the same clip {clip.key} and question as entry {earlier} (id "
                    f"{samples[key].id[:80]!r}). "
                    "Remove one of the two, or change its question."
                )
            samples[key] = Sample(key, clip.key, clip.sequence, label, query, split)
    return clips, samples


def _where(path: Path, number: int, label: str) -> str:
    return f"{path}: entry {number} (id {label[:80]!r})"


def _differ(a: Clip, b: Clip) -> str:
    for kind in sorted({*a.files, *b.files}):
        if a.files.get(kind) != b.files.get(kind):
            return f"{kind} {b.files.get(kind)!r} against {a.files.get(kind)!r}"
    return f"event_window {b.window} against {a.window}"


def _clip(entry: dict[str, Any], path: Path, number: int, label: str) -> Clip:
    """The clip of an entry. Messages are put together only when something is wrong: this runs a million times."""
    files: dict[str, Any] = {}
    names: list[str] = []
    plain = PLAIN.fullmatch
    for kind, value in (
        ("events", entry.get("event_data")),
        ("mp4", entry.get("mp4_data")),
        ("frames", entry.get("video_data")),
    ):
        if value is None or value == "":
            continue
        if not (value.__class__ is str and len(value) <= MAX_PATH_CHARS and plain(value)):
            value = clean_path(value, _where(path, number, label))
        folder = _FOLDERS[kind]
        stem, dot, suffix = value.rpartition(".")
        if not dot or "/" in suffix or not stem or stem.endswith("/"):
            stem, suffix = value, ""
        if kind == "frames" and suffix in ("mp4", "mkv", "avi", "mov"):
            # older indexes put the MP4's name under video_data
            if "mp4" in files:
                continue
            kind, folder = "mp4", "mp4"
        elif kind == "frames":
            stem = value
        elif kind == "events" and f".{suffix}" in _H5:
            folder = "event_h5"
        elif kind == "events" and f".{suffix}" in _CAMERA:
            folder = "event_raw"
        files[kind] = f"{folder}/{value}"
        if stem not in names:
            names.append(stem)
    images = entry.get("event_image")
    if images:
        files["images"], stem = _images(images, path, number, label)
        if "events" not in files and stem not in names:
            names.insert(0, stem)
    if not files:
        raise DatasetError(
            f"{_where(path, number, label)}: names no file. Give at least one of event_data, mp4_data, video_data, event_image."
        )
    key = names[0] if len(names) == 1 else "+".join(names)
    window = None
    if entry.get("event_window") is not None:
        window = _window(entry["event_window"], path, number, label)
        key = f"{key}@{window[0]}-{window[1]}"
    return Clip(key, names[0].rpartition("/")[0], files, window)


def _images(images: Any, path: Path, number: int, label: str) -> tuple[Any, str]:
    """(value for files["images"], clip name). Natural order: an index sorted as text has _10.png before _2.png."""
    where = _where(path, number, label)
    if isinstance(images, str):
        clean = clean_path(images, where)
        return f"event_image/{clean}", clean
    if not isinstance(images, list):
        raise DatasetError(f"{where}: event_image is a {type(images).__name__}, expected a list of paths or a folder's path.")
    cleaned = sorted((clean_path(image, where) for image in images), key=_natural)
    first = cleaned[0]
    return tuple(f"event_image/{image}" for image in cleaned), re.sub(r"_\d+$", "", first.rsplit(".", 1)[0])


def _natural(text: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in _DIGITS.split(text) if part]


def _window(value: Any, path: Path, number: int, label: str) -> tuple[int, int]:
    right = isinstance(value, list) and len(value) == 2 and all(type(t) is int and abs(t) < 2**62 for t in value)
    if not right or value[1] <= value[0]:
        raise DatasetError(
            f"{_where(path, number, label)}: event_window is {str(value)[:80]}, expected [t0, t1] in whole microseconds with t0 < t1."
        )
    return value[0], value[1]


def _query(entry: dict[str, Any], path: Path, number: int, label: str, name: str) -> str:
    """The first human turn, without the `<event>` placeholder."""
    turns = entry.get("conversations")
    if isinstance(turns, list):
        for turn in turns:
            if isinstance(turn, dict) and turn.get("from") == "human":
                value = turn.get("value")
                if isinstance(value, str):
                    query = value[8:] if value.startswith("<event>\n") else value
                    if "<event>" in query:
                        query = _EVENT_TAG.sub("", query)
                    query = query.strip()
                    if query:
                        return query
                break
    raise DatasetError(
        f"{_where(path, number, label)}: no question: expected conversations[] with a turn from 'human' and a text. "
        f"Write one, or ask one question of all clips by datasets.{name}.query."
    )


def _query_digest(query: str, path: Path, number: int, label: str) -> str:
    try:
        return blake2b(query.encode(), digest_size=4).hexdigest()
    except UnicodeEncodeError:
        raise DatasetError(
            f"{_where(path, number, label)}: the question holds half of a surrogate pair, which is no character. Write it again as UTF-8."
        ) from None
