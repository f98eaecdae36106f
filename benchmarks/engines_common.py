"""Shared by the parts of benchmarks/engines.py: results, failures, device timing."""

from __future__ import annotations

import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch

RESULTS: dict[str, Any] = {"failures": {}}
TABLE: list[str] = []
BEGAN = time.perf_counter()
BUDGET = [420.0]
SHAPES = {"qkv": (12288, 4096), "out": (4096, 4096), "gate_up": (11008, 4096), "down": (4096, 11008), "head": (32064, 4096)}
CONTEXTS = {"llava": 598, "eventgpt": 642, "video_llava": 2078}
NEW = 45


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.0f}s] {text}", flush=True)


def row(text: str) -> None:
    TABLE.append(text)
    say(text)


def attempt(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """The result, or None with the reason printed and kept."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        RESULTS["failures"][name] = {"reason": reason, "trace": traceback.format_exc()[-3000:]}
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        say(f"FAILED {name}: {reason} at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames)))
        return None


def out_of_time() -> bool:
    return time.perf_counter() - BEGAN > BUDGET[0]


def event_ms(function: Any, repeats: int = 20, warm: int = 3) -> float:
    """Median ms of `function` between events."""
    for _ in range(warm):
        function()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def graph_ms(function: Any, repeats: int = 12) -> float:
    """Median ms of a captured replay of `function`."""
    from stagebench.engines._graphs import capture

    return event_ms(capture(function, torch.device("cuda", torch.cuda.current_device())), repeats)
