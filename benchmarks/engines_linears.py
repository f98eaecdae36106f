"""Part of benchmarks/engines.py: bandwidth, and the linears of a step, right and fast."""

from __future__ import annotations

import gc
import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from engines_common import RESULTS, SHAPES, attempt, event_ms, graph_ms, out_of_time, row, say

# --- 1 environment and ceilings -------------------------------------------------------------------------------------


def environment() -> None:
    import transformers

    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "missing"
    p = torch.cuda.get_device_properties(0)
    RESULTS["env"] = {
        "gpu": p.name,
        "driver": _driver(),
        "capability": torch.cuda.get_device_capability(),
        "multiprocessors": p.multi_processor_count,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version,
        "transformers": transformers.__version__,
    }
    say(str(RESULTS["env"]))
    a = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / event_ms(lambda: b.copy_(a), 10) / 1e6
    matrix, vector = a.view(-1, 4096), torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    gemv = a.nbytes / event_ms(lambda: torch.mv(matrix, vector), 10) / 1e6
    RESULTS["bandwidth"] = {"copy_gbs": copy, "cublas_gemv_gbs": gemv}
    own = attempt("own GEMV bandwidth", lambda: _own_gemv(matrix, vector))
    best = max(gemv, own or 0.0)
    RESULTS["bandwidth"] |= {"own_gemv_gbs": own, "best_read_gbs": best}
    row(f"bandwidth GB/s: copy {copy:.0f}, cuBLAS GEMV 2 GB {gemv:.0f}, own GEMV 2 GB {own or float('nan'):.0f}")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _own_gemv(matrix: torch.Tensor, vector: torch.Tensor) -> float:
    from stagebench.engines._launch import Linear, launch_linear

    y = torch.empty(1, matrix.shape[0], device="cuda")
    return max(
        matrix.nbytes / event_ms(lambda how=how: launch_linear(how, vector[None], matrix, y), 10) / 1e6
        for how in (Linear("rows", 4, 1024, 4), Linear("rows", 2, 4096, 8), Linear("rows", 4, 4096, 8))
    )


# --- 2 kernels: right, then fast --------------------------------------------------------------------------------------


def candidates(name: str) -> list[Any]:
    """Launch settings to try for one linear of the step at batch 1."""
    from stagebench.engines._launch import Linear

    rows = [(1, 4096, 4), (2, 4096, 4), (2, 4096, 8), (4, 4096, 8), (8, 4096, 8), (4, 2048, 8), (2, 2048, 4), (1, 2048, 2)]
    rows += [(8, 2048, 8), (4, 1024, 4), (8, 1024, 4), (8, 1024, 8), (16, 1024, 8), (2, 1024, 2), (1, 1024, 1)]
    pipelined = [(8, 512, 4, 4), (4, 1024, 4, 4), (16, 256, 4, 5)]
    persistent = [(1, 0, 4, 4), (2, 0, 8, 2), (2, 0, 8, 3), (4, 0, 8, 2), (2, 0, 4, 3), (4, 0, 16, 1)]
    if name == "down":
        rows = [
            (1, 2048, 4),
            (2, 2048, 4),
            (2, 4096, 8),
            (1, 4096, 8),
            (4, 1024, 4),
            (4, 2048, 8),
            (8, 1024, 8),
            (2, 1024, 4),
            (1, 2048, 2),
        ]
        rows += [(4, 512, 2), (4, 4096, 16), (2, 4096, 16), (16, 512, 8), (8, 2048, 16)]
        persistent = [(1, 0, 8, 2), (1, 0, 16, 1), (1, 0, 16, 2), (1, 0, 8, 1)]
    if name == "gate_up":
        rows = [(max(1, n // 2) if n > 1 else 1, k, w) for n, k, w in rows]
        pipelined = [(4, 512, 4, 4), (2, 1024, 4, 4)]
        persistent = [(1, 0, 4, 3), (1, 0, 8, 2), (1, 0, 8, 3), (2, 0, 8, 2), (2, 0, 16, 1)]
    found = [Linear("rows", n, k, w, 0) for n, k, w in dict.fromkeys(rows)]
    found += [Linear("pipelined", n, k, w, s) for n, k, w, s in pipelined]
    return found + [Linear("persistent", n, k, w, s) for n, k, w, s in persistent]


def launch(name: str, how: Any, x: Any, w: Any, out: Any, norm: Any, pdl: bool) -> None:
    from stagebench.engines._launch import Form, launch_linear

    normed = name in ("qkv", "gate_up", "head")
    form = Form(norm=norm if normed else None, eps=1e-5, gated=name == "gate_up", residual=name in ("out", "down"), pdl=pdl)
    launch_linear(how, x, w, out, form)


def tensors(name: str, batch: int = 1) -> tuple[torch.Tensor, ...]:
    """x, w, out, norm of one linear, as in the step."""
    n, k = SHAPES[name]
    residual_in, residual_out = name in ("qkv", "gate_up", "head"), name in ("out", "down")
    x = torch.randn(batch, k, device="cuda", dtype=torch.float32 if residual_in else torch.bfloat16)
    w = torch.randn(2 * n if name == "gate_up" else n, k, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    out = torch.empty(batch, n, device="cuda", dtype=torch.float32 if residual_out or name == "head" else torch.bfloat16)
    return x, w, out, (torch.rand(k, device="cuda") + 0.5).bfloat16()


def linear_error(name: str, how: Any, batch: int = 1, pdl: bool = False) -> float:
    """Relative error against float64 on fresh random inputs; the output is poisoned before."""
    x, w, out, norm = tensors(name, batch)
    before = torch.randn_like(out)
    out.copy_(before if name in ("out", "down") else torch.full_like(out, float("nan")))
    launch(name, how, x, w, out, norm, pdl)
    given = x.double()
    if name in ("qkv", "gate_up", "head"):
        given = given / (given.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
    want = given @ w.double().T
    if name == "gate_up":
        gate, up = want.chunk(2, -1)
        want = torch.nn.functional.silu(gate) * up
    if name in ("out", "down"):
        want = want + before.double()
    return float((out.double() - want).norm() / want.norm())


ATTENTION = [
    (splits, block, warps) for splits in (4, 8, 16, 32) for block in (16, 32, 64, 128) for warps in (2, 4, 8) if block * 8 >= warps * 32
]


def precompile(part: int, parts: int) -> None:
    """A worker: launch its share of all variants once, so that the compiler's disk cache holds them."""
    torch.manual_seed(part)
    names: dict[str, list[tuple[int, Any]]] = {name: [(1, how) for how in candidates(name)] for name in SHAPES}
    numbered = itertools.count()
    for name, jobs in names.items():
        for batch, how in jobs:
            if next(numbered) % parts == part:
                try:
                    x, w, out, norm = tensors(name, batch)
                    launch(name, how, x, w, out, norm, True)
                    torch.cuda.synchronize()
                except Exception as error:
                    print(f"worker {part}: {name} {how}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    mine = [shape for shape in ATTENTION if next(numbered) % parts == part]
    attempt(f"worker {part} attention", precompile_attention, mine)


def precompile_attention(shapes: list[tuple[int, int, int]]) -> None:
    from stagebench.engines._state import StepState
    from stagebench.engines._triton_step import StepConfig, TritonStep
    from stagebench.engines._weights import Layer, Weights

    def matrix(*size: int) -> torch.Tensor:
        return torch.zeros(size, device="cuda", dtype=torch.bfloat16)

    # only shapes and dtypes matter here
    layer = Layer(matrix(1, 1), None, matrix(1, 1), matrix(1, 1), matrix(4096, 11008), matrix(1), matrix(1))
    weights = Weights((layer,), matrix(64, 4096), matrix(1), matrix(64, 4096), 1e-5, 32, 32, 128, 128**-0.5)
    state = StepState.build(layers=1, batch=1, kv_heads=32, head_dim=128, capacity=768, planes=1, dtype=torch.bfloat16, device="cuda")
    state.slot.fill_(100)
    table = torch.zeros(769, 64, device="cuda")
    for splits, block, warps in shapes:
        config = StepConfig(splits=splits, block_s=block, attention_warps=warps)
        TritonStep(weights, state, table, table, None, config).attend(0)
        torch.cuda.synchronize()


def start_workers() -> list[Any]:
    count = max(1, min(12, (os.cpu_count() or 2) - 2))
    command = [sys.executable, str(Path(__file__).with_name("engines.py")), "--precompile"]
    return [subprocess.Popen([*command, f"{i}/{count}"], env=os.environ) for i in range(count)]


def tune(layers: int, pdl: bool) -> dict[str, list[tuple[float, Any]]]:
    """GB/s of every variant of every linear, in a captured chain over as many matrices as do not fit the L2 cache."""
    ranking: dict[str, list[tuple[float, Any]]] = {}
    for name in SHAPES:
        copies = 6 if name == "head" else layers
        sets = [tensors(name) for _ in range(copies)]
        nbytes = sum(s[1].nbytes for s in sets)
        found = []
        for how in candidates(name):
            if out_of_time():
                break

            def measure(how: Any = how, name: str = name, sets: Any = sets, nbytes: int = nbytes) -> tuple[float, float]:
                error = linear_error(name, how, pdl=pdl)
                if not error < 1.5e-2:
                    raise ValueError(f"relative error {error:.2e}")
                ms = graph_ms(lambda: [launch(name, how, *s, pdl) for s in sets], 6)
                return nbytes / ms / 1e6, error

            got = attempt(f"tune {name} {how} pdl={pdl}", measure)
            if got:
                found.append((got[0], how, got[1]))
        found.sort(key=lambda item: -item[0])
        ranking[name] = [(speed, how) for speed, how, _ in found]
        RESULTS.setdefault("tune", {})[f"{name} pdl={pdl}"] = [{"how": str(h), "gbs": s, "error": e} for s, h, e in found]
        top = "  ".join(f"{how} {speed:.0f}" for speed, how in ranking[name][:5])
        kinds = {h.kind: s for s, h in reversed(ranking[name])}
        row(f"linear {name:8} GB/s pdl={pdl}: {top} | best by kind " + " ".join(f"{k} {v:.0f}" for k, v in kinds.items()))
        del sets
        gc.collect()
        torch.cuda.empty_cache()
    return ranking
