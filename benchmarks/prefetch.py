"""timing.prefetch on against off: what a sample costs in a stream of samples, live from MP4 and from memory.

    .venv/bin/python benchmarks/prefetch.py                                      # tiny models, CPU: where the worker shares the cores
    PYTHONPATH=src python3 benchmarks/prefetch.py --preset 7b --device cuda      # the published shape on a GPU

Random weights, Video-LLaVA's shape, one clip of 640x480 under the names of all samples. Off and on alternate; medians over samples.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common import machine, table
from stagebench import engines
from stagebench.config import RepeatsConfig
from stagebench.models import registry
from stagebench.models.base import ModelSpec
from stagebench.session import Settings, Subject, Task, time_samples
from stagebench.sources.video import read_frames
from video import make_clip


class Live:
    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, clip: str) -> Sequence[np.ndarray]:
        return list(read_frames(self.path, 8).pixels)


class Memory:
    def __init__(self, path: Path) -> None:
        self.frames = list(read_frames(path, 8).pixels)

    def load(self, clip: str) -> Sequence[np.ndarray]:
        return self.frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="generate")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    samples, rounds = (4, 2) if arguments.quick else (arguments.samples, arguments.rounds)
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    print(machine("torch", "transformers", "av"), f"; {device}, preset {arguments.preset}, engine {arguments.engine}")
    adapter = registry.create("hf")
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    adapter.load(ModelSpec("dummy:0", "video_llava", arguments.preset, dtype=dtype), arguments.device)
    tasks = [Task(f"s/{n}#q", f"s/{n}", "s", str(n), "What is there?") for n in range(samples)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clip = make_clip(Path(folder) / "clip.mp4", 640, 480, 1)
        for source, loader in {"mp4": Live(clip), "memory": Memory(clip)}.items():
            found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
            for number in range(rounds):
                for on in (False, True) if number % 2 else (True, False):
                    settings = Settings(
                        lengths=(str(arguments.tokens),), repeats=RepeatsConfig(min=1, max=1), warmup=1, prefetch=on, seed=number
                    )
                    subject = Subject(adapter, engines.create(arguments.engine), loader, arguments.device)
                    found[on] += time_samples(subject, tasks, settings).rows
            middle = {
                on: {key: statistics.median(r[key] for r in rows_) for key in ("load_ms", "preprocess_ms", "decode_ms", "total_ms")}
                for on, rows_ in found.items()
            }
            for on in (False, True):
                gain = middle[False]["total_ms"] / middle[on]["total_ms"]
                cells = [f"{middle[on][key]:.2f}" for key in ("load_ms", "preprocess_ms", "decode_ms", "total_ms")]
                rows.append((source, "on" if on else "off", *cells, f"{1e3 / middle[on]['total_ms']:.2f}", f"{gain:.3f}"))
    table("source | prefetch | load ms | preprocess ms | decode ms | total ms | samples/s | against off", rows)


if __name__ == "__main__":
    main()
