"""Workloads of fixed shape: one that tells whether the machine stayed as fast as it was, one that tells its memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["ANCHOR_BOUND", "anchor", "anchor_drift", "bandwidth"]

ANCHOR_BOUND = {"cuda": 0.05, "cpu": 0.15}
"""Anchors that differ by more than this share were taken on machines in different states. A shared CPU is less steady than a GPU."""

_GEMV = 8192  # square bf16 matrix: 128 MiB, beyond any L2 cache in use
_MATMUL = 4096
_CPU_MATMUL = 384
_CPU_STREAM = 4 << 20  # float32 values: 16 MiB


def anchor(device: str) -> dict[str, float]:
    """Milliseconds of each fixed workload: the fastest of several runs, which other work on the machine can only lengthen.

    CUDA: `gemv_ms` (bandwidth-bound) and `matmul_ms` (compute-bound), bf16. CPU: `matmul_ms` and `stream_ms`, numpy float32.
    Takes some tens of milliseconds.
    """
    if device.startswith("cuda"):
        import torch

        with torch.inference_mode():
            matrix = torch.ones(_GEMV, _GEMV, device=device, dtype=torch.bfloat16)
            vector = torch.ones(_GEMV, device=device, dtype=torch.bfloat16)
            square = matrix[:_MATMUL, :_MATMUL].contiguous()
            return {
                "gemv_ms": _cuda_ms(lambda: torch.mv(matrix, vector), device, 20),
                "matmul_ms": _cuda_ms(lambda: torch.mm(square, square), device, 10),
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
    side = 16384 if cuda else 5792
    if cuda:
        free, _ = torch.cuda.mem_get_info(device)
        while side > 2048 and side * side * 2 > free // 4:
            side //= 2
    dtype = torch.bfloat16 if cuda else torch.float32
    with torch.inference_mode():
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        vector = torch.ones(side, device=device, dtype=dtype)
        call = lambda: torch.mv(matrix, vector)  # noqa: E731
        ms = _cuda_ms(call, device, 20) if cuda else _cpu_ms(call, 6)
    return matrix.nbytes / (ms * 1e-3)


def _cuda_ms(call: Callable[[], Any], device: str, runs: int) -> float:
    import torch

    with torch.cuda.device(device):
        for _ in range(3):
            call()
        times = []
        for _ in range(runs):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)))
    return min(times)


def _cpu_ms(call: Callable[[], Any], runs: int) -> float:
    call()
    times = []
    for _ in range(runs):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) * 1e-6)
    return min(times)
