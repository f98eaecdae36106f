"""Workloads of fixed shape: one that tells whether the machine stayed as fast as it was, one that tells its memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["ANCHOR_BOUND", "anchor", "anchor_drift", "bandwidth"]

ANCHOR_BOUND = {"cuda": 0.05, "cpu": 0.15}
"""Anchors that differ by more than this share were taken on machines in different states. A shared CPU is less steady than a GPU."""

_GEMV = 16384  # square bf16 matrix: 512 MiB, beyond any L2 cache in use
_MATMUL = 4096
_WARM_S = 0.15
"""An idle GPU's clocks come up over tens of milliseconds: an anchor before that would time the idle state."""
_CPU_MATMUL = 384
_CPU_STREAM = 4 << 20  # float32 values: 16 MiB


def anchor(device: str) -> dict[str, float]:
    """Milliseconds of each fixed workload: the fastest of several runs, which other work on the machine can only lengthen.

    CUDA: `gemv_ms` (bandwidth-bound, bf16 16384 x 16384; smaller, and named so, where memory is short) and `matmul_ms` (compute-bound,
    bf16 4096). CPU: `matmul_ms` and `stream_ms`, numpy float32. Takes up to half a second.
    """
    if device.startswith("cuda"):
        import torch

        side = _gemv_side(device)
        with torch.inference_mode():
            matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16)
            vector = torch.ones(side, device=device, dtype=torch.bfloat16)
            square = matrix[:_MATMUL, :_MATMUL].contiguous()
            return {
                f"gemv{'' if side == _GEMV else side}_ms": _cuda_ms(lambda: torch.mv(matrix, vector), device),
                "matmul_ms": _cuda_ms(lambda: torch.mm(square, square), device),
            }
    rng = np.random.default_rng(0)
    left = rng.random((_CPU_MATMUL, _CPU_MATMUL), dtype=np.float32)
    stream = np.ones(_CPU_STREAM, dtype=np.float32)
    target = np.empty_like(stream)
    return {"matmul_ms": _cpu_ms(lambda: left @ left, 12), "stream_ms": _cpu_ms(lambda: np.multiply(stream, 2.0, out=target), 8)}


def anchor_drift(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Largest relative difference of a workload that both have, 0.05 for 5 %. Symmetric. 0 when they share none."""
    common = before.keys() & after.keys()
    return max((max(before[k], after[k]) / min(before[k], after[k]) - 1.0 for k in common if before[k] > 0 and after[k] > 0), default=0.0)


def bandwidth(device: str) -> float:
    """Bytes per second that a matrix-vector product reads: what a decode step of batch 1 is bounded by.

    CUDA: bf16, 512 MiB (less where memory is short). CPU: float32, 128 MiB, torch's own threads. The fastest of several runs.
    """
    import torch

    cuda = device.startswith("cuda")
    side, dtype = (_gemv_side(device), torch.bfloat16) if cuda else (5792, torch.float32)
    with torch.inference_mode():
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        vector = torch.ones(side, device=device, dtype=dtype)

        def call() -> Any:
            return torch.mv(matrix, vector)

        ms = _cuda_ms(call, device) if cuda else _cpu_ms(call, 6)
    return matrix.nbytes / (ms * 1e-3)


def _gemv_side(device: str) -> int:
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    side = _GEMV
    while side > _MATMUL and side * side * 2 > free // 4:
        side //= 2
    return side


def _cuda_ms(call: Callable[[], Any], device: str, batches: int = 10, calls: int = 10) -> float:
    """Milliseconds a call, of the fastest batch: back to back, so that the host's launches do not stand between them."""
    import torch

    with torch.cuda.device(device):
        end_of_warming = time.perf_counter() + _WARM_S
        while time.perf_counter() < end_of_warming:
            call()
            torch.cuda.synchronize()
        times = []
        for _ in range(batches):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / calls)
    return min(times)


def _cpu_ms(call: Callable[[], Any], runs: int) -> float:
    call()
    times = []
    for _ in range(runs):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) * 1e-6)
    return min(times)
