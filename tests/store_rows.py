"""Rows of shards, and small shards, for the tests of the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stagebench.sources.events import Events
from stagebench.store import ClipRow, ShardWriter

SPEC = {"version": 1, "count": 3}
CLIP_SPEC = {"version": 1, "representation": "clip"}


def pixels(seed: int, count: int = 3, height: int = 12, width: int = 17) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write(path: Path, frames: dict[str, np.ndarray | list[np.ndarray]], codec: str = "none") -> Path:
    with ShardWriter(path, "frames", SPEC, codec=codec) as writer:
        for clip, value in frames.items():
            writer.add(ClipRow.from_frames(clip, f"digest of {clip}", value, pts=range(len(value)), indices=range(len(value))))
    return path


def events(n: int, seed: int = 0, t0: int = 51_800_000_000, step: int = 20) -> Events:
    rng = np.random.default_rng(seed)
    t = t0 + np.cumsum(rng.integers(0, step, n))
    return Events(
        rng.integers(0, 640, n).astype(np.uint16), rng.integers(0, 480, n).astype(np.uint16), rng.integers(0, 2, n).astype(np.uint8), t
    )
