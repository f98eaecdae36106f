"""Small datasets of real files (H.264, npy), planned: for tests of extraction and loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from stagebench.config import Config, load_config
from stagebench.extract import extract_shard
from stagebench.plan import Plan, build_plan

Study = Callable[..., tuple[Plan, Path]]


def write_mp4(path: Path, seed: int, frames: int = 12, size: tuple[int, int] = (48, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(size[0] // 6, 0).repeat(size[1] // 8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.height, stream.width, stream.pix_fmt = size[0], size[1], "yuv420p"
        for i in range(frames):
            image = np.ascontiguousarray(np.roll(base, i * 3, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))


def write_events(path: Path, seed: int, n: int = 500, size: tuple[int, int] = (48, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    events = {
        "p": rng.integers(0, 2, n).astype(np.uint8),
        "t": 51_800_000_000 + np.cumsum(rng.integers(0, 90, n)),
        "x": rng.integers(0, size[1], n).astype(np.uint16),
        "y": rng.integers(0, size[0], n).astype(np.uint16),
    }
    np.save(path, np.array(events, dtype=object), allow_pickle=True)


def write_dataset(root: Path, clips: int) -> None:
    entries = []
    for i in range(clips):
        name = f"seq_{i % 2}/{i:06d}"
        if not (root / f"mp4/{name}.mp4").exists():  # an encoder with threads need not give the same bytes twice
            write_mp4(root / f"mp4/{name}.mp4", i)
            write_events(root / f"event_npy/{name}.npy", i)
        entries.append(
            {
                "id": str(i),
                "event_data": f"{name}.npy",
                "mp4_data": f"{name}.mp4",
                "conversations": [{"from": "human", "value": "<event>\nWhat is it?"}],
            }
        )
    (root / "index.json").write_text(json.dumps(entries))


def extract(plan: Plan, cache: Path, **how: Any) -> None:
    """The plan's shards that are not there yet, as the workflow makes them."""
    for shard in plan.shards:
        path = shard.path(cache)
        if not path.exists():
            extract_shard(plan, shard, path, cache=cache, **how)


def extracted(config: Config, cache: Path) -> Plan:
    """The plan of that study, its shards extracted."""
    plan = build_plan(config, cache)
    extract(plan, cache)
    return plan


def planner(folder: Path) -> Study:
    """A function that writes that many clips (None: leaves them), plans, and gives the plan and the cache's folder."""
    root, cache = folder / "data", folder / "cache"

    def plan(clips: int | None = None, **sections: Any) -> tuple[Plan, Path]:
        if clips is not None:
            write_dataset(root, clips)
        config = {
            "study": "test",
            "datasets": {"d": {"root": str(root), "index": "index.json", "sensor": [48, 64]}},
            "models": {
                "e": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"},
                "v": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
            },
            **sections,
        }
        return build_plan(load_config(config), cache), cache

    return plan
