"""Launches of the fused step's linears: which kernel, with which grid, for plain and for packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stagebench.engines import _kernels_linear
from stagebench.engines._weights import Matrix, PackedMatrix, multiply
from stagebench.models._packed_launch import launch_packed

__all__ = ["Linear", "dependent", "launch_linear", "multiprocessors"]

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


def launch_linear(
    how: Linear,
    x: torch.Tensor,
    w: Matrix,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: bool = False,
    pdl: bool = False,
) -> None:
    """out [B, N] (+)= act(w @ rmsnorm(x)) for x [B, K]; the kernel that `how` names. w is [2N, K] when gated.

    Raises ValueError for a batch or a packed form that the kernel does not serve.
    """
    batch, k = x.shape
    n = out.shape[1]
    if how.kind == "cublas":
        return _library_linear(x, w, out, norm=norm, eps=eps, bias=bias, gated=gated, residual=residual, pdl=pdl)
    if batch != 1:
        raise ValueError(f"linear kernel {how.kind}: batch {batch}, expected 1. Use kind cublas.")
    if isinstance(w, PackedMatrix):
        return _launch_packed(how, x, w, out, norm=norm, eps=eps, bias=bias, gated=gated, residual=residual, pdl=pdl)
    flags = {"NORM": norm is not None, "GATED": gated, "BIAS": bias is not None, "RESIDUAL": residual, "PDL": pdl}
    options: dict[str, Any] = {"num_warps": how.warps, **dependent(pdl)}
    norm, bias = (unused if given is None else given for given, unused in ((norm, x), (bias, x)))
    head = (x, norm, w, bias, out, n, eps)
    if how.kind == "rows":
        _kernels_linear.gemv_rows[(-(-n // how.block_n),)](
            *head, K=k, BLOCK_N=how.block_n, BLOCK_K=how.block_k, EVEN_N=n % how.block_n == 0, **flags, **options
        )
    elif how.kind == "pipelined":
        _kernels_linear.gemv_pipelined[(-(-n // how.block_n),)](
            *head, K=k, BLOCK_N=how.block_n, BLOCK_K=how.block_k, EVEN_N=n % how.block_n == 0, STAGES=how.stages, **flags, **options
        )
    elif how.kind == "persistent":
        programs = min(-(-n // how.block_n), multiprocessors(x.device) * how.stages)
        _kernels_linear.gemv_persistent[(programs,)](*head, K=k, BLOCK_N=how.block_n, BLOCK_K=_power_of_two(k), **flags, **options)
    else:
        raise ValueError(f"linear kernel {how.kind!r}: expected rows, pipelined, persistent or cublas")
    return None


def _launch_packed(how: Linear, x: torch.Tensor, w: PackedMatrix, out: torch.Tensor, **form: Any) -> None:
    if how.kind == "rows":
        return launch_packed(w.kind, w.parts, x, out, block_n=how.block_n, block_k=how.block_k, warps=how.warps, **form)
    if how.kind == "persistent":
        programs = multiprocessors(x.device) * how.stages
        return launch_packed(w.kind, w.parts, x, out, block_n=how.block_n, programs=programs, warps=how.warps, **form)
    raise ValueError(f"linear kernel {how.kind!r} for packed weights: expected rows, persistent or cublas")


def _library_linear(
    x: torch.Tensor,
    w: Matrix,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    gated: bool,
    residual: bool,
    pdl: bool,
) -> None:
    """The same by the library's matrix product, with norm and gate in kernels of their own around it."""
    if norm is not None:
        normed = torch.empty(x.shape, dtype=norm.dtype, device=x.device)
        _kernels_linear.normalise[(x.shape[0],)](
            x, norm, normed, eps, K=x.shape[1], BLOCK_K=_power_of_two(x.shape[1]), PDL=pdl, num_warps=8, **dependent(pdl)
        )
        x = normed
    if bias is None and not gated and not residual and isinstance(w, torch.Tensor) and out.dtype == w.dtype:
        torch.mm(x, w.t(), out=out)
        return
    y = multiply(x, w, bias)
    if gated:
        grid = (-(-out.shape[1] // _GATE_BLOCK), out.shape[0])
        _kernels_linear.gate[grid](y, out, out.shape[1], BLOCK_N=_GATE_BLOCK, PDL=pdl, **dependent(pdl))
    elif residual:
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
