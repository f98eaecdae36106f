"""A run -> its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagebench.machine import ENERGY_PERIODS, EnergyCounter, Reading
from stagebench.models.base import Decoding, Tokens
from stagebench.rows import SCHEMA, Code, Status
from stagebench.session.order import Group, Task
from stagebench.session.run import Run
from stagebench.stages import STAGES, closure_bound_ms
from stagebench.stats import CPU_WAIT_MS

__all__ = ["Limits", "Measured", "rows_of", "skipped_rows", "token_faults"]

CPU_WAIT_SHARE = 0.05
"""A thread that waited for a CPU for a larger share of a run, and longer than a time slice (CPU_WAIT_MS), was kept from its work."""
ENERGY_MIN_MS = 500.0
"""The energy counter moves every 20 to 100 ms: the energy of anything shorter than this would be its rounding."""


@dataclass(frozen=True)
class Limits:
    """What a decode step cannot be faster than, measured on this device in this job."""

    step_bytes: int
    """Weights that one decode step reads."""
    bandwidth: float
    """Bytes per second of a matrix-vector product."""

    def limit_ms(self, kv_bytes: int, prompt_length: int, steps: int) -> float:
        """Per token, at the context's mean over the decode stage. kv_bytes: at its end, when prompt_length + steps positions are held."""
        held = kv_bytes * (prompt_length + steps / 2) / max(1, prompt_length + steps)
        return (self.step_bytes + held) / self.bandwidth * 1e3


@dataclass(frozen=True)
class Measured:
    """One run of one group with what was read around it."""

    group: Group
    length: str
    repeat: int
    run: Run
    plain: Run | None
    before: Reading
    after: Reading
    counter: EnergyCounter | None = None
    """How finely the device counts energy; None where that is not known."""


def rows_of(
    measured: Measured,
    decoding: Decoding,
    texts: Sequence[str | None],
    constant: Mapping[str, Any],
    *,
    limits: Limits | None,
) -> list[dict[str, Any]]:
    """One row a sample of the group, JSON-able, all columns of rows.SCHEMA.

    constant: columns that are the same for the whole job. texts: decoded tokens, one a sample.
    """
    return [_row(measured, index, task, decoding, texts[index], constant, limits) for index, task in enumerate(measured.group.tasks)]


def skipped_rows(task: Task, lengths: Sequence[str], constant: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each length, of a sample that has no pixels."""
    return [_empty(constant) | _about(task) | _ran(0, None, length, Status.SKIPPED, task.skip) for length in lengths]


def token_faults(ids: Sequence[int], finish_reason: str, length: str, decoding: Decoding) -> str | None:
    """What is wrong with a run's tokens, or None: fixed lengths are exact, EOS ends a text and stands nowhere else."""
    if any(token in decoding.eos_token_ids for token in ids[:-1]):
        return "EOS stands before the end"
    if length != "natural" and len(ids) != int(length):
        return f"{len(ids)} tokens, {length} asked for"
    if not ids or len(ids) > decoding.max_new_tokens:
        return f"{len(ids)} tokens, 1 to {decoding.max_new_tokens} expected"
    ended = ids[-1] in decoding.eos_token_ids
    if (finish_reason == "eos") != ended:
        return f"finish reason {finish_reason!r}, but the last id is {'an' if ended else 'no'} EOS"
    if finish_reason == "length" and len(ids) != decoding.max_new_tokens:
        return f"stopped at {len(ids)} tokens without EOS, {decoding.max_new_tokens} allowed"
    return None


def _empty(constant: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(SCHEMA.names) | dict(constant) | {"codes": []}


def _about(task: Task) -> dict[str, Any]:
    return {
        "sample": task.sample,
        "clip": task.clip,
        "clip_digest": task.clip_digest,
        "sequence": task.sequence,
        "query": task.query,
        "id": task.id,
    }


def _ran(repeat: int, order: int | None, length: str, status: Status, reason: str | None) -> dict[str, Any]:
    return {"repeat": repeat, "order": order, "length": length, "status": status.value, "reason": reason}


def _row(
    m: Measured, index: int, task: Task, decoding: Decoding, text: str | None, constant: Mapping[str, Any], limits: Limits | None
) -> dict[str, Any]:
    run = m.run
    row = _empty(constant) | _about(task) | _ran(m.repeat, m.group.order, m.length, run.status, run.reason)
    row |= _sensors(m)
    if run.times is None or run.tokens is None:
        return row
    row |= _times(m)
    ids, finish = run.tokens.ids[index], run.tokens.finish_reasons[index]
    row |= {
        "prompt_tokens": run.prompt_tokens[index],
        "visual_tokens": run.visual_tokens[index],
        "new_tokens": len(ids),
        "steps": _steps(run.tokens),
        "drafted_tokens": run.tokens.drafted,
        "accepted_tokens": run.tokens.accepted,
        "token_ids": list(ids),
        "token_ms": [_finite(t) for t in run.times.token_ms[: max(0, len(ids) - 1)]],
        "text": text,
        "finish_reason": finish,
        "encoder_calls": run.encoder_calls,
        "feature_hash": run.feature_hashes[index],
        "kv_bytes": run.tokens.kv_bytes,
    }
    row |= _limit(m, limits)
    codes: list[Code] = []
    if run.status is Status.OK:
        if m.length == "natural" and "length" in run.tokens.finish_reasons:  # a batch's times end where its longest row was cut off
            row["status"] = Status.CAPPED.value
        fault = token_faults(ids, finish, m.length, decoding)
        if fault:
            codes.append(Code.INVALID_TOKEN_COUNT)
            row["reason"] = fault
    if run.captures:
        codes.append(Code.DISCARDED_CAPTURE)
        row["reason"] = row["reason"] or f"{run.captures} graphs captured or programs compiled inside the window"
    elif run.encoder_calls != 1 or run.encoder_calls_outside:
        codes.append(Code.INVALID_ENCODER_CALLS)
        row["reason"] = (
            f"{run.encoder_calls} calls of the vision encoder, {run.encoder_calls_outside} of them outside encode; 1 and 0 expected"
        )
    if abs(run.times.residual_ms) > closure_bound_ms(run.times.total_ms):
        codes.append(Code.SUSPECT_RESIDUAL)
    device_ms = run.times.total_gpu_ms
    if device_ms is not None and not abs(run.times.total_ms - device_ms) <= closure_bound_ms(run.times.total_ms):
        codes.append(Code.SUSPECT_CLOCKS)
        row["reason"] = row["reason"] or f"total: {run.times.total_ms:.2f} ms by the host's clock, {device_ms:.2f} ms by the device's"
    throttled = m.after.throttled_since(m.before)
    if throttled:
        codes.append(Code.DISCARDED_THROTTLED)
        row["reason"] = row["reason"] or "; ".join(throttled)
    if (row["cpu_wait_ms"] or 0.0) > max(CPU_WAIT_MS, CPU_WAIT_SHARE * run.times.total_ms):
        codes.append(Code.WARN_CPU_WAIT)
    if m.plain is not None:
        if m.plain.times is None or m.plain.tokens is None:
            codes.append(Code.INVALID_PLAIN_DIFFERS)
            row["reason"] = row["reason"] or f"the run without instrumentation ended as {m.plain.status.value}: {m.plain.reason}"
        else:
            row |= {
                "plain_total_ms": m.plain.times.total_ms,
                "plain_token_ids": list(m.plain.tokens.ids[index]),
                "plain_feature_hash": m.plain.feature_hashes[index],
            }
    row["codes"] = [code.value for code in codes]
    return row


def _times(m: Measured) -> dict[str, Any]:
    times = m.run.times
    if times is None:
        return {}
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[f"{stage}_ms"] = _finite(times.host_ms.get(stage))
        found[f"{stage}_gpu_ms"] = _finite(times.gpu_ms.get(stage))
        found[f"{stage}_peak_bytes"] = times.peak_bytes.get(stage)
    return found | {
        "total_ms": times.total_ms,
        "residual_ms": times.residual_ms,
        "ttft_ms": times.ttft_ms,
        "total_gpu_ms": _finite(times.total_gpu_ms),
    }


def _sensors(m: Measured) -> dict[str, Any]:
    joules = m.after.joules_since(m.before)
    long_enough = m.run.times is not None and m.run.times.total_ms >= ENERGY_MIN_MS
    return {
        "sm_clock_mhz": _finite(m.after.sm_clock_mhz),
        "temperature_c": _finite(m.after.temperature_c),
        "power_w": _finite(m.after.power_w),
        "energy_j": _finite(joules) if long_enough else None,
        "cpu_wait_ms": _finite(m.after.waited_ms_since(m.before)),
    } | _stage_energy(m)


def _stage_energy(m: Measured) -> dict[str, float]:
    """Joules of the stages that were watched, of those the ones that lasted long enough for the counter to tell them."""
    times, counter = m.run.times, m.counter
    if times is None or counter is None:
        return {}
    shortest = ENERGY_PERIODS * counter.period_ms
    return {f"{stage}_energy_j": mj * 1e-3 for stage, mj in times.energy_mj.items() if times.host_ms[stage] >= shortest}


def _steps(tokens: Tokens) -> int:
    """Decode steps of the batch: it decodes until its longest answer ends, be that a row's or that of a sample which only fills it."""
    return max(1, max(map(len, tokens.ids), default=1)) - 1


def _limit(m: Measured, limits: Limits | None) -> dict[str, Any]:
    """The batch's limit per step. Absent where nothing was decoded after the first token, or the cache does not tell its size."""
    tokens, times = m.run.tokens, m.run.times
    if limits is None or tokens is None or times is None or tokens.kv_bytes is None:
        return {}
    steps = _steps(tokens)
    decode_ms = times.host_ms.get("decode", 0.0)
    if steps < 1 or decode_ms <= 0:
        return {}
    limit = limits.limit_ms(tokens.kv_bytes, max(m.run.prompt_tokens), steps)
    return {"limit_ms": limit, "share_of_limit": limit / (decode_ms / steps)}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
