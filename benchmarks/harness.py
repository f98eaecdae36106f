"""What measuring costs, and what a device shows of itself: the null workload, the clock's parts, the energy counter, other processes.

    PYTHONPATH=src python3 benchmarks/harness.py                                   # with a GPU: LLaVA-1.5 at full size, about 30 s
    PYTHONPATH=src python3 benchmarks/harness.py --device cpu --preset tiny        # anywhere: what does not need a GPU

Results: a table last, everything in harness.json under $OUT or --output.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stagebench import engines, machine
from stagebench.config import RepeatsConfig
from stagebench.models import registry
from stagebench.models.base import Decoding, ModelSpec
from stagebench.session import Settings, Subject, Task, time_samples, validity
from stagebench.session.busy import device_busy
from stagebench.session.divergence import check_divergences
from stagebench.session.null import null_subject
from stagebench.session.run import run_once
from stagebench.stages import STAGES, StageClock

RUNS = 200


class FirstClock(StageClock):
    """As the clock was before: a new event for each border, the device named by text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._spare = []
        if self._cuda is not None:
            self._index = str(self.device)  # type: ignore[assignment]

    def _event(self) -> Any:
        if not self._events:
            return None
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def _give_back(self) -> None:
        """Events die with their clock."""


def us(function: Callable[[], Any], runs: int = 300) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter_ns()
        function()
        times.append((time.perf_counter_ns() - begin) * 1e-3)
    return statistics.median(times)


def parts(device: str) -> dict[str, float]:
    """What the clock calls at a border, by itself, in us; nothing else on the device."""
    cuda: Any = torch.cuda
    pool = cuda.Event(enable_timing=True)
    pool.record()
    monitor = machine.Monitor(device)
    found = {
        "event: made and recorded": us(lambda: cuda.Event(enable_timing=True).record()),
        "event: recorded again": us(pool.record),
        "synchronize, device as text": us(lambda: cuda.synchronize(device)),
        "synchronize, device as number": us(lambda: cuda.synchronize(0)),
        "reset of the peak, text": us(lambda: cuda.reset_peak_memory_stats(device)),
        "reset of the peak, number": us(lambda: cuda.reset_peak_memory_stats(0)),
        "memory statistics, text": us(lambda: cuda.memory.memory_stats_as_nested_dict(device)),
        "memory statistics, number": us(lambda: cuda.memory.memory_stats_as_nested_dict(0)),
        "energy counter": us(monitor.energy_mj, 50),
        "all sensors": us(monitor.read, 50),
    }
    cuda.synchronize()
    return found


def null(device: str) -> dict[str, dict[str, float]]:
    """us a stage of the null workload, and its total, with either clock; interleaved."""
    subjects = {"now": null_subject(device), "before": replace(null_subject(device), clock=FirstClock)}
    task = Task("null#0", "null", "", "null", "")
    seen: dict[str, list[Any]] = {name: [] for name in subjects}
    for _ in range(RUNS):
        for name, subject in subjects.items():
            run = run_once(subject, [task], Decoding(1, 1))
            seen[name].append(run.times)
    result = {}
    for name, times in seen.items():
        result[name] = {stage: statistics.median(t.host_ms[stage] for t in times[20:]) * 1e3 for stage in STAGES}
        result[name]["total"] = statistics.median(t.total_ms for t in times[20:]) * 1e3
    return result


class Frames:
    def load(self, clip: str) -> list[np.ndarray]:
        rng = np.random.default_rng(int(clip.rpartition("/")[2]))
        return [rng.integers(0, 255, (240, 320, 3), dtype=np.uint8) for _ in range(8)]


def session(device: str, preset: str, tokens: int, repeats: int, long_tokens: int) -> dict[str, Any]:
    """LLaVA through the inner loop: energies, both clocks, plain and instrumented, host-bound share, what profiling leaves behind."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    adapter = registry.create("hf")
    with torch.inference_mode():
        adapter.load(ModelSpec("dummy:0", "llava", preset, dtype, frames_as="grid"), device)
    monitor = machine.Monitor(device)
    before = machine.anchor(device)
    counter = machine.energy_counter(monitor.energy_mj)
    subject = Subject(adapter, engines.create("generate"), Frames(), device, meter=monitor.energy_mj)
    tasks = [Task(f"s/{n}#q", f"s/{n}", "s", f"i{n}", "What is there?", f"d{n}") for n in range(3)]
    settings = Settings(lengths=(str(tokens),), repeats=RepeatsConfig(min=repeats, max=repeats), warmup=2, plain_share=1.0)
    outcome = time_samples(subject, tasks, settings, monitor=monitor, counter=counter)
    rows = outcome.rows

    def middle(name: str) -> float | None:
        values = [row[name] for row in rows if row[name] is not None]
        return statistics.median(values) if values else None

    names = (
        "total_ms",
        "plain_total_ms",
        "total_gpu_ms",
        "residual_ms",
        "prefill_ms",
        "decode_ms",
        "energy_j",
        "decode_energy_j",
        "power_w",
    )
    found: dict[str, Any] = {name: middle(name) for name in names}
    found["statuses"] = sorted({row["status"] for row in rows})
    found["codes"] = sorted({code for row in rows for code in row["codes"]})
    found["energies"] = [{s: row[f"{s}_energy_j"] for s in STAGES if row[f"{s}_energy_j"] is not None} for row in rows]
    found["clocks_apart_ms"] = [row["total_ms"] - row["total_gpu_ms"] for row in rows if row["total_gpu_ms"] is not None]
    found["plain"] = [str(f) for f in (*validity.check_plain(rows), *validity.check_outputs(rows))]
    found["counter"] = None if counter is None else asdict(counter)
    found["anchors"] = [before, machine.anchor(device)]
    # a plain run that says something else at a place that is no tie
    other = [
        {**row, "plain_token_ids": [*row["token_ids"][:5], (row["token_ids"][5] + 7) % 1000 + 3, *row["token_ids"][6:]]} for row in rows[:1]
    ]
    began = time.perf_counter()
    found["divergence_planted"] = [str(f) for f in check_divergences(other, tasks, adapter, Frames(), temperature=0.0)]
    found["divergence_s"] = time.perf_counter() - began
    found["divergence_real"] = [str(f) for f in check_divergences(rows, tasks, adapter, Frames(), temperature=0.0)]
    found["profile"] = profiles(subject, tasks, replace(settings, warmup=1, plain_share=0.0))
    long = replace(settings, lengths=(str(long_tokens),), repeats=RepeatsConfig(min=1, max=1), warmup=1, plain_share=0.0)
    row = time_samples(subject, tasks[:1], long, monitor=monitor, counter=counter).rows[0]
    names = ("total_ms", "residual_ms", "prefill_ms", "decode_ms", "energy_j", "prefill_energy_j", "decode_energy_j", "power_w", "codes")
    found["long"] = {name: row[name] for name in names}
    return found


def profiles(subject: Subject, tasks: list[Task], settings: Settings) -> dict[str, Any]:
    """The host-bound share's profile, and how long a decode stage takes before it, after it, and after one that takes CUPTI down again."""

    def decode_ms() -> list[float]:
        return [round(row["decode_ms"], 1) for row in time_samples(subject, tasks, settings).rows]

    found: dict[str, Any] = {"before": decode_ms()}
    for name, teardown in (("left", "0"), ("taken down", "1")):
        os.environ["TEARDOWN_CUPTI"] = teardown
        began = time.perf_counter()
        busy = device_busy(subject, tasks[:1], settings.decoding(settings.lengths[0], ()))
        found[f"{name}: profile_s"] = time.perf_counter() - began
        found[f"{name}: busy"] = None if busy is None else asdict(busy)
        found[f"{name}: after"] = decode_ms()
    return found


_NEIGHBOUR = "import torch, time; x = torch.ones(1 << 20, device='cuda'); torch.cuda.synchronize(); print('on', flush=True); time.sleep(60)"


def neighbours(device: str) -> dict[str, Any]:
    """A second process on the device, and what NVML shows of it."""
    import pynvml

    wanted = (
        "CurrentClocksEventReasons",
        "CurrentClocksThrottleReasons",
        "TotalEnergyConsumption",
        "ComputeRunningProcesses",
        "ViolationStatus",
    )
    monitor = machine.Monitor(device)
    found: dict[str, Any] = {"names": {name: hasattr(pynvml, f"nvmlDeviceGet{name}") for name in wanted}}
    found |= {"unseen": monitor.unseen(), "own_pid": os.getpid(), "alone": sorted(monitor.pids()), "reading": asdict(monitor.read())}
    process = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is not None:
            process.stdout.readline()
        found |= {"second_pid": process.pid, "together": sorted(monitor.pids()), "neighbours": monitor.neighbours()}
    finally:
        process.kill()
        process.wait()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--tokens", type=int, default=45)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--long-tokens", type=int, default=320, help="of one sample whose decode stage is long enough for an energy of its own"
    )
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = arguments.device
    torch.set_num_threads(8 if device.startswith("cuda") else 1)
    result: dict[str, Any] = {"torch": torch.__version__, "device": device}
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        result["gpu"] = torch.cuda.get_device_name(device)
        machine.anchor(device)  # clocks up
        result["parts_us"] = parts(device)
    work: dict[str, Callable[[], Any]] = {"null_us": lambda: null(device)}
    work["session"] = lambda: session(device, arguments.preset, arguments.tokens, arguments.repeats, arguments.long_tokens)
    if device.startswith("cuda"):
        work["neighbours"] = lambda: neighbours(device)
    for name, do in work.items():
        began = time.perf_counter()
        try:
            result[name] = do()
        except Exception as error:  # one part that fails must not cost the others
            logging.exception("%s", name)
            result[name] = f"{type(error).__name__}: {error}"
        result.setdefault("seconds", {})[name] = round(time.perf_counter() - began, 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "harness.json").write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
