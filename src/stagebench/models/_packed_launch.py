"""Launches of the kernels in `_kernels_packed.py`. Import only where triton is installed."""

from __future__ import annotations

from typing import Any

import torch

from stagebench.models import _kernels_packed
from stagebench.models._packed import Int4Linear, Int8Linear, Nf4Linear, PackedLinear

__all__ = ["launch_packed", "row_product"]

_ONE, _ONE_AND_A_HALF = 0x3F800000, 0x3FC00000
"""The bits of 1.0 and 1.5 in float32: see `_kernels_packed.py`."""
_CODES = {Int8Linear: _kernels_packed.INT8, Int4Linear: _kernels_packed.INT4, Nf4Linear: _kernels_packed.NF4}


def launch_packed(
    kind: type[PackedLinear],
    parts: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    block_n: int,
    block_k: int | None = None,
    programs: int | None = None,
    warps: int = 4,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: bool = False,
    pdl: bool = False,
) -> None:
    """out [N] (+)= act(W @ rmsnorm(x)) for x [K]: with `programs`, so many walk over the rows, block_n at a time; else one program for
    each block_n rows, block_k columns at a time.

    Raises ValueError where K does not divide by the columns that are read at once.
    """
    k, n = x.numel(), out.numel()
    if k % kind.QUAD:
        raise ValueError(f"{kind.__name__} of {k} columns: the kernels read {kind.QUAD} at a time. Unpack and multiply instead.")
    quads = k // kind.QUAD
    codes, scale, third = (*parts, x)[:3]
    head = (x, x if norm is None else norm, codes.view(torch.int32), scale, third, third, x if bias is None else bias, out, n, eps)
    one = _ONE_AND_A_HALF if kind is Int8Linear else _ONE
    constants: dict[str, Any] = {
        "QUADS": quads,
        "GROUP_QUADS": 1 if kind is Int8Linear else quads // scale.shape[1],
        "CODES": _CODES[kind],
        "NORM": norm is not None,
        "GATED": gated,
        "BIAS": bias is not None,
        "RESIDUAL": residual,
        "BLOCK_N": block_n,
        "PDL": pdl,
        "num_warps": warps,
        **({"launch_pdl": True} if pdl else {}),
    }
    tiles = -(-n // block_n)
    if programs is None:
        columns = quads if block_k is None else block_k // kind.QUAD
        _kernels_packed.packed_rows[(tiles,)](*head, one, BLOCK_Q=columns, **constants)
    else:
        _kernels_packed.packed_persistent[(min(tiles, programs),)](*head, one, BLOCK_Q=1 << (quads - 1).bit_length(), **constants)


def row_product(kind: type[PackedLinear], parts: tuple[torch.Tensor, ...], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """W x + bias for one row x [K]; [N] in x's dtype. 128 threads read sixteen bytes each of four rows at once."""
    out = torch.empty(parts[0].shape[0], dtype=x.dtype, device=x.device)
    launch_packed(kind, parts, x, out, block_n=4, block_k=128 * kind.QUAD, bias=bias)
    return out
