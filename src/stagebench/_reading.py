"""Reading one clip: what extraction stores and what a timed live load does, by the same code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stagebench.dataset import resolve
from stagebench.errors import ShortClipError, SourceError
from stagebench.plan import origin
from stagebench.store import ClipRow

if TYPE_CHECKING:
    from stagebench.dataset import Clip
    from stagebench.sources.events import Events

__all__ = ["ClipPixels", "read_clip", "read_row", "render_events"]


@dataclass(frozen=True)
class ClipPixels:
    """What a model is given of a clip."""

    frames: list[np.ndarray]
    """uint8 [H, W, 3] each."""
    pts: np.ndarray
    """int64 [T]: the stream's time base for video, an ordinal for folders and event frames."""
    indices: np.ndarray
    """int64 [T]: places among the clip's frames, in presentation order."""


def read_clip(root: Path, clip: Clip, kind: str, spec: Mapping[str, Any], source: str = "cache") -> ClipPixels:
    """Read and, for events, render a clip from its source files.

    kind: frames | events. spec: a reading spec of the plan. source: mp4, frames, npy or png read that entry of the clip; cache
    reads what extraction reads, and gives what a shard gives. `cache.resize` belongs to storing: other sources leave the size alone.
    Raises SourceError where the clip cannot be read, DatasetError for a path that leaves the root.
    """
    if kind == "frames":
        pixels, pts, indices = _video(root, clip, spec, source)
        frames = list(pixels)
        return ClipPixels(_resized(frames, spec) if source == "cache" else frames, pts, indices)
    drawn = _entry(clip, kind, source) == "images"
    frames = _images(root, clip, spec) if drawn else render_events(_events(root, clip), spec)
    order = np.arange(len(frames), dtype=np.int64)
    return ClipPixels(frames, order, order)


def read_row(root: Path, clip: Clip, kind: str, spec: Mapping[str, Any], digest: str) -> ClipRow:
    """Read a clip as a shard keeps it. digest: content digest of the files that are read. Raises as `read_clip`."""
    if kind == "frames":
        pixels, pts, indices = _video(root, clip, spec, "cache")
        stored: Any = pixels if spec.get("resize") is None else _resized(list(pixels), spec)
        return ClipRow.from_frames(clip.key, digest, stored, pts=pts, indices=indices)
    if _entry(clip, kind, "cache") == "images":
        return _image_row(clip, digest, _images(root, clip, spec), spec)
    events = _events(root, clip)
    if spec["representation"] == "clip":
        return ClipRow.from_events(clip.key, digest, events)
    from stagebench.render import event_codes, voxel_grid

    about: dict[str, Any] = {
        "t0": int(events.t[0]),
        "t1": int(events.t[-1]),
        "n_events": len(events),
        "t_dtype": events.t_dtype,
        "p_coding": events.p_coding,
    }
    order = range(int(spec["parts"]))
    if spec["representation"] == "voxel":
        return ClipRow.from_grid(
            clip.key, digest, voxel_grid(events, spec["parts"], _sensor(events, spec)), pts=order, indices=order, **about
        )
    return ClipRow.from_codes(clip.key, digest, event_codes(events, **_drawing(spec)), pts=order, indices=order, **about)


def render_events(events: Events, spec: Mapping[str, Any]) -> list[np.ndarray]:
    """The frames that a spec asks for, uint8 [H, W, 3] each. Raises SourceError for events that cannot be drawn so."""
    from stagebench.render import event_frames, voxel_grid, voxel_to_frames

    if spec["representation"] == "voxel":
        return voxel_to_frames(voxel_grid(events, spec["parts"], _sensor(events, spec)))
    return event_frames(events, **_drawing(spec))


def _drawing(spec: Mapping[str, Any]) -> dict[str, Any]:
    sensor = spec.get("sensor")
    return {**{name: spec[name] for name in ("parts", "split", "policy", "size")}, "sensor": tuple(sensor) if sensor else None}


def _sensor(events: Events, spec: Mapping[str, Any]) -> tuple[int, int]:
    """The grid's (height, width): the sensor's, or the clip's own extent where the config says so."""
    sensor = spec.get("sensor")
    if sensor and spec["size"] == "sensor":
        return int(sensor[0]), int(sensor[1])
    return int(events.y.max()) + 1, int(events.x.max()) + 1


def _entry(clip: Clip, kind: str, source: str) -> str:
    entry = origin(clip, kind, source)
    if entry is None:
        wanted = {"frames": "mp4_data or video_data", "events": "event_data or event_image"}[kind] if source == "cache" else source
        raise SourceError(
            f"{clip.key}: nothing to read {kind} from: {wanted} is missing, the index gives {', '.join(sorted(clip.files))}. "
            "Add it to the clip's entry, or leave the clip out."
        )
    return entry


def _video(root: Path, clip: Clip, spec: Mapping[str, Any], source: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 [T, H, W, 3], pts and indices int64 [T]."""
    entry = _entry(clip, "frames", source)
    path = resolve(root, clip.files[entry])
    if entry == "frames":
        from stagebench.sources.frames import read_folder

        frames = read_folder(path, spec["count"], spec["sampling"], short_clips=spec["short_clips"])
    else:
        from stagebench.sources.video import read_frames

        frames = read_frames(path, spec["count"], spec["sampling"], short_clips=spec["short_clips"], rotation=spec["rotation"])
    return frames.pixels, frames.pts, frames.indices


def _events(root: Path, clip: Clip) -> Events:
    from stagebench.sources.events import read_events

    return read_events(resolve(root, clip.files["events"]), window=clip.window)


def _images(root: Path, clip: Clip, spec: Mapping[str, Any]) -> list[np.ndarray]:
    """A clip's PNG event images, as many as the parts that are asked for: never the first few of another setting's."""
    from stagebench.sources.frames import read_folder, read_images

    named, parts = clip.files["images"], spec.get("parts")
    if spec["representation"] != "frames":
        raise SourceError(
            f"{clip.key}: only event images, no events to make {spec['representation']} of. Set events.representation: frames."
        )
    if isinstance(named, str):
        folder = read_folder(resolve(root, named), parts or 1)
        found, images = folder.available, list(folder.pixels)
    else:
        found = len(named)
        images = read_images([resolve(root, name) for name in named]) if found == parts else []
    if found != parts:
        raise ShortClipError(f"{clip.key}: {found} event images, {parts} parts asked for. Set events.parts: {found}, or give the events.")
    return images


def _image_row(clip: Clip, digest: str, images: list[np.ndarray], spec: Mapping[str, Any]) -> ClipRow:
    """As colour codes where the images have our three colours only, else as they are."""
    order = range(len(images))
    codes = [_codes(image) for image in images]
    known = [c for c in codes if c is not None]
    if len(known) == len(images):
        return ClipRow.from_codes(clip.key, digest, known, pts=order, indices=order)
    return ClipRow.from_frames(clip.key, digest, images, pts=order, indices=order)


def _codes(image: np.ndarray) -> np.ndarray | None:
    """uint8 [H, W] codes of an image in white, blue (0, 0, 255) and red (255, 0, 0); None for any other colour."""
    from stagebench.render import codes_to_rgb

    red, blue = image[..., 0], image[..., 2]
    codes = np.where(red == 0, np.uint8(1), np.where(blue == 0, np.uint8(2), np.uint8(0))).astype(np.uint8)
    return codes if np.array_equal(codes_to_rgb(codes), image) else None


def _resized(frames: Sequence[np.ndarray], spec: Mapping[str, Any]) -> list[np.ndarray]:
    """Frames with `cache.resize` as their shortest edge: Pillow's bicubic, the longer edge rounded to whole pixels."""
    edge = spec.get("resize")
    if edge is None:
        return list(frames)
    from PIL import Image

    small = []
    for frame in frames:
        height, width = frame.shape[:2]
        scale = edge / min(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small.append(np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)))
    return small
