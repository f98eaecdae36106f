"""Engine `fused`: our own one-token step for LLaMA-family decoders, near the memory's speed.

Prefill is engine `graph`'s (the HF model, captured per exact prompt length) into the same cache; each further token is
five Triton kernels a layer in CUDA graphs (`_triton_step.py`), which read quantised weights as they are packed, and for
batches cuBLAS around our attention. Where Triton or CUDA is missing, the same step runs in plain torch. Other families
fall back to engine `graph`, and the note says so.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from stagebench.engines._graphs import Replay, capture
from stagebench.engines._reference_step import ReferenceStep
from stagebench.engines._state import choose
from stagebench.engines._stepped import Session, SteppedEngine, Unsupported
from stagebench.engines._weights import Weights, pack, rope_tables
from stagebench.engines.graph import GraphEngine
from stagebench.models.base import Decoding

__all__ = ["FusedEngine"]

_MAX_BATCH = 32


class FusedSession(Session):
    """A graph session whose step is fused."""

    def __init__(self, weights: Weights, *args: Any, config: Any = None) -> None:
        super().__init__(*args)
        self.weights = weights
        self.config = config
        state = self.state
        cos, sin = rope_tables(self.decoder, state.capacity + 1)
        if _triton_serves(self.device):
            from stagebench.engines._triton_step import StepConfig, TritonStep

            pdl = torch.cuda.get_device_capability(self.device) >= (9, 0)
            self.step: Any = TritonStep(
                weights,
                state,
                cos,
                sin,
                None if self.decoding.temperature <= 0 else self._choose_next,
                config or StepConfig.for_batch(state.batch, pdl=pdl, hidden=weights.hidden, packed=weights.packed),
                self.flag.publish,
            )
        else:
            self.step = ReferenceStep(weights, state, cos, sin, super().choose)

    def _choose_next(self, logits: torch.Tensor) -> None:
        choose(self.state, logits, self.decoding)

    def choose(self, logits: torch.Tensor) -> None:
        """The choice that ends prefill, and the embedding that the first step starts from."""
        super().choose(logits)
        self.step.begin()

    def build_step(self) -> list[Replay]:
        """Two graphs: the first eighth of the layers, which the host launches before it knows that they are wanted, and
        the rest."""
        step, count = self.step, len(self.weights.layers)
        early = max(1, count // 8) if count > 1 else 0

        def first() -> None:
            step.layers(range(early))

        def rest() -> None:
            step.layers(range(early, count))
            step.finish()

        return [capture(first, self.device, self.pool), capture(rest, self.device, self.pool)]


class FusedEngine(SteppedEngine):
    """Batches up to 32. Falls back to `graph` for other families, foreign quantisation and larger batches."""

    name = "fused"

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self._config = config
        self._weights: Weights | None = None

    def _set_up(self, model: nn.Module, decoder: Any, batch: int) -> str | None:
        if batch > _MAX_BATCH:
            raise Unsupported(f"batch {batch}, at most {_MAX_BATCH}")
        self._weights = weights = pack(model, decoder)
        if not _triton_serves(weights.embed.device):
            return "no CUDA device with Triton: the fused step runs in plain torch"
        packed = weights.packed
        if batch == 1 and packed is not None and any(w.shape[1] % packed.QUAD for w in weights.matrices):
            raise Unsupported(f"{packed.__name__} with rows that do not divide by {packed.QUAD}")
        return None

    def _make_fallback(self) -> Any:
        return GraphEngine()

    def _make_session(self, model: nn.Module, decoder: Any, batch: int, capacity: int, planes: int, decoding: Decoding) -> Session:
        if self._weights is None:
            raise Unsupported("not set up")
        return FusedSession(self._weights, model, decoder, batch, capacity, planes, decoding, config=self._config)


def _triton_serves(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None
