"""Launches of the fused step's linears: which kernel, with which grid, for plain and for packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stagebench.engines import _kernels_linear
from stagebench.engines._weights import Matrix, PackedMatrix, multiply
from stagebench.models._packed_launch import PLAIN, Form, Tiles, constants_of, launch_packed

__all__ = ["Form", "Linear", "dependent", "launch_linear", "multiprocessors"]

_GATE_BLOCK = 1024


@dataclass(frozen=True)
class Linear:
    """How one linear of the step is launched."""

    kind: str = "rows"
    """rows | pipelined | persistent (batch 1); cublas (any batch). Packed weights: rows, persistent or cublas."""
    block_n: int = 4
    block_k: int = 1024
    warps: int = 4
    stages: int = 3
    """Depth of the software pipeline (pipelined); programs per multiprocessor (persistent)."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.block_n}x{self.block_k}w{self.warps}s{self.stages}"


def launch_linear(how: Linear, x: torch.Tensor, w: Matrix, out: torch.Tensor, form: Form = PLAIN) -> None:
    """out [B, N] (+)= act(w @ rmsnorm(x) + bias) for x [B, K], as `form` says; the kernel that `how` names. w is [2N, K] when gated.

    Raises ValueError for a batch or a packed form that the kernel does not serve.
    """
    batch, k = x.shape
    n = out.shape[1]
    if how.kind == "cublas":
        return _library_linear(x, w, out, form)
    if batch != 1:
        raise ValueError(f"linear kernel {how.kind}: batch {batch}, expected 1. Use kind cublas.")
    if isinstance(w, PackedMatrix):
        return launch_packed(w.kind, w.parts, x, out, _tiles(how, x.device), form)
    options = constants_of(form)
    options["num_warps"] = how.warps
    head = (x, x if form.norm is None else form.norm, w, x if form.bias is None else form.bias, out, n, form.eps)
    if how.kind == "rows":
        _kernels_linear.gemv_rows[(-(-n // how.block_n),)](
            *head, K=k, BLOCK_N=how.block_n, BLOCK_K=how.block_k, EVEN_N=n % how.block_n == 0, **options
        )
    elif how.kind == "pipelined":
        _kernels_linear.gemv_pipelined[(-(-n // how.block_n),)](
            *head, K=k, BLOCK_N=how.block_n, BLOCK_K=how.block_k, EVEN_N=n % how.block_n == 0, STAGES=how.stages, **options
        )
    elif how.kind == "persistent":
        programs = min(-(-n // how.block_n), multiprocessors(x.device) * how.stages)
        _kernels_linear.gemv_persistent[(programs,)](*head, K=k, BLOCK_N=how.block_n, BLOCK_K=_power_of_two(k), **options)
    else:
        raise ValueError(f"linear kernel {how.kind!r}: expected rows, pipelined, persistent or cublas")
    return None


def _tiles(how: Linear, device: torch.device) -> Tiles:
    if how.kind == "rows":
        return Tiles(how.block_n, how.block_k, warps=how.warps)
    if how.kind == "persistent":
        return Tiles(how.block_n, programs=multiprocessors(device) * how.stages, warps=how.warps)
    raise ValueError(f"linear kernel {how.kind!r} for packed weights: expected rows, persistent or cublas")


def _library_linear(x: torch.Tensor, w: Matrix, out: torch.Tensor, form: Form) -> None:
    """The same by the library's matrix product, with norm and gate in kernels of their own around it."""
    norm, pdl = form.norm, form.pdl
    if norm is not None:
        normed = torch.empty(x.shape, dtype=norm.dtype, device=x.device)
        _kernels_linear.normalise[(x.shape[0],)](
            x, norm, normed, form.eps, K=x.shape[1], BLOCK_K=_power_of_two(x.shape[1]), PDL=pdl, num_warps=8, **dependent(pdl)
        )
        x = normed
    if form.bias is None and not form.gated and not form.residual and isinstance(w, torch.Tensor) and out.dtype == w.dtype:
        torch.mm(x, w.t(), out=out)
        return
    y = multiply(x, w, form.bias)
    if form.gated:
        grid = (-(-out.shape[1] // _GATE_BLOCK), out.shape[0])
        _kernels_linear.gate[grid](y, out, out.shape[1], BLOCK_N=_GATE_BLOCK, PDL=pdl, **dependent(pdl))
    elif form.residual:
        out.add_(y)
    else:
        out.copy_(y)


def dependent(pdl: bool) -> dict[str, Any]:
    """Launch options of programmatic dependent launch."""
    return {"launch_pdl": True} if pdl else {}


def multiprocessors(device: torch.device) -> int:
    """1 where there is no GPU (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
