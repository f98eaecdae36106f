"""The decode loop: replays steps, and learns of EOS without stalling the device.

A step is a list of parts. For natural lengths the first part of step n+1 is launched before the host has heard whether
step n ended the sequence; while the device works on it, the host reads the flag that step n left in pinned memory, and
launches the rest only when there is something left to do. The overshoot is therefore at most that first part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stagebench.engines._graphs import Replay
from stagebench.engines._state import StepState
from stagebench.models.base import Decoding, Tokens
from stagebench.stages import StageClock

__all__ = ["DoneFlag", "collect", "decode"]


class DoneFlag:
    """A host copy of `StepState.done`, written by the device at the end of each choice."""

    def __init__(self, state: StepState) -> None:
        self._cuda = state.done.is_cuda
        self._source = state.done
        self._host = torch.zeros(state.batch, dtype=torch.int32, pin_memory=self._cuda) if self._cuda else state.done
        self._event: Any = None

    def publish(self) -> None:
        """Device work: call it inside the captured function, after the choice."""
        if self._cuda:
            self._host.copy_(self._source, non_blocking=True)

    def mark(self) -> None:
        """Note the point in the stream after which the flag is there."""
        if self._cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def all_done(self) -> bool:
        """Wait for the last mark; True when every row has ended."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host.all())


def decode(parts: Sequence[Replay], flag: DoneFlag, decoding: Decoding, clock: StageClock) -> int:
    """Replay steps until every row has ended or max_new_tokens are there (the first one is, from prefill).

    Returns the number of tokens that the longest row may hold.
    """
    watch = bool(decoding.eos_token_ids) and not decoding.fixed
    for produced in range(1, decoding.max_new_tokens):
        rest = parts
        if watch:
            if len(parts) > 1:
                parts[0]()
                rest = parts[1:]
            if flag.all_done():
                return produced
        for part in rest:
            part()
        if watch:
            flag.mark()
        clock.token()
    return decoding.max_new_tokens


def collect(state: StepState, prompt_length: int, produced: int, decoding: Decoding) -> Tokens:
    """Ids to the host, cut at EOS. Waits for the device. `kv_bytes` counts the slots in use, as a growing cache would hold them."""
    ids = []
    for row in state.ids[:, :produced].tolist():
        end = next((at + 1 for at, token in enumerate(row) if token in decoding.eos_token_ids), len(row))
        ids.append(tuple(row[:end]))
    reasons = tuple("eos" if row and row[-1] in decoding.eos_token_ids else "length" for row in ids)
    return Tokens(ids=tuple(ids), finish_reasons=reasons, kv_bytes=state.kv_bytes // state.capacity * (prompt_length + produced - 1))
