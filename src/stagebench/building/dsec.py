"""DSEC recordings (https://dsec.ifi.uzh.ch/data-format/) -> clips of events and MP4.

A sequence is a folder with `events/left/events.h5` and `images/left/rectified/*.png`, times of the images in `images/timestamps.txt` (one
a line, microseconds, the events' clock) or, without that, as the middle of the exposures in `images/left/exposure_timestamps.txt`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stagebench.building._clips import (
    Encoder,
    cannot_write,
    claim,
    clip_files,
    duration_label,
    save_events,
    windows,
    worker_pool,
    write_index,
)
from stagebench.errors import DatasetError, SourceError
from stagebench.sources.events import read_events, to_source_dict
from stagebench.sources.frames import natural_key, read_images

__all__ = ["SENSOR", "from_dsec"]

log = logging.getLogger(__name__)

SENSOR = (480, 640)
_TIMES = ("images/timestamps.txt", "images/left/timestamps.txt", "image_timestamps.txt")
_EXPOSURES = ("images/left/exposure_timestamps.txt", "images/left/exposure_timestamps_left.txt")


@dataclass(frozen=True)
class _Sequence:
    """A recording: where its files are, and when each image was taken (int64 microseconds, ascending)."""

    name: str
    split: str
    events: Path
    images: tuple[Path, ...]
    times: np.ndarray


@dataclass(frozen=True)
class _Job:
    """One clip to make."""

    root: Path
    name: str
    events: Path
    rectify: Path | None
    window: tuple[int, int]
    images: tuple[Path, ...]
    fps: float


def from_dsec(
    source: Path,
    target: Path,
    durations: Sequence[int],
    *,
    overlap: float = 0.5,
    sequences: Sequence[str] | None = None,
    fps: float | None = None,
    rectify: bool = False,
    query: str | None = None,
    max_clips: int | None = None,
    workers: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Path, int]:
    """Write `<target>/dsec_<duration>` for each of `durations` (microseconds); dataset -> clips in its index.

    Clips are [t0, t0 + duration) within the span of both events and images, `overlap` of one shared with the next, whole ones only. Each
    holds the images whose time lies in it, or, with `fps`, for each instant the image nearest to it. max_clips: at most so many a sequence.
    Clips that are there are not made again. Clips that fail are named when all others are done.

    Raises DatasetError for a folder without sequences, sequences that are not there, another dataset in the target, a full disk, a worker
    that was killed; and, when all others are done, for recordings that lack something and clips that failed, each by name.
    """
    found, unusable = _find(Path(source), sequences)
    failed: list[str] = []
    counts: dict[Path, int] = {}
    for duration in durations:
        root = Path(target) / f"dsec_{duration_label(duration)}"
        settings = {"from": "dsec", "duration_us": duration, "overlap": overlap, "fps": fps, "rectify": rectify, "query": query}
        claim(root, settings | {"format": 1})
        jobs = []
        for sequence in found:
            try:
                jobs += _plan(sequence, root, duration, overlap, fps, rectify, max_clips)
            except DatasetError as error:
                unusable[sequence.name] = str(error)
        if not jobs and unusable:
            raise DatasetError(_named(unusable))
        if not jobs:
            raise DatasetError(f"{source}: no sequence is as long as {duration_label(duration)}. Ask for a shorter duration.")
        tell = partial(progress, root.name) if progress else None
        failed += _work(jobs, workers, tell)
        counts[root] = write_index(root, [job.name for job in jobs], {s.name: s.split for s in found}, query)
    problems = [_named(unusable)] if unusable else []
    if failed:
        problems.append(
            f"{len(failed)} clips could not be made and are not in the index; all others are. The first: {failed[0]} "
            "Copy the recording again or leave it out with --sequences, then call the same again: only these are tried."
        )
    if problems:
        raise DatasetError("\n".join(problems))
    return counts


def _named(unusable: Mapping[str, str]) -> str:
    lines = "".join(f"\n  {name}: {problem}" for name, problem in sorted(unusable.items()))
    return f"{len(unusable)} of the recordings cannot be used and none of their clips is in the index:{lines}"


def _find(source: Path, wanted: Sequence[str] | None) -> tuple[list[_Sequence], dict[str, str]]:
    """The recordings, and those that lack something with what they lack."""
    folders = {p.parents[2].name: p for pattern in ("", "*/", "*/*/") for p in sorted(source.glob(f"{pattern}events/left/events.h5"))}
    if not folders:
        raise DatasetError(
            f"{source}: no <sequence>/events/left/events.h5 below it, expected DSEC as published. Unpack its events and images there."
        )
    missing = sorted(set(wanted or ()) - set(folders))
    if missing:
        raise DatasetError(f"{source}: no sequence {missing[0]!r}; there are {', '.join(sorted(folders))}.")
    found, unusable = [], {}
    for name, path in sorted(folders.items()):
        if not wanted or name in wanted:
            try:
                found.append(_sequence(name, path))
            except DatasetError as error:
                unusable[name] = str(error)
    return found, unusable


def _sequence(name: str, events: Path) -> _Sequence:
    folder = events.parents[2]
    images = sorted((folder / "images/left/rectified").glob("*.png"), key=lambda p: natural_key(p.name))
    times = _times(folder)
    if len(images) != len(times) or not len(times):
        raise DatasetError(
            f"{folder}: {len(images)} images in images/left/rectified and {len(times)} times, expected as many of each. "
            "Unpack the sequence's images and timestamps again."
        )
    if (np.diff(times) <= 0).any():
        raise DatasetError(f"{folder}: image times do not ascend. Unpack the sequence's timestamps again.")
    split = folder.parent.name if folder.parent.name in ("train", "test") else ""
    return _Sequence(name, split, events, tuple(images), times)


def _times(folder: Path) -> np.ndarray:
    """Times of the images, int64 [n]; the middle of an exposure where only exposures are given."""
    for names, columns in ((_TIMES, 1), (_EXPOSURES, 2)):
        for path in (folder / n for n in names):
            if not path.is_file():
                continue
            try:
                lines = [line.replace(",", " ").split() for line in path.read_text(encoding="ascii").splitlines()]
                rows = [[int(v) for v in line[:columns]] for line in lines if line and not line[0].startswith("#")]
                return np.array([sum(row) // columns for row in rows], np.int64)
            except (OSError, ValueError) as error:
                raise DatasetError(f"{path}: not a list of microseconds ({error}). Unpack the sequence's timestamps again.") from None
    raise DatasetError(f"{folder}: no {_TIMES[0]} and no {_EXPOSURES[0]}. Download the sequence's image timestamps as well.")


def _span(path: Path) -> tuple[int, int]:
    """First and last event's absolute time."""
    import importlib

    try:
        h5py: Any = importlib.import_module("h5py")
        importlib.import_module("hdf5plugin")
    except ImportError:
        raise SourceError(f"{path}: needs h5py and hdf5plugin. pip install 'stagebench[events]'") from None
    try:
        with h5py.File(path, "r") as file:
            times, offset = file["events/t"], int(file["t_offset"][()]) if "t_offset" in file else 0
            return int(times[0]) + offset, int(times[-1]) + offset
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DatasetError(f"{path}: not a DSEC recording ({str(error)[:120]}). Download it again.") from None


def _plan(s: _Sequence, root: Path, duration: int, overlap: float, fps: float | None, rectify: bool, max_clips: int | None) -> list[_Job]:
    first, last = _span(s.events)
    period = float(np.median(np.diff(s.times))) if len(s.times) > 1 else 50_000.0
    rate = fps or 1e6 / period
    begin, end = max(first, int(s.times[0])), min(last + 1, int(s.times[-1]) + round(period))
    table = s.events.with_name("rectify_map.h5") if rectify else None
    if table is not None and not table.is_file():
        raise DatasetError(f"{table}: missing, and --rectify needs it. Download it beside events.h5, or leave --rectify out.")
    jobs = []
    for number, (t0, t1) in enumerate(windows(begin, end, duration, overlap)):
        if max_clips is not None and number >= max_clips:
            break
        jobs.append(_Job(root, f"{s.name}/{number:06d}", s.events, table, (t0, t1), _images(s, t0, t1, fps), rate))
    return jobs


def _images(s: _Sequence, t0: int, t1: int, fps: float | None) -> tuple[Path, ...]:
    if fps is None:
        low, high = np.searchsorted(s.times, (t0, t1))
        return s.images[int(low) : int(high)]
    instants = t0 + np.arange(max(1, round((t1 - t0) * fps / 1e6))) * 1e6 / fps
    after = np.searchsorted(s.times, instants)
    left, right = (np.clip(i, 0, len(s.times) - 1) for i in (after - 1, after))
    nearest = np.where(instants - s.times[left] <= s.times[right] - instants, left, right)
    return tuple(s.images[int(i)] for i in nearest)


def _work(jobs: Sequence[_Job], workers: int, progress: Callable[[int, int], None] | None) -> list[str]:
    """Make all clips that are not there; what went wrong, a line each."""
    todo = [job for job in jobs if not all(p.exists() for p in clip_files(job.root, job.name))]
    failed: list[str] = []
    if workers > 1 and len(todo) > 1:
        with worker_pool(workers) as pool:
            results = pool.map(_make, todo)
            _collect(results, len(jobs), len(jobs) - len(todo), failed, progress)
    else:
        _collect(map(_make, todo), len(jobs), len(jobs) - len(todo), failed, progress)
    return failed


def _collect(results: Any, total: int, done: int, failed: list[str], progress: Callable[[int, int], None] | None) -> None:
    if progress:
        progress(done, total)
    for number, problem in enumerate(results, done + 1):
        if problem:
            log.warning("%s", problem)
            failed.append(problem)
        if progress:
            progress(number, total)


def _make(job: _Job) -> str | None:
    """One clip's two files; why it could not be made, or None."""
    events_path, video_path = clip_files(job.root, job.name)
    try:
        if not job.images:
            return f"{job.name}: no image lies in its time."
        columns = to_source_dict(read_events(job.events, window=job.window))
        if job.rectify is not None:
            columns = _rectified(columns, job.rectify)
        with Encoder(video_path, job.fps) as encoder:
            for path in job.images:
                encoder.add(read_images([path])[0])
        save_events(events_path, columns)
    except SourceError as error:
        return f"{job.name}: {error}"
    except OSError as error:
        raise cannot_write(job.root, error) from error
    return None


def _rectified(columns: dict[str, np.ndarray], table: Path) -> dict[str, np.ndarray]:
    """Events at their nearest rectified pixel; those that leave the sensor are dropped. `rectify_map` is float [480, 640, (x, y)]."""
    import h5py

    try:
        with h5py.File(table, "r") as file:
            place: np.ndarray = file["rectify_map"][:]
    except (OSError, KeyError) as error:
        raise SourceError(f"{table}: no readable rectify_map ({error}). Download it again.") from None
    height, width = SENSOR
    if place.shape != (height, width, 2):
        raise SourceError(f"{table}: rectify_map is {place.shape}, expected ({height}, {width}, 2). Download it again.")
    moved = np.rint(place[columns["y"], columns["x"]])
    inside = (moved[:, 0] >= 0) & (moved[:, 0] < width) & (moved[:, 1] >= 0) & (moved[:, 1] < height)
    kept = {name: values[inside] for name, values in columns.items()}
    return kept | {"x": moved[inside, 0].astype(np.uint16), "y": moved[inside, 1].astype(np.uint16)}
