"""MP4 files -> clips with simulated events: a contrast threshold on log intensity, linear between frames (the demo's camera)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from stagebench.building._clips import Encoder, cannot_write, claim, clip_files, save_events, windows, worker_pool, write_index, write_text
from stagebench.demo.scene import EventCamera
from stagebench.errors import ConfigError, DatasetError, SourceError

__all__ = ["from_video"]

log = logging.getLogger(__name__)

_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm")
_STEP_US = 50_000
"""Longest step of the simulator, whose times are uint16 microseconds: a longer gap between frames is blended across."""


@dataclass(frozen=True)
class _Job:
    root: Path
    path: Path
    name: str
    duration: int
    overlap: float
    height: int
    threshold: float
    seed: int


@dataclass
class _Open:
    """A clip that is being written."""

    name: str
    t0: int
    t1: int
    encoder: Encoder
    events: list[dict[str, np.ndarray]] = field(default_factory=list)


def from_video(
    source: Path,
    target: Path,
    duration: int,
    *,
    overlap: float = 0.0,
    height: int = 480,
    threshold: float = 0.28,
    seed: int = 0,
    query: str | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Cut each video below `source` into whole clips of `duration` microseconds, with events as a camera of `height` rows would see them.

    How many clips the index holds. A video is a sequence, `<its path without suffix>`; videos that are done are not done again. Frames
    taller than `height` are scaled down to it. threshold: change of log intensity that makes an event.

    Raises DatasetError for no videos, another dataset in the target, and videos that fail (when all others are done); ConfigError.
    """
    source, target = Path(source), Path(target)
    if not 0.05 <= threshold <= 2 or height < 32:
        raise ConfigError(f"threshold {threshold}, height {height}: expected a threshold from 0.05 to 2 and 32 rows or more.")
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DatasetError(f"{source}: no video below it ({', '.join(_SUFFIXES)}). Name the folder that holds them.")
    settings = {"from": "video", "duration_us": duration, "overlap": overlap, "height": height, "threshold": threshold, "seed": seed}
    claim(target, settings | {"query": query, "format": 1})
    names = [p.relative_to(source).with_suffix("").as_posix() for p in files]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise DatasetError(f"{source}: two videos are called {twice}. Rename one.")
    jobs = [_Job(target, p, n, duration, overlap, height, threshold, seed) for p, n in zip(files, names, strict=True)]
    with ExitStack() as stack:
        run: Any = map
        if workers > 1 and len(jobs) > 1:
            run = stack.enter_context(worker_pool(workers)).map
        clips: list[str] = []
        failed: list[str] = []
        for number, (made, problem) in enumerate(run(_convert, jobs), 1):
            clips += made
            failed += [problem] if problem else []
            if progress:
                progress(number, len(jobs))
    count = write_index(target, clips, {}, query)
    if failed:
        named = "".join(f"\n  {problem}" for problem in failed)
        raise DatasetError(f"{len(failed)} of {len(jobs)} videos could not be read; all others are in the index:{named}")
    if not count:
        raise DatasetError(f"{source}: no video is as long as {duration / 1e6:g} s. Ask for a shorter --duration.")
    return count


def _convert(job: _Job) -> tuple[list[str], str | None]:
    """(clips, what went wrong). A list of the clips beside them says that a video is done."""
    done = job.root / "event_npy" / job.name / "clips.json"
    try:
        made: list[str] = json.loads(done.read_text(encoding="utf-8"))
        if all(p.exists() for name in made for p in clip_files(job.root, name)):
            return made, None
    except (OSError, ValueError, TypeError):
        pass
    try:
        made = _cut(job)
    except SourceError as error:
        return [], str(error)
    except OSError as error:
        raise cannot_write(job.root, error) from error
    write_text(done, json.dumps(made) + "\n")
    return made, None


def _cut(job: _Job) -> list[str]:
    """One pass over the video; clips open and close as their time comes, so memory holds their events and one frame."""
    frames = _frames(job.path, job.height)
    t_first, rate, first = next(frames)
    camera: EventCamera | None = None
    before = first
    rng = np.random.default_rng((job.seed, crc32(job.name.encode())))
    ahead = enumerate(windows(0, 10**12, job.duration, job.overlap))
    waiting = next(ahead)
    opened: list[_Open] = []
    made: list[str] = []
    with ExitStack() as stack:
        now = 0
        for t, _, pixels in chain([(t_first, rate, first)], frames):
            if camera is None:
                camera = EventCamera(_luminance(pixels), rng, threshold=job.threshold)
            for step in _events(camera, before, pixels, now, t):
                _share(opened, step)
            before, now = pixels, t
            opened, closed = [c for c in opened if t < c.t1], [c for c in opened if t >= c.t1]
            made += [c.name for c in closed if _close(job.root, c)]
            while waiting[1][0] <= t:
                number, (t0, t1) = waiting
                name = f"{job.name}/{number:06d}"
                encoder = Encoder(clip_files(job.root, name)[1], rate)
                stack.callback(encoder.close, keep=False)  # what is not finished by then goes
                opened.append(_Open(name, t0, t1, encoder))
                waiting = next(ahead)
            for clip in opened:
                clip.encoder.add(pixels)
        # the last frame is shown for one period: a clip that ends by then is whole
        end = now + round(1e6 / rate)
        made += [c.name for c in opened if c.t1 <= end + 1000 and _close(job.root, c)]
    return made


def _share(opened: list[_Open], step: dict[str, np.ndarray]) -> None:
    for clip in opened:
        low, high = np.searchsorted(step["t"], (clip.t0, clip.t1))
        clip.events.append({key: values[low:high] for key, values in step.items()})


def _close(root: Path, clip: _Open) -> bool:
    """Both files to their names; False for a clip in which nothing moved."""
    columns = {key: np.concatenate([e[key] for e in clip.events] or [np.empty(0, np.int64)]) for key in ("p", "t", "x", "y")}
    if not len(columns["t"]):
        log.warning("%s: no event, nothing moves in it; left out", clip.name)
        return False
    save_events(clip_files(root, clip.name)[0], columns)
    clip.encoder.close(keep=True)
    return True


def _events(camera: EventCamera, before: np.ndarray, now: np.ndarray, start: int, end: int) -> Iterator[dict[str, np.ndarray]]:
    """Events between two frames, t int64 microseconds from the video's begin."""
    parts = -(-(end - start) // _STEP_US)
    for part in range(1, parts + 1):
        t0, t1 = (start + (end - start) * k // parts for k in (part - 1, part))
        picture = _luminance(now if part == parts else before + (now.astype(np.float32) - before) * (part / parts))
        step = camera.step(picture, t1 - t0)
        yield step | {"t": step["t"].astype(np.int64) + t0}


def _luminance(pixels: np.ndarray) -> np.ndarray:
    """uint16 [H, W] below 4096, BT.601 weights."""
    grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.clip(grey * (4095 / 255), 1, 4095).astype(np.uint16)


def _frames(path: Path, height: int) -> Iterator[tuple[int, Fraction, np.ndarray]]:
    """(microseconds since the first frame, frame rate, uint8 [H, W, 3]) in order. Raises SourceError."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise SourceError(f"{path}: no video stream. Leave it out of the folder.")
            stream.thread_type, stream.codec_context.thread_count = "AUTO", 1
            rate, zero, last = Fraction(stream.average_rate or 25), None, -1
            for frame in container.decode(stream):
                if frame.pts is None or frame.is_corrupt:
                    raise SourceError(f"{path}: a damaged frame after {max(last, 0) / 1e6:.2f} s. Repair or remove the file.")
                zero = frame.pts if zero is None else zero
                t = round((frame.pts - zero) * stream.time_base * 1_000_000)
                if t <= last:
                    continue
                scale = min(1.0, height / frame.height)
                size = [max(2, round(side * scale) // 2 * 2) for side in (frame.width, frame.height)]
                last = t
                yield t, rate, frame.reformat(size[0], size[1], format="rgb24").to_ndarray()
            if zero is None:
                raise SourceError(f"{path}: no frame in it. Leave it out of the folder.")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be decoded ({error}). Repair or remove the file.") from None
