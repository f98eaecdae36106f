"""Triton kernels of the fused decode step: linears whose weights are 4-bit codes (int4, nf4). int8 is served by `_kernels_linear.py`.

See there for names and for PDL. Codes lie as `models/_packed.py` packs them: 32 columns are four 32-bit words ("a quad"), and word r's
nibble j holds column 4j + r. So a thread that loads a quad in one 16-byte access meets its x as eight 16-byte vectors, and a scale
never changes inside a quad.

int4 becomes float without a conversion: a code moved to a mantissa's upper end, with the exponent of 1.0 put before it, is 1 + c/16 or
1 + c/256, and x is scaled by 16 or 256 beforehand; what the ones add, sum(x) by quad, is taken off once a quad. The exponent comes in as
an argument (`one`), because an instruction holds one constant only, and mask and exponent would take two.
"""

# mypy: ignore-errors
# (a kernel is compiled by Triton; its parameters are pointers and compile-time constants, not Python values)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from stagebench.engines._kernels_linear import _finish

__all__ = ["gemv4_persistent", "gemv4_rows"]


@triton.jit
def _load_codes(w, rows, quads, n_rows, QUADS: tl.constexpr, EVEN: tl.constexpr):
    """[quads, rows, 4] words of int32 [N, K/8], streamed. Quads come first, because Triton spreads a warp over the first of
    equal dimensions: so tile, x and scales lie alike in the threads, and nothing goes through shared memory."""
    at = w + rows[None, :, None] * (QUADS * 4) + (quads[:, None, None] * 4 + tl.arange(0, 4)[None, None, :])
    ok = (rows < n_rows)[None, :, None]
    if not EVEN:
        ok = ok & (quads < QUADS)[:, None, None]
    return tl.load(at, mask=ok, other=0, eviction_policy="evict_first")


@triton.jit
def _load_x(x, norm, quads, J: tl.constexpr, QUADS: tl.constexpr, NORM: tl.constexpr):
    """x [quads, 1, 4] at the columns of nibble J: as it is, and times the norm's weight."""
    cols = quads[:, None, None] * 32 + 4 * J + tl.arange(0, 4)[None, None, :]
    ok = (quads < QUADS)[:, None, None]
    raw = tl.load(x + cols, mask=ok, other=0.0).to(tl.float32)
    weighted = raw
    if NORM:
        weighted = raw * tl.load(norm + cols, mask=ok, other=0.0).to(tl.float32)
    return raw, weighted


@triton.jit
def _partial_int4(tile, xs, one):
    """[quads, rows]: sum over a quad of (code + the ones' share) * x, with x scaled as `_scaled` says."""
    acc = tl.zeros(tile.shape, tl.float32)
    for pair in tl.static_range(4):
        moved = tile << (15 - 8 * pair) if pair < 2 else tile >> (8 * pair - 15)
        acc += ((moved & 0x00078000) | one).to(tl.float32, bitcast=True) * xs[2 * pair]
        acc += ((moved & 0x00780000) | one).to(tl.float32, bitcast=True) * xs[2 * pair + 1]
    return tl.sum(acc, 2)


@triton.jit
def _partial_nf4(tile, xs, table):
    """[quads, rows]: sum over a quad of NF4 value * x."""
    acc = tl.zeros(tile.shape, tl.float32)
    size: tl.constexpr = tile.shape[0] * tile.shape[1] * 4
    for j in tl.static_range(8):
        code = tl.reshape((tile >> (4 * j)) & 15, (size,))
        acc += tl.reshape(tl.gather(table, code, 0), tile.shape) * xs[j]
    return tl.sum(acc, 2)


@triton.jit
def _group(at, rows, quads, n_rows, QUADS: tl.constexpr, GROUP_QUADS: tl.constexpr):
    """[quads, rows] float32 of a [N, QUADS / GROUP_QUADS] table, each entry for GROUP_QUADS quads."""
    where = rows[None, :] * (QUADS // GROUP_QUADS) + (quads // GROUP_QUADS)[:, None]
    return tl.load(at + where, mask=(rows < n_rows)[None, :] & (quads < QUADS)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _quads(tile, xs, ones, total, scale, low, table, one, rows, quads, n_rows, QUADS, GROUP_QUADS: tl.constexpr, NF4: tl.constexpr):
    """[quads, rows] float32: what a tile of codes stands for, times x, by quad."""
    if NF4:
        return _partial_nf4(tile, xs, table) * _group(scale, rows, quads, n_rows, QUADS, GROUP_QUADS)
    inside = (_partial_int4(tile, xs, one) - ones) * _group(scale, rows, quads, n_rows, QUADS, GROUP_QUADS)
    return inside + total * _group(low, rows, quads, n_rows, QUADS, GROUP_QUADS)


@triton.jit
def gemv4_rows(
    x,
    norm,
    w,
    scale,
    low,
    values,
    bias,
    out,
    n_rows,
    eps,
    one,
    K: tl.constexpr,
    GROUP_QUADS: tl.constexpr,
    NF4: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemv_rows`, with w int32 [N, K/8]; scale and low [N, K/32/GROUP_QUADS], values [16] float32 (nf4's, else unused)."""
    QUADS: tl.constexpr = K // 32
    EVEN: tl.constexpr = QUADS % BLOCK_Q == 0
    CHUNKS: tl.constexpr = (QUADS + BLOCK_Q - 1) // BLOCK_Q
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    quads = tl.arange(0, BLOCK_Q)
    w_up = w + n_rows * (QUADS * 4)
    scale_up = scale + n_rows * (QUADS // GROUP_QUADS)
    low_up = low + n_rows * (QUADS // GROUP_QUADS)
    table = tl.load(values + tl.arange(0, 16)) if NF4 else tl.zeros((16,), tl.float32)
    tile = _load_codes(w, rows, quads, n_rows, QUADS, EVEN)
    if GATED:
        tile_up = _load_codes(w_up, rows, quads, n_rows, QUADS, EVEN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    acc_up = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    square = tl.zeros((BLOCK_Q, 1, 4), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        now = chunk * BLOCK_Q + quads
        if chunk + 1 < CHUNKS:
            tile_next = _load_codes(w, rows, now + BLOCK_Q, n_rows, QUADS, EVEN)
            if GATED:
                tile_up_next = _load_codes(w_up, rows, now + BLOCK_Q, n_rows, QUADS, EVEN)
        plain = tl.zeros((BLOCK_Q, 1, 4), tl.float32)
        scaled = tl.zeros((BLOCK_Q, 1, 4), tl.float32)
        xs = ()
        for j in tl.static_range(8):
            raw, part = _load_x(x, norm, now, j, QUADS, NORM)
            if NORM:
                square += raw * raw
            if not NF4:
                plain += part
                part *= 256.0 if j % 2 == 0 else 16.0
                scaled += part
            xs = xs + (part,)  # noqa: RUF005 - Triton knows no starred tuples
        ones = tl.sum(scaled, 2)
        total = tl.sum(plain, 2)
        acc += _quads(tile, xs, ones, total, scale, low, table, one, rows, now, n_rows, QUADS, GROUP_QUADS, NF4)
        if GATED:
            acc_up += _quads(tile_up, xs, ones, total, scale_up, low_up, table, one, rows, now, n_rows, QUADS, GROUP_QUADS, NF4)
        if chunk + 1 < CHUNKS:
            tile = tile_next
            if GATED:
                tile_up = tile_up_next
    y = tl.sum(acc, 0)
    up = y
    if GATED:
        up = tl.sum(acc_up, 0)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(tl.sum(square, 2), 1), 0) / K + eps)
        y *= inverse
        up *= inverse
    _finish(y, up, rows, scale, bias, out, n_rows, GATED, BIAS, RESIDUAL, False)


@triton.jit
def gemv4_persistent(
    x,
    norm,
    w,
    scale,
    low,
    values,
    bias,
    out,
    n_rows,
    eps,
    one,
    K: tl.constexpr,
    GROUP_QUADS: tl.constexpr,
    NF4: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `gemv4_rows`, with as many programs as fit at once; each keeps all of x in registers and walks over its row tiles.

    BLOCK_Q is the power of two at or above K / 32. The next tile's loads are issued before the present tile is multiplied.
    """
    QUADS: tl.constexpr = K // 32
    EVEN: tl.constexpr = QUADS == BLOCK_Q
    quads = tl.arange(0, BLOCK_Q)
    lanes = tl.arange(0, BLOCK_N)
    w_up = w + n_rows * (QUADS * 4)
    scale_up = scale + n_rows * (QUADS // GROUP_QUADS)
    low_up = low + n_rows * (QUADS // GROUP_QUADS)
    table = tl.load(values + tl.arange(0, 16)) if NF4 else tl.zeros((16,), tl.float32)
    tiles = tl.cdiv(n_rows, BLOCK_N)
    step = tl.num_programs(0)
    first = tl.program_id(0)
    tile = _load_codes(w, first * BLOCK_N + lanes, quads, n_rows, QUADS, EVEN)
    tile_up = tile
    if GATED:
        tile_up = _load_codes(w_up, first * BLOCK_N + lanes, quads, n_rows, QUADS, EVEN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    square = tl.zeros((BLOCK_Q, 1, 4), tl.float32)
    plain = tl.zeros((BLOCK_Q, 1, 4), tl.float32)
    scaled = tl.zeros((BLOCK_Q, 1, 4), tl.float32)
    xs = ()
    for j in tl.static_range(8):
        raw, part = _load_x(x, norm, quads, j, QUADS, NORM)
        if NORM:
            square += raw * raw
        if not NF4:
            plain += part
            part *= 256.0 if j % 2 == 0 else 16.0
            scaled += part
        xs = xs + (part,)  # noqa: RUF005 - Triton knows no starred tuples
    inverse = 1.0
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(tl.sum(square, 2), 1), 0) / K + eps)
    ones = tl.sum(scaled, 2)
    total = tl.sum(plain, 2)
    for index in tl.range(first, tiles, step):
        rows = index * BLOCK_N + lanes
        after = (index + step) * BLOCK_N + lanes
        tile_next = _load_codes(w, after, quads, n_rows, QUADS, EVEN)
        tile_up_next = tile_next
        if GATED:
            tile_up_next = _load_codes(w_up, after, quads, n_rows, QUADS, EVEN)
        y = tl.sum(_quads(tile, xs, ones, total, scale, low, table, one, rows, quads, n_rows, QUADS, GROUP_QUADS, NF4), 0)
        up = y
        if GATED:
            up = tl.sum(_quads(tile_up, xs, ones, total, scale_up, low_up, table, one, rows, quads, n_rows, QUADS, GROUP_QUADS, NF4), 0)
        if NORM:
            y *= inverse
            up *= inverse
        _finish(y, up, rows, scale, bias, out, n_rows, GATED, BIAS, RESIDUAL, False)
        tile = tile_next
        tile_up = tile_up_next
