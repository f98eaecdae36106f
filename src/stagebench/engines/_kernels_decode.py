"""Triton kernels of the fused decode step: attention and the choice of the next token. See `_kernels_linear.py` for names."""

# mypy: ignore-errors
# (as there)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["attend", "select"]


@triton.jit
def attend(
    qkv,
    keys,
    values,
    cos,
    sin,
    slot_at,
    start_at,
    position_at,
    partial,
    weight,
    arrived,
    out,
    capacity,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """RoPE, cache write and one token's attention over cache slots [start, slot]; grid (H, SPLITS, B).

    qkv [B, (H+2G)*D]; keys, values [B, G, S, D]; cos, sin [positions, D/2] float32; partial [B, H, SPLITS, D] and
    weight [B, H, SPLITS, 2] float32 are scratch; arrived [B, H] int32 is zero before and after. The program that
    arrives last at a head combines the splits of that head. `scale` already holds log2(e).
    """
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    HALF: tl.constexpr = D // 2
    GROUP: tl.constexpr = H // G
    d = tl.arange(0, D)
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    sign = tl.where(d < HALF, -1.0, 1.0)
    # What follows was written a step ago, so it is read while the predecessor (QKV) still runs: only qkv is new.
    slot = tl.load(slot_at + b).to(tl.int32)
    start = tl.load(start_at + b).to(tl.int32)
    position = tl.load(position_at + b).to(tl.int32)
    c = tl.load(cos + position * HALF + d % HALF)
    s = tl.load(sin + position * HALF + d % HALF)
    g = h // GROUP
    base = (b * G + g).to(tl.int64) * capacity * D
    chunk = tl.cdiv(slot - start, SPLITS)
    low = start + split * chunk
    high = tl.minimum(low + chunk, slot)
    at = low + tl.arange(0, BLOCK_S)
    where = base + at[:, None] * D + d[None, :]
    k = tl.load(keys + where, mask=(at < high)[:, None], other=0.0)
    v = tl.load(values + where, mask=(at < high)[:, None], other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = qkv + b * (H + 2 * G) * D
    q = tl.load(row + h * D + d).to(tl.float32)
    q_partner = tl.load(row + h * D + partner).to(tl.float32)
    q = (q * c + sign * q_partner * s) * scale
    top = -float("inf")
    total = 0.0
    acc = tl.zeros((D,), tl.float32)
    for first in tl.range(low, high, BLOCK_S):
        ok = first + tl.arange(0, BLOCK_S) < high
        score = tl.where(ok, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))
        top_new = tl.maximum(top, tl.max(score, 0))
        p = tl.exp2(score - top_new)
        shrink = tl.exp2(top - top_new)
        acc = acc * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)
        total = total * shrink + tl.sum(p, 0)
        top = top_new
        at = first + BLOCK_S + tl.arange(0, BLOCK_S)
        where = base + at[:, None] * D + d[None, :]
        k = tl.load(keys + where, mask=(at < high)[:, None], other=0.0)
        v = tl.load(values + where, mask=(at < high)[:, None], other=0.0)
    if split == SPLITS - 1:  # the new token itself: not in the cache yet, so taken from registers and written by the way
        k_row = row + (H + g) * D
        k_new = tl.load(k_row + d).to(tl.float32) * c + sign * tl.load(k_row + partner).to(tl.float32) * s
        v_new = tl.load(row + (H + G + g) * D + d).to(tl.float32)
        if h % GROUP == 0:
            tl.store(keys + base + slot * D + d, k_new.to(keys.dtype.element_ty))
            tl.store(values + base + slot * D + d, v_new.to(values.dtype.element_ty))
        score_new = tl.sum(k_new.to(keys.dtype.element_ty).to(tl.float32) * q, 0)
        top_last = tl.maximum(top, score_new)
        p_new = tl.exp2(score_new - top_last)
        shrink_last = tl.exp2(top - top_last)
        acc = acc * shrink_last + p_new * v_new
        total = total * shrink_last + p_new
        top = top_last
    if SPLITS == 1:
        tl.store(out + (b * H + h) * D + d, (acc / total).to(out.dtype.element_ty))
    else:
        head = b * H + h
        tl.store(partial + (head * SPLITS + split) * D + d, acc)
        tl.store(weight + (head * SPLITS + split) * 2, top)
        tl.store(weight + (head * SPLITS + split) * 2 + 1, total)
        tl.debug_barrier()  # all threads' stores before the one thread that says so
        if tl.atomic_add(arrived + head, 1, sem="acq_rel") == SPLITS - 1:
            each = tl.arange(0, SPLITS)
            tops = tl.load(weight + (head * SPLITS + each) * 2, cache_modifier=".cg")
            totals = tl.load(weight + (head * SPLITS + each) * 2 + 1, cache_modifier=".cg")
            share = tl.exp2(tops - tl.max(tops, 0))
            parts = tl.load(partial + (head * SPLITS + each)[:, None] * D + d[None, :], cache_modifier=".cg")
            mixed = tl.sum(parts * share[:, None], 0) / tl.sum(share * totals, 0)
            tl.store(out + head * D + d, mixed.to(out.dtype.element_ty))
            tl.store(arrived + head, 0)


@triton.jit
def select(
    logits,
    embed,
    hidden,
    token_at,
    ids,
    count_at,
    slot_at,
    position_at,
    done_at,
    bad_at,
    eos,
    minimum_at,
    vocab,
    width,
    ids_stride,
    EOS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Greedy choice, EOS bookkeeping and the next input row; one program a sample. Ties go to the lowest id.

    Counters are per sample, so that no program reads what another one writes: count, slot and position are [B].
    """
    b = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_V)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    count = tl.load(count_at + b)
    allowed = count >= tl.load(minimum_at)
    done = tl.load(done_at + b)
    best = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    best_at = tl.zeros((BLOCK_V,), tl.int32)
    wrong = tl.zeros((BLOCK_V,), tl.int32)
    for first in tl.range(0, vocab, BLOCK_V):
        at = first + lanes
        value = tl.load(logits + b * vocab + at, mask=at < vocab, other=-float("inf"))
        wrong = tl.where((value != value) | (value == float("inf")), 1, wrong)
        for e in tl.static_range(EOS):
            value = tl.where((at == tl.load(eos + e)) & (not allowed), -float("inf"), value)
        better = value > best
        best = tl.where(better, value, best)
        best_at = tl.where(better, at, best_at)
    highest = tl.max(best, 0)
    token = tl.min(tl.where(best == highest, best_at, vocab), 0)
    token = tl.where(token < vocab, token, 0)  # all NaN: any id will do, the row is marked
    stops = done
    for e in tl.static_range(EOS):
        stops = tl.where(token == tl.load(eos + e), 1, stops)
    token = tl.where(done != 0, 0, token)
    tl.store(bad_at + b, tl.maximum(tl.load(bad_at + b), tl.max(wrong, 0)))
    tl.store(done_at + b, stops)
    tl.store(token_at + b, token.to(tl.int64))
    tl.store(ids + b * ids_stride + count, token.to(tl.int64))
    tl.store(count_at + b, count + 1)
    tl.store(slot_at + b, tl.load(slot_at + b) + 1)
    tl.store(position_at + b, tl.load(position_at + b) + 1)
    for k in tl.range(0, width, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        row = tl.load(embed + token.to(tl.int64) * width + cols, mask=cols < width, other=0.0)
        tl.store(hidden + b * width + cols, row.to(tl.float32), mask=cols < width)
