"""Launches of the kernels in `_kernels_packed.py`. Import only where triton is installed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from stagebench.models import _kernels_packed
from stagebench.models._packed import Int4Linear, Int8Linear, Nf4Linear, PackedLinear

__all__ = ["PLAIN", "Form", "Tiles", "constants_of", "launch_packed", "row_product"]

_ONE, _ONE_AND_A_HALF = 0x3F800000, 0x3FC00000
"""The bits of 1.0 and 1.5 in float32: see `_kernels_packed.py`."""
_CODES = {Int8Linear: _kernels_packed.INT8, Int4Linear: _kernels_packed.INT4, Nf4Linear: _kernels_packed.NF4}


class Form(NamedTuple):
    """What a linear does around its product: out (+)= act(W @ rmsnorm(x) + bias)."""

    norm: torch.Tensor | None = None
    """Weight [K] of the norm before it; None: x as it is."""
    eps: float = 0.0
    bias: torch.Tensor | None = None
    gated: bool = False
    """W is [2N, K]; out = silu(the first N rows' product) * the others'."""
    residual: bool = False
    """Add to out."""
    pdl: bool = False
    """Programmatic dependent launch."""


class Tiles(NamedTuple):
    """What a program works on. With `programs`, so many walk over the rows, block_n at a time; else one for each block_n rows."""

    block_n: int
    block_k: int | None = None
    """Columns at a time, where there are no `programs`; None: all."""
    programs: int | None = None
    warps: int = 4


PLAIN = Form()
_ROW_TILES = {kind: Tiles(4, 128 * kind.QUAD) for kind in _CODES}


def launch_packed(
    kind: type[PackedLinear], parts: tuple[torch.Tensor, ...], x: torch.Tensor, out: torch.Tensor, tiles: Tiles, form: Form = PLAIN
) -> None:
    """One linear of packed weights on x [K] to out [N].

    Raises ValueError where K does not divide by the columns that are read at once.
    """
    k, n = x.numel(), out.numel()
    if k % kind.QUAD:
        raise ValueError(f"{kind.__name__} of {k} columns: the kernels read {kind.QUAD} at a time. Unpack and multiply instead.")
    quads = k // kind.QUAD
    codes, scale, third = (*parts, x)[:3]
    norm, eps, bias, _, _, _ = form
    block_n, block_k, programs, warps = tiles
    head = (x, x if norm is None else norm, codes.view(torch.int32), scale, third, third, x if bias is None else bias, out, n, eps)
    one = _ONE_AND_A_HALF if kind is Int8Linear else _ONE
    constants = constants_of(form)
    constants["QUADS"] = quads
    constants["GROUP_QUADS"] = 1 if kind is Int8Linear else quads // scale.shape[1]
    constants["CODES"] = _CODES[kind]
    constants["BLOCK_N"] = block_n
    constants["num_warps"] = warps
    blocks = -(-n // block_n)
    if programs is None:
        columns = quads if block_k is None else block_k // kind.QUAD
        _kernels_packed.packed_rows[(blocks,)](*head, one, BLOCK_Q=columns, **constants)
    else:
        _kernels_packed.packed_persistent[(min(blocks, programs),)](*head, one, BLOCK_Q=1 << (quads - 1).bit_length(), **constants)


def row_product(kind: type[PackedLinear], parts: tuple[torch.Tensor, ...], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """W x + bias for one row x [K]; [N] in x's dtype. 128 threads read sixteen bytes each of four rows at once."""
    out = torch.empty(parts[0].shape[0], dtype=x.dtype, device=x.device)
    launch_packed(kind, parts, x, out, _ROW_TILES[kind], PLAIN if bias is None else Form(bias=bias))
    return out


def constants_of(form: Form) -> dict[str, Any]:
    """The kernels' compile-time constants and launch options of a form; the caller adds its own."""
    norm, _, bias, gated, residual, pdl = form
    constants: dict[str, Any] = {"NORM": norm is not None, "GATED": gated, "BIAS": bias is not None, "RESIDUAL": residual, "PDL": pdl}
    if pdl:
        constants["launch_pdl"] = True
    return constants
