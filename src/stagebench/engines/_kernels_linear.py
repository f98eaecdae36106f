"""Triton kernels of the fused decode step: the linears. Import only where triton is installed; `_triton_step.py` calls them.

Names: B batch, K inputs, N outputs of a linear, H query heads, G key/value heads, D head width, S cache capacity.
A kernel with PDL set is launched with programmatic dependent launch: it starts while its predecessor drains, loads
weights (which nobody writes), and only then waits for what the predecessor wrote. Every kernel waits before it signals
its own successor, so when a kernel starts, all but its direct predecessor are complete.
"""

# mypy: ignore-errors
# (a kernel is compiled by Triton; its parameters are pointers and compile-time constants, not Python values)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gate", "gemv_persistent", "gemv_pipelined", "gemv_rows", "normalise"]


@triton.jit
def _load_weights(w, rows, cols, n_rows, K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """[rows, cols] of a row-major [N, K] matrix, streamed: each byte is used once."""
    at = w + rows[:, None] * K + cols[None, :]
    if EVEN_N and EVEN_K:
        tile = tl.load(at, eviction_policy="evict_first")
    elif EVEN_N:
        tile = tl.load(at, mask=(cols < K)[None, :], other=0.0, eviction_policy="evict_first")
    elif EVEN_K:
        tile = tl.load(at, mask=(rows < n_rows)[:, None], other=0.0, eviction_policy="evict_first")
    else:
        tile = tl.load(at, mask=(rows < n_rows)[:, None] & (cols < K)[None, :], other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _load_vector(x, cols, K: tl.constexpr, EVEN_K: tl.constexpr):
    part = tl.load(x + cols) if EVEN_K else tl.load(x + cols, mask=cols < K, other=0.0)
    return part.to(tl.float32)


@triton.jit
def _finish(y, up, rows, bias, out, n_rows, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """Bias, SiLU gate or residual add, and the store. All in float32 until the store."""
    ok = rows < n_rows
    if BIAS:
        y += tl.load(bias + rows, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        if BIAS:
            up += tl.load(bias + n_rows + rows, mask=ok, other=0.0).to(tl.float32)
        y = y * tl.sigmoid(y) * up
    if RESIDUAL:
        y += tl.load(out + rows, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def gemv_rows(
    x,
    norm,
    w,
    bias,
    out,
    n_rows,
    eps,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[n] (+)= act(sum_k w[n, k] * rmsnorm(x)[k]); BLOCK_N rows a program, K unrolled, the next chunk's loads in flight.

    x [K] float32 (residual stream, when NORM) or the weights' dtype; w [N, K], or [2N, K] (gate, then up) when GATED.
    The norm's 1/rms is a scalar and is applied to the sum, so it needs no pass of its own.
    """
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    w_up = w + n_rows * K
    tile = _load_weights(w, rows, cols, n_rows, K, EVEN_N, EVEN_K)
    if GATED:
        tile_up = _load_weights(w_up, rows, cols, n_rows, K, EVEN_N, EVEN_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    square = tl.zeros((BLOCK_K,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        now = chunk * BLOCK_K + cols
        if chunk + 1 < CHUNKS:
            then = (chunk + 1) * BLOCK_K + cols
            tile_next = _load_weights(w, rows, then, n_rows, K, EVEN_N, EVEN_K)
            if GATED:
                tile_up_next = _load_weights(w_up, rows, then, n_rows, K, EVEN_N, EVEN_K)
        part = _load_vector(x, now, K, EVEN_K)
        if NORM:
            square += part * part
            part *= _load_vector(norm, now, K, EVEN_K)
        acc += tile.to(tl.float32) * part[None, :]
        if GATED:
            acc_up += tile_up.to(tl.float32) * part[None, :]
        if chunk + 1 < CHUNKS:
            tile = tile_next
            if GATED:
                tile_up = tile_up_next
    y = tl.sum(acc, 1)
    up = y
    if GATED:
        up = tl.sum(acc_up, 1)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(square, 0) / K + eps)
        y *= scale
        up *= scale
    _finish(y, up, rows, bias, out, n_rows, GATED, BIAS, RESIDUAL)


@triton.jit
def gemv_pipelined(
    x,
    norm,
    w,
    bias,
    out,
    n_rows,
    eps,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemv_rows`, with K as a loop whose loads the compiler pipelines through shared memory, STAGES deep."""
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_up = w + n_rows * K
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    square = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        cols = k + tl.arange(0, BLOCK_K)
        tile = _load_weights(w, rows, cols, n_rows, K, EVEN_N, EVEN_K)
        if GATED:
            tile_up = _load_weights(w_up, rows, cols, n_rows, K, EVEN_N, EVEN_K)
        part = _load_vector(x, cols, K, EVEN_K)
        if NORM:
            square += part * part
            part *= _load_vector(norm, cols, K, EVEN_K)
        acc += tile.to(tl.float32) * part[None, :]
        if GATED:
            acc_up += tile_up.to(tl.float32) * part[None, :]
    y = tl.sum(acc, 1)
    up = y
    if GATED:
        up = tl.sum(acc_up, 1)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(square, 0) / K + eps)
        y *= scale
        up *= scale
    _finish(y, up, rows, bias, out, n_rows, GATED, BIAS, RESIDUAL)


@triton.jit
def gemv_persistent(
    x,
    norm,
    w,
    bias,
    out,
    n_rows,
    eps,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemv_rows`, with as many programs as fit at once; each keeps all of x in registers and walks over its row tiles.

    BLOCK_K is the power of two at or above K. The next tile's loads are issued before the present tile is reduced.
    """
    EVEN_K: tl.constexpr = K == BLOCK_K
    cols = tl.arange(0, BLOCK_K)
    lanes = tl.arange(0, BLOCK_N)
    w_up = w + n_rows * K
    tiles = tl.cdiv(n_rows, BLOCK_N)
    step = tl.num_programs(0)
    first = tl.program_id(0)
    tile = _load_weights(w, first * BLOCK_N + lanes, cols, n_rows, K, False, EVEN_K)
    tile_up = tile
    if GATED:
        tile_up = _load_weights(w_up, first * BLOCK_N + lanes, cols, n_rows, K, False, EVEN_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    vector = _load_vector(x, cols, K, EVEN_K)
    scale = 1.0
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(vector * vector, 0) / K + eps)
        vector *= _load_vector(norm, cols, K, EVEN_K)
    for index in tl.range(first, tiles, step):
        rows = index * BLOCK_N + lanes
        after = (index + step) * BLOCK_N + lanes
        tile_next = _load_weights(w, after, cols, n_rows, K, False, EVEN_K)
        tile_up_next = tile_next
        if GATED:
            tile_up_next = _load_weights(w_up, after, cols, n_rows, K, False, EVEN_K)
        y = tl.sum(tile.to(tl.float32) * vector[None, :], 1)
        up = y
        if GATED:
            up = tl.sum(tile_up.to(tl.float32) * vector[None, :], 1)
        if NORM:
            y *= scale
            up *= scale
        _finish(y, up, rows, bias, out, n_rows, GATED, BIAS, RESIDUAL)
        tile = tile_next
        tile_up = tile_up_next


@triton.jit
def normalise(x, norm, out, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """rmsnorm(x) rounded to the weights' dtype, for the library's matrix product; one program a row of x [B, K]."""
    cols = tl.arange(0, BLOCK_K)
    ok = cols < K
    weight = tl.load(norm + cols, mask=ok, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * K
    part = tl.load(x + row + cols, mask=ok, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(part * part, 0) / K + eps)
    tl.store(out + row + cols, (part * scale * weight).to(out.dtype.element_ty), mask=ok)


@triton.jit
def gate(both, out, n_rows, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    """silu(first half) * second half of both [B, 2N] into out [B, N]; grid (N blocks, B)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    ok = cols < n_rows
    y = tl.load(both + b * 2 * n_rows + cols, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(both + b * 2 * n_rows + n_rows + cols, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + b * n_rows + cols, (y * tl.sigmoid(y) * up).to(out.dtype.element_ty), mask=ok)
