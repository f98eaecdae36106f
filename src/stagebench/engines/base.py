"""How tokens are produced, behind one interface: an engine runs the prefill and decode stages on a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from stagebench.models.base import Adapter, Decoding, Prompt, Tokens
from stagebench.stages import StageClock


@dataclass(frozen=True)
class EngineInfo:
    """What an engine did before measuring, and what it really is."""

    name: str
    prepare_ms: dict[str, float] = field(default_factory=dict)
    """Capture and compile times by what was captured; never inside a timed window."""
    note: str | None = None
    """What the engine fell back to, and why."""


@dataclass
class State:
    """After prefill: a KV cache and the first token."""

    cache: Any
    logits: torch.Tensor
    """[B, V] of the last prompt position."""
    first_ids: torch.Tensor
    """[B] int64."""
    prompt: Prompt


class Engine(Protocol):
    """One way to turn an embedded prompt into tokens."""

    name: str

    def prepare(self, adapter: Adapter, decoding: Decoding, batch: int) -> EngineInfo:
        """Capture or compile for this model. Called once before warm-up."""

    def run(self, merge: Callable[[], Prompt], decoding: Decoding, clock: StageClock) -> Tokens:
        """Run the `prefill` stage (merge included) and the `decode` stage; every token after the first is noted by `clock.token()`.

        The stages must be opened and closed here; `decode` is opened also when no token follows the first.
        """
