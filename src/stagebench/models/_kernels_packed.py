"""Triton kernels that multiply one row by packed weights (int8, int4, nf4), reading the codes: a decode step at batch 1.

Names: K inputs, N outputs of a linear. Norm, gate, bias and residual are there for engine `fused`, as is PDL: with it a kernel is
launched while its predecessor drains, loads weights (which nobody writes), and only then waits for what the predecessor wrote.

Codes lie as `_packed.py` packs them: sixteen bytes ("a quad": 16 or 32 columns)
are four 32-bit words, and the j-th code of word r belongs to column 4j + r. So a thread that loads a quad in one 16-byte access meets
its x as 16-byte vectors, and a scale never changes inside a quad.

A decode step is bound by instructions as soon as weights are packed, so codes become float without a conversion (which runs at a quarter
of the rate of anything else): moved to the upper end of the mantissa, with the exponent of 1.0 put before it, a code c is 1 + c/16 or
1 + c/256, and x is scaled by 16 or 256 beforehand; what the ones add, sum(x) by quad, is taken off once a quad. The exponent comes in
as an argument (`one`), because an instruction holds one constant only, and mask and exponent would take two.
"""

# mypy: ignore-errors
# (a kernel is compiled by Triton; its parameters are pointers and compile-time constants, not Python values)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["INT4", "INT8", "NF4", "packed_persistent", "packed_rows"]

INT8, INT4, NF4 = 0, 1, 2
"""Values of CODES."""


@triton.jit
def _load_codes(w, rows, quads, n_rows, QUADS: tl.constexpr, EVEN: tl.constexpr):
    """[quads, rows, 4] words of int32 [N, QUADS * 4], streamed. Quads come first, because Triton spreads a warp over the first of
    equal dimensions: so tile, x and scales lie alike in the threads, and nothing goes through shared memory."""
    at = w + rows[None, :, None] * (QUADS * 4) + (quads[:, None, None] * 4 + tl.arange(0, 4)[None, None, :])
    ok = (rows < n_rows)[None, :, None]
    if not EVEN:
        ok = ok & (quads < QUADS)[:, None, None]
    return tl.load(at, mask=ok, other=0, eviction_policy="evict_first")


@triton.jit
def _load_x(x, norm, quads, QUADS: tl.constexpr, CODES: tl.constexpr, NORM: tl.constexpr):
    """x by a word's j-th code, each [quads, 1, 4] and scaled as `_partial` needs it; what the ones add and sum(x), both [quads, 1];
    and the squares' sum [quads, 1, 4], for the norm."""
    COUNT: tl.constexpr = 4 if CODES == 0 else 8
    ok = (quads < QUADS)[:, None, None]
    square = tl.zeros((quads.shape[0], 1, 4), tl.float32)
    plain = tl.zeros((quads.shape[0], 1, 4), tl.float32)
    scaled = tl.zeros((quads.shape[0], 1, 4), tl.float32)
    xs = ()
    for j in tl.static_range(COUNT):
        cols = quads[:, None, None] * (4 * COUNT) + 4 * j + tl.arange(0, 4)[None, None, :]
        part = tl.load(x + cols, mask=ok, other=0.0).to(tl.float32)
        if NORM:
            square += part * part
            part *= tl.load(norm + cols, mask=ok, other=0.0).to(tl.float32)
        if CODES == 0:
            part *= 256.0
            scaled += part
        if CODES == 1:
            plain += part
            part *= 256.0 if j % 2 == 0 else 16.0
            scaled += part
        xs = xs + (part,)  # noqa: RUF005 - Triton knows no starred tuples
    if CODES == 0:
        scaled *= 1.5
    return xs, tl.sum(scaled, 2), tl.sum(plain, 2), square


@triton.jit
def _partial(tile, xs, table, one, CODES: tl.constexpr):
    """[quads, rows]: sum over a quad of code * x, for int8 and int4 with the ones' share; for nf4 of value * x."""
    acc = tl.zeros(tile.shape, tl.float32)
    if CODES == 0:  # `one` is 1.5 here, and the exclusive or turns the sign bit over: 1.5 + c/256
        for j in tl.static_range(4):
            moved = tile << (15 - 8 * j) if j < 2 else tile >> (8 * j - 15)
            acc += ((moved & 0x007F8000) ^ one).to(tl.float32, bitcast=True) * xs[j]
    if CODES == 1:  # a shift serves two codes: 1 + c/256 and 1 + c/16
        for pair in tl.static_range(4):
            moved = tile << (15 - 8 * pair) if pair < 2 else tile >> (8 * pair - 15)
            acc += ((moved & 0x00078000) | one).to(tl.float32, bitcast=True) * xs[2 * pair]
            acc += ((moved & 0x00780000) | one).to(tl.float32, bitcast=True) * xs[2 * pair + 1]
    if CODES == 2:  # one look-up for all eight codes, because each waits for all threads
        low = tl.join(tl.join(tile & 15, (tile >> 4) & 15), tl.join((tile >> 8) & 15, (tile >> 12) & 15))
        high = tl.join(tl.join((tile >> 16) & 15, (tile >> 20) & 15), tl.join((tile >> 24) & 15, (tile >> 28) & 15))
        codes = tl.join(low, high)  # [..., 2, 2, 2]: code's bit 0, bit 1, bit 2 of j
        found = tl.reshape(tl.gather(table, tl.reshape(codes, (codes.numel,)), 0), codes.shape)
        first, second = tl.split(found)
        for half in tl.static_range(2):
            part = first if half == 0 else second  # j < 4, j >= 4
            even, odd = tl.split(part)  # j bit 1
            j0, j1 = tl.split(even)
            j2, j3 = tl.split(odd)
            acc += j0 * xs[4 * half]
            acc += j1 * xs[4 * half + 1]
            acc += j2 * xs[4 * half + 2]
            acc += j3 * xs[4 * half + 3]
    return tl.sum(acc, 2)


@triton.jit
def _load_groups(at, rows, quads, n_rows, QUADS: tl.constexpr, GROUP_QUADS: tl.constexpr, WANTED: tl.constexpr):
    """[quads, rows] of a [N, QUADS / GROUP_QUADS] table, each entry for GROUP_QUADS quads; nothing where it is not WANTED."""
    if WANTED:
        where = rows[None, :] * (QUADS // GROUP_QUADS) + (quads // GROUP_QUADS)[:, None]
        found = tl.load(at + where, mask=(rows < n_rows)[None, :] & (quads < QUADS)[:, None], other=0.0)
    else:
        found = tl.zeros((1, 1), tl.float32)
    return found


@triton.jit
def _load(w, scale, low, rows, quads, n_rows, QUADS: tl.constexpr, GROUP_QUADS: tl.constexpr, CODES: tl.constexpr, EVEN: tl.constexpr):
    """A tile's codes, scales and low ends, as stored: all are in flight while the tile before is multiplied."""
    codes = _load_codes(w, rows, quads, n_rows, QUADS, EVEN)
    scales = _load_groups(scale, rows, quads, n_rows, QUADS, GROUP_QUADS, CODES != 0)
    return codes, scales, _load_groups(low, rows, quads, n_rows, QUADS, GROUP_QUADS, CODES == 1)


@triton.jit
def _quads(tile, xs, ones, total, table, one, CODES: tl.constexpr):
    """[quads, rows] float32: what a tile stands for, times x, by quad; int8 without its rows' scales."""
    codes, scales, lows = tile
    inside = _partial(codes, xs, table, one, CODES)
    if CODES != 2:
        inside -= ones
    if CODES != 0:
        inside *= scales.to(tl.float32)
    if CODES == 1:
        inside += total * lows.to(tl.float32)
    return inside


@triton.jit
def _row_scales(scale, rows, n_rows, CODES: tl.constexpr, GATED: tl.constexpr):
    """int8's scales of these rows, and of the up half's: loaded before the product, which takes longer than they do."""
    if CODES == 0:
        found = tl.load(scale + rows, mask=rows < n_rows, other=0.0)
        up = found
        if GATED:
            up = tl.load(scale + n_rows + rows, mask=rows < n_rows, other=0.0)
    else:
        found = tl.full((1,), 1.0, tl.float32)
        up = found
    return found, up


@triton.jit
def _finish(y, up, rows, bias, out, n_rows, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """Bias, SiLU gate or residual add, and the store. All in float32 until the store."""
    ok = rows < n_rows
    if BIAS:
        y += tl.load(bias + rows, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        y = y * tl.sigmoid(y) * up
    if RESIDUAL:
        y += tl.load(out + rows, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def packed_rows(
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
    QUADS: tl.constexpr,
    GROUP_QUADS: tl.constexpr,
    CODES: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[n] (+)= act(sum_k w[n, k] * rmsnorm(x)[k]); BLOCK_N rows a program, quads unrolled, the next chunk's loads in flight.

    x [K]; w int32 [N, QUADS * 4], or [2N, ..] (gate, then up) when GATED. scale: [N] (int8) or [N, QUADS / GROUP_QUADS]; low, as the
    latter, is int4's; values [16] float32 are nf4's. The norm's 1/rms is a scalar and is applied to the sum.
    """
    K: tl.constexpr = QUADS * (16 if CODES == 0 else 32)
    EVEN: tl.constexpr = QUADS % BLOCK_Q == 0
    CHUNKS: tl.constexpr = (QUADS + BLOCK_Q - 1) // BLOCK_Q
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    quads = tl.arange(0, BLOCK_Q)
    w_up = w + n_rows * (QUADS * 4)
    scale_up = scale + n_rows * (QUADS // GROUP_QUADS)  # (int8 has a scale a row, and takes it at the end)
    low_up = low + n_rows * (QUADS // GROUP_QUADS)
    table = tl.load(values + tl.arange(0, 16)) if CODES == 2 else tl.zeros((16,), tl.float32)
    tile = _load(w, scale, low, rows, quads, n_rows, QUADS, GROUP_QUADS, CODES, EVEN)
    if GATED:
        tile_up = _load(w_up, scale_up, low_up, rows, quads, n_rows, QUADS, GROUP_QUADS, CODES, EVEN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    own, own_up = _row_scales(scale, rows, n_rows, CODES, GATED)
    acc = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    acc_up = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    square = tl.zeros((BLOCK_Q, 1, 4), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        now = chunk * BLOCK_Q + quads
        if chunk + 1 < CHUNKS:
            tile_next = _load(w, scale, low, rows, now + BLOCK_Q, n_rows, QUADS, GROUP_QUADS, CODES, EVEN)
            if GATED:
                tile_up_next = _load(w_up, scale_up, low_up, rows, now + BLOCK_Q, n_rows, QUADS, GROUP_QUADS, CODES, EVEN)
        xs, ones, total, more = _load_x(x, norm, now, QUADS, CODES, NORM)
        square += more
        acc += _quads(tile, xs, ones, total, table, one, CODES)
        if GATED:
            acc_up += _quads(tile_up, xs, ones, total, table, one, CODES)
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
    _finish(y * own, up * own_up, rows, bias, out, n_rows, GATED, BIAS, RESIDUAL)


@triton.jit
def packed_persistent(
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
    QUADS: tl.constexpr,
    GROUP_QUADS: tl.constexpr,
    CODES: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `packed_rows`, with as many programs as fit at once; each keeps all of x in registers and walks over its row tiles.

    BLOCK_Q is the power of two at or above QUADS. The next tile's loads are issued before the present tile is multiplied.
    """
    K: tl.constexpr = QUADS * (16 if CODES == 0 else 32)
    EVEN: tl.constexpr = QUADS == BLOCK_Q
    quads = tl.arange(0, BLOCK_Q)
    lanes = tl.arange(0, BLOCK_N)
    w_up = w + n_rows * (QUADS * 4)
    scale_up = scale + n_rows * (QUADS // GROUP_QUADS)  # (int8 has a scale a row, and takes it at the end)
    low_up = low + n_rows * (QUADS // GROUP_QUADS)
    table = tl.load(values + tl.arange(0, 16)) if CODES == 2 else tl.zeros((16,), tl.float32)
    tiles = tl.cdiv(n_rows, BLOCK_N)
    step = tl.num_programs(0)
    first = tl.program_id(0)
    tile = _load(w, scale, low, first * BLOCK_N + lanes, quads, n_rows, QUADS, GROUP_QUADS, CODES, EVEN)
    tile_up = tile
    if GATED:
        tile_up = _load(w_up, scale_up, low_up, first * BLOCK_N + lanes, quads, n_rows, QUADS, GROUP_QUADS, CODES, EVEN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    xs, ones, total, square = _load_x(x, norm, quads, QUADS, CODES, NORM)
    inverse = 1.0
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(tl.sum(square, 2), 1), 0) / K + eps)
    for index in tl.range(first, tiles, step):
        rows = index * BLOCK_N + lanes
        after = (index + step) * BLOCK_N + lanes
        tile_next = _load(w, scale, low, after, quads, n_rows, QUADS, GROUP_QUADS, CODES, EVEN)
        tile_up_next = tile_next
        if GATED:
            tile_up_next = _load(w_up, scale_up, low_up, after, quads, n_rows, QUADS, GROUP_QUADS, CODES, EVEN)
        own, own_up = _row_scales(scale, rows, n_rows, CODES, GATED)
        y = tl.sum(_quads(tile, xs, ones, total, table, one, CODES), 0)
        up = y
        if GATED:
            up = tl.sum(_quads(tile_up, xs, ones, total, table, one, CODES), 0)
        if NORM:
            y *= inverse
            up *= inverse
        _finish(y * own, up * own_up, rows, bias, out, n_rows, GATED, BIAS, RESIDUAL)
        tile = tile_next
        tile_up = tile_up_next
