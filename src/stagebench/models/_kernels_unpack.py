"""Triton kernels that turn packed codes into what they stand for, for products of many rows (a prefill, a batch).

Import only where triton is installed; `_packed.py` calls it. In eager torch four bits take a dozen passes over the matrix.
"""

# mypy: ignore-errors
# (a kernel is compiled by Triton; its parameters are pointers and compile-time constants, not Python values)

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["unpack4", "unpack8"]

_ROWS, _COLUMNS = 4, 1024


@triton.jit
def _unpack(
    codes,
    scale,
    low,
    values,
    out,
    n_rows,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    QUAD: tl.constexpr,
    NF4: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [N, K] from codes uint8 [N, K/2]; one program a tile. Neighbouring lanes share bytes and scales, which the L1 cache holds."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    cols = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    ok = (rows < n_rows) & (cols < K)
    if QUAD:  # byte and half byte of a column: see _packed.py
        nibble = (cols % 32) // 4
        byte = cols // 32 * 16 + cols % 4 * 4 + nibble // 2
        shift = nibble % 2 * 4
    else:
        byte = cols // 2
        shift = cols % 2 * 4
    code = (tl.load(codes + rows * (K // 2) + byte, mask=ok, other=0).to(tl.int32) >> shift) & 15
    group = rows * (K // GROUP) + cols // GROUP
    weight = tl.load(scale + group, mask=ok, other=0.0).to(tl.float32)
    if NF4:
        weight *= tl.load(values + code)
    else:
        weight = code.to(tl.float32) * weight + tl.load(low + group, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + rows * K + cols, weight.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _widen(codes, out, n_rows, K: tl.constexpr, QUAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [N, K] from codes int8 [N, K], in the order of the columns; without scales, so exact in any float dtype."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    cols = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    ok = (rows < n_rows) & (cols < K)
    at = cols // 16 * 16 + cols % 4 * 4 + cols % 16 // 4 if QUAD else cols
    code = tl.load(codes + rows * K + at, mask=ok, other=0)
    tl.store(out + rows * K + cols, code.to(tl.float32).to(out.dtype.element_ty), mask=ok)


def unpack8(codes: torch.Tensor, dtype: torch.dtype, *, quads: bool) -> torch.Tensor:
    """int8 codes as `dtype`, [N, K], their columns in order."""
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _widen[grid](codes, out, rows, K=columns, QUAD=quads, BLOCK_N=_ROWS, BLOCK_K=_COLUMNS)
    return out


def unpack4(codes: torch.Tensor, scale: torch.Tensor, third: torch.Tensor, dtype: torch.dtype, *, quads: bool, nf4: bool) -> torch.Tensor:
    """[N, K] in `dtype`. third: the groups' low ends (int4), or the sixteen values (nf4)."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    _unpack[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
        codes,
        scale,
        third,
        third,
        out,
        rows,
        K=columns,
        GROUP=columns // scale.shape[1],
        QUAD=quads,
        NF4=nf4,
        BLOCK_N=_ROWS,
        BLOCK_K=_COLUMNS,
    )
    return out
