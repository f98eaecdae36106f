"""The fused step in plain torch: same order of operations, same buffers, any device. It is what the Triton step is tested
against, and what engine `fused` runs where there is no Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from stagebench.engines._state import StepState
from stagebench.engines._weights import Layer, Weights, multiply

__all__ = ["ReferenceStep"]


class ReferenceStep:
    """One token through the decoder, on a StepState's buffers.

    choose: takes logits [B, V] float32, and sets the state's next token (see `_state.choose`).
    """

    name = "torch"

    def __init__(
        self, weights: Weights, state: StepState, cos: torch.Tensor, sin: torch.Tensor, choose: Callable[[torch.Tensor], None]
    ) -> None:
        self._weights = weights
        self._state = state
        self._cos = torch.cat([cos, cos], 1)
        self._sin = torch.cat([-sin, sin], 1)  # the sign of rotate_half
        self._choose = choose
        self.logits: torch.Tensor | None = None
        self._hidden = torch.zeros(state.batch, weights.hidden, dtype=torch.float32, device=weights.embed.device)

    def begin(self) -> None:
        """The embedding of the last chosen token into the residual stream, float32."""
        self._hidden.copy_(self._weights.embed[self._state.token])

    def layers(self, which: Sequence[int]) -> None:
        for index in which:
            self._layer(index, self._weights.layers[index])

    def finish(self) -> None:
        """Final norm, head, choice, and the next token's embedding."""
        weights = self._weights
        self.logits = functional.linear(self._norm(weights.norm), weights.head).float()
        self._choose(self.logits)
        self.begin()

    def _norm(self, weight: torch.Tensor) -> torch.Tensor:
        x = self._hidden
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._weights.eps)
        return (x * scale * weight.float()).to(weight.dtype)

    def _rope(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, heads, D] at each row's own position."""
        at = self._state.positions[0]
        return x * self._cos[at][:, None] + x.roll(x.shape[-1] // 2, -1) * self._sin[at][:, None]

    def _layer(self, index: int, layer: Layer) -> None:
        w, state, hidden = self._weights, self._state, self._hidden
        heads, groups, width = w.heads, w.kv_heads, w.head_dim
        qkv = multiply(self._norm(layer.norm_in), layer.qkv, layer.qkv_bias)
        q, k, v = qkv.view(state.batch, -1, width).split([heads, groups, groups], 1)
        keys, values = state.keys[index], state.values[index]
        rows = torch.arange(state.batch, device=qkv.device)
        keys[rows, :, state.slot] = self._rope(k.float()).to(keys.dtype)
        values[rows, :, state.slot] = v
        slots = torch.arange(state.capacity, device=qkv.device)
        seen = (slots >= state.start[:, None]) & (slots <= state.slot[:, None])
        group = heads // groups
        q = (self._rope(q.float()) * w.scaling).view(state.batch, groups, group, width)
        scores = torch.einsum("bgqd,bgsd->bgqs", q, keys.float()).masked_fill(~seen[:, None, None, :], -torch.inf)
        mixed = torch.einsum("bgqs,bgsd->bgqd", scores.softmax(-1), values.float()).reshape(state.batch, -1).to(qkv.dtype)
        hidden += multiply(mixed, layer.out)
        gate, up = multiply(self._norm(layer.norm_post), layer.gate_up).float().chunk(2, -1)
        hidden += multiply((functional.silu(gate) * up).to(qkv.dtype), layer.down)
