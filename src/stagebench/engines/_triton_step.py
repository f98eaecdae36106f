"""The fused step in Triton: five kernels a layer, one for the head and one for the choice.

Batch 1: rmsnorm+QKV, attention (RoPE, cache write, split over the context, combined by the last to arrive), output projection
into the residual stream, rmsnorm+gate/up+SiLU, down projection into the residual stream. The residual stream is float32.
Larger batches take the library's matrix products between the same attention and choice; see docs/engines.md for why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from stagebench.engines import _kernels_decode
from stagebench.engines._launch import Form, Linear, dependent, launch_linear, multiprocessors
from stagebench.engines._state import EOS_SLOTS, StepState
from stagebench.engines._weights import Weights
from stagebench.models._packed import Int4Linear, Int8Linear, Nf4Linear, PackedLinear

__all__ = ["StepConfig", "TritonStep", "default_splits"]

_LOG2_E = math.log2(math.e)
_LIBRARY = Linear("cublas", 0, 0, 0, 0)
_WIDEST = 4096
"""A persistent program keeps a row of this many inputs in its registers; wider ones spill."""


_FOUR_BIT = (Linear("persistent", 4, 0, 4, 4), Linear("persistent", 4, 0, 4, 4), Linear("persistent", 2, 0, 4, 4))
_PACKED: dict[type[PackedLinear], tuple[Linear, Linear, Linear, Linear]] = {
    Int8Linear: (
        Linear("persistent", 4, 0, 8, 4),
        Linear("persistent", 8, 0, 8, 2),
        Linear("persistent", 2, 0, 4, 4),
        Linear("rows", 8, 2048, 4, 0),
    ),
    Int4Linear: (*_FOUR_BIT, Linear("rows", 4, 4096, 4, 0)),
    Nf4Linear: (*_FOUR_BIT, Linear("rows", 4, 2048, 2, 0)),
}
"""qkv, out, gate_up, down for packed weights at batch 1."""


@dataclass(frozen=True)
class StepConfig:
    """Launch settings of a whole step."""

    qkv: Linear = field(default_factory=Linear)
    out: Linear = field(default_factory=Linear)
    gate_up: Linear = field(default_factory=lambda: Linear(block_n=2))
    down: Linear = field(default_factory=Linear)
    head: Linear = field(default_factory=Linear)
    splits: int | None = None
    """Programs that share one head's context; by default from capacity and batch."""
    block_s: int = 32
    attention_warps: int = 2
    pdl: bool = True
    """Programmatic dependent launch (compute capability 9.0 and up)."""

    @classmethod
    def for_batch(cls, batch: int, *, pdl: bool, hidden: int = _WIDEST, packed: type[PackedLinear] | None = None) -> StepConfig:
        """The settings that won on an H200 (docs/engines.md), for this batch, width and kind of packed weights.

        One sample: our matrix-vector kernels. More: cuBLAS, which was faster than our skinny product at every batch.
        """
        if batch > 1:
            return cls(_LIBRARY, _LIBRARY, _LIBRARY, _LIBRARY, _LIBRARY, pdl=pdl)
        head = Linear("rows", 2, 4096, 4, 0)
        if packed is not None:
            return cls(*_PACKED[packed], head, pdl=pdl)
        rows = Linear("rows", 4, 1024, 4, 0)
        if hidden > _WIDEST or hidden & (hidden - 1):  # a row does not fill a power of two of registers
            return cls(qkv=rows, out=rows, gate_up=Linear("rows", 2, 1024, 4, 0), down=rows, head=rows, pdl=pdl)
        return cls(
            qkv=Linear("persistent", 4, 0, 8, 2),
            out=Linear("persistent", 4, 0, 8, 2),
            gate_up=Linear("persistent", 2, 0, 8, 2),
            down=rows,
            head=head,
            pdl=pdl,
        )


class TritonStep:
    """One token through the decoder. `choose`: None for the greedy kernel, or a function of logits [B, V] float32."""

    name = "triton"

    def __init__(
        self,
        weights: Weights,
        state: StepState,
        cos: torch.Tensor,
        sin: torch.Tensor,
        choose: Callable[[torch.Tensor], None] | None,
        config: StepConfig,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.weights, self.state, self.config = weights, state, config
        self._cos, self._sin, self._choose, self._after = cos, sin, choose, after
        device, dtype, b = weights.embed.device, weights.embed.dtype, state.batch
        self._splits = config.splits or default_splits(state.capacity, b * weights.heads, multiprocessors(device))
        vectors = weights.heads + 2 * weights.kv_heads

        def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        self.hidden = empty(b, weights.hidden, kind=torch.float32)
        self._qkv = empty(b, vectors * weights.head_dim)
        self._mixed = empty(b, weights.heads * weights.head_dim)
        self._active = empty(b, weights.layers[0].down.shape[1])
        self.logits = empty(b, weights.head.shape[0], kind=torch.float32)
        self._partial = empty(b, weights.heads, self._splits, weights.head_dim, kind=torch.float32)
        self._weight = empty(b, weights.heads, self._splits, 2, kind=torch.float32)
        self._arrived = torch.zeros(b, weights.heads, dtype=torch.int32, device=device)

    def begin(self) -> None:
        """The embedding of the last chosen token into the residual stream; `finish` does it for the next step itself."""
        self.hidden.copy_(self.weights.embed[self.state.token])

    def layers(self, which: Sequence[int]) -> None:
        config, eps, pdl = self.config, self.weights.eps, self.config.pdl
        for index in which:
            layer = self.weights.layers[index]
            launch_linear(config.qkv, self.hidden, layer.qkv, self._qkv, Form(norm=layer.norm_in, eps=eps, bias=layer.qkv_bias, pdl=pdl))
            self.attend(index)
            launch_linear(config.out, self._mixed, layer.out, self.hidden, Form(residual=True, pdl=pdl))
            launch_linear(
                config.gate_up, self.hidden, layer.gate_up, self._active, Form(norm=layer.norm_post, eps=eps, gated=True, pdl=pdl)
            )
            launch_linear(config.down, self._active, layer.down, self.hidden, Form(residual=True, pdl=pdl))

    def attend(self, index: int) -> None:
        w, state, config = self.weights, self.state, self.config
        _kernels_decode.attend[(w.heads, self._splits, state.batch)](
            self._qkv,
            state.keys[index],
            state.values[index],
            self._cos,
            self._sin,
            state.slot,
            state.start,
            state.positions,
            self._partial,
            self._weight,
            self._arrived,
            self._mixed,
            state.capacity,
            w.scaling * _LOG2_E,
            H=w.heads,
            G=w.kv_heads,
            D=w.head_dim,
            SPLITS=self._splits,
            BLOCK_S=config.block_s,
            PDL=config.pdl,
            num_warps=config.attention_warps,
            **dependent(config.pdl),
        )

    def finish(self) -> None:
        """Final norm, head, choice, and the next token's embedding."""
        w, config = self.weights, self.config
        launch_linear(config.head, self.hidden, w.head, self.logits, Form(norm=w.norm, eps=w.eps, pdl=config.pdl))
        if self._choose is None:
            self.select()
        else:
            self._choose(self.logits)
            self.begin()
        self._after()

    def select(self) -> None:
        state, pdl = self.state, self.config.pdl
        _kernels_decode.select[(state.batch,)](
            self.logits,
            self.weights.embed,
            self.hidden,
            state.token,
            state.ids,
            state.count,
            state.slot,
            state.positions,
            state.done,
            state.bad,
            state.eos,
            state.minimum,
            self.logits.shape[1],
            self.weights.hidden,
            state.capacity,
            EOS=EOS_SLOTS,
            BLOCK_V=4096,
            BLOCK_K=1024,
            PDL=pdl,
            num_warps=16,
            **dependent(pdl),
        )


def default_splits(capacity: int, heads: int, multiprocessors: int) -> int:
    """A power of two: about four programs a multiprocessor, none with fewer than 32 slots."""
    wanted = max(1, min(4 * multiprocessors // heads, capacity // 32, 64))
    return 1 << (wanted.bit_length() - 1)
