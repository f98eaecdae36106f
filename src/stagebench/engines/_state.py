"""What stays on the device between the steps of a decode: KV cache, counters, chosen ids.

Nothing here is read by the host while tokens are produced, except `done` through `_loop.DoneFlag`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from stagebench.errors import ModelError
from stagebench.models.base import Decoding, Prompt

__all__ = ["EOS_SLOTS", "SlotCache", "StepState", "choose", "next_positions"]

EOS_SLOTS = 4
"""How many end-of-sequence ids a captured step can look for; unused ones hold -1."""


@dataclass
class StepState:
    """Device tensors of one (batch, capacity). Built inside inference_mode and only ever changed there.

    keys, values: a list over layers of [B, G, S, D]; slot S of a row holds the token at that place of its padded row.
    """

    batch: int
    capacity: int
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    token: torch.Tensor
    """[B] int64: the last chosen id."""
    ids: torch.Tensor
    """[B, S] int64: all chosen ids, in order."""
    count: torch.Tensor
    """[B] int64: how many were chosen."""
    slot: torch.Tensor
    """[B] int64, all equal: the cache slot that the next step fills."""
    start: torch.Tensor
    """[B] int64: the first slot that is not padding."""
    positions: torch.Tensor
    """[P, B] int64: the next step's position ids; P is 1, or 3 or 4 for M-RoPE models."""
    done: torch.Tensor
    """[B] int32: 1 once EOS was chosen."""
    bad: torch.Tensor
    """[B] int32: 1 once a logit was NaN or +inf."""
    eos: torch.Tensor
    """[EOS_SLOTS] int64, -1 where unused."""
    minimum: torch.Tensor
    """[1] int64: EOS is held back until this many tokens."""
    visible: torch.Tensor
    """[B, 1, 1, S] bool: slots that the next step may attend to."""
    _decoding: Decoding | None = None

    @classmethod
    def build(
        cls, *, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int, planes: int, dtype: torch.dtype, device: Any
    ) -> StepState:
        """Zeroed state; zeros matter, because masked slots still enter a product with weight 0."""

        def whole(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def cache() -> list[torch.Tensor]:
            return [torch.zeros(batch, kv_heads, capacity, head_dim, dtype=dtype, device=device) for _ in range(layers)]

        return cls(
            batch=batch,
            capacity=capacity,
            keys=cache(),
            values=cache(),
            token=whole(batch),
            ids=whole(batch, capacity),
            count=whole(batch),
            slot=whole(batch),
            start=whole(batch),
            positions=whole(planes, batch),
            done=torch.zeros(batch, dtype=torch.int32, device=device),
            bad=torch.zeros(batch, dtype=torch.int32, device=device),
            eos=torch.full((EOS_SLOTS,), -1, dtype=torch.int64, device=device),
            minimum=whole(1),
            visible=torch.zeros(batch, 1, 1, capacity, dtype=torch.bool, device=device),
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache as allocated."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def begin(self, prompt: Prompt, decoding: Decoding) -> None:
        """Set the counters to the end of this prompt: the next choice is the first new token. Never synchronises.

        Raises ModelError when the prompt and its new tokens do not fit, or there are too many EOS ids.
        """
        length = prompt.length
        if length + decoding.max_new_tokens > self.capacity:
            raise ModelError(
                f"prompt of {length} tokens and {decoding.max_new_tokens} new ones: more than the {self.capacity} slots of the cache."
                " Call admit(prompt, decoding) first, which makes a larger one."
            )
        if len(decoding.eos_token_ids) > EOS_SLOTS:
            raise ModelError(f"{len(decoding.eos_token_ids)} EOS ids, at most {EOS_SLOTS} on this engine. Use engine generate.")
        mask = prompt.attention_mask.to(torch.bool)
        self.count.zero_()
        self.done.zero_()
        self.bad.zero_()
        self.slot.fill_(length - 1)  # the choice that ends prefill moves it on
        self.start.copy_((~mask).sum(1))
        self.positions.copy_(next_positions(prompt.position_ids) - 1)
        if decoding != self._decoding:
            self._decoding = decoding
            self.minimum.fill_(decoding.min_new_tokens)
            padded = (*decoding.eos_token_ids, *([-1] * EOS_SLOTS))[:EOS_SLOTS]
            for at, eos in enumerate(padded):
                self.eos[at].fill_(eos)  # fills run on the device; a copy from pageable host memory would wait for it
        self.visible.zero_()
        self.visible[:, 0, 0, :length].copy_(mask)


def next_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """[P, B] positions of the first new token. [B, L] gives P = 1; M-RoPE planes [3|4, B, L] go on together from their
    highest, and the text plane of four (the first) goes on by itself."""
    if position_ids.dim() == 2:
        return position_ids[None, :, -1] + 1
    spatial = position_ids[-3:].amax(dim=(0, 2))[None] + 1
    planes = spatial.expand(3, -1)
    return torch.cat([position_ids[:1, :, -1] + 1, planes]) if position_ids.shape[0] == 4 else planes


def choose(state: StepState, logits: torch.Tensor, decoding: Decoding) -> None:
    """Choose each row's next id from logits [B, V], note it, and move the counters on. Device work only.

    Greedy takes torch.argmax, as `generate` does; a temperature samples on the device (its own random stream).
    """
    scores = logits.float()
    state.bad.copy_(state.bad | (torch.isnan(scores) | torch.isposinf(scores)).any(1).to(torch.int32))
    vocabulary = torch.arange(scores.shape[1], device=scores.device)
    held_back = (vocabulary[:, None] == state.eos[None, :]).any(1)[None, :] & (state.count < state.minimum)[:, None]
    scores = scores.masked_fill(held_back, -torch.inf)
    token = scores.argmax(1) if decoding.temperature <= 0 else _sample(scores, decoding)
    token = torch.where(state.done != 0, torch.zeros_like(token), token)
    state.token.copy_(token)
    state.ids.scatter_(1, state.count[:, None], token[:, None])
    stops = (token[:, None] == state.eos[None, :]).any(1)
    state.done.copy_((state.done != 0) | stops)
    state.count.add_(1)
    state.slot.add_(1)
    state.positions.add_(1)


def _sample(scores: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Nucleus sampling without leaving the device: drop the tail outside top_p, then the Gumbel form of a draw."""
    scores = torch.nan_to_num(scores, nan=0.0, posinf=1e4, neginf=-torch.inf) / decoding.temperature
    if decoding.top_p < 1:
        ordered, order = scores.sort(dim=1, descending=True)
        probability = ordered.softmax(1)
        outside = probability.cumsum(1) - probability >= decoding.top_p
        scores = scores.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), -torch.inf)
    draw = torch.empty_like(scores).exponential_()
    return (scores.softmax(1) / draw).argmax(1)


class _SlotLayer(CacheLayerMixin):
    """One layer of `SlotCache`."""

    is_sliding = False
    is_compileable = False

    def __init__(self, owner: SlotCache, index: int) -> None:
        super().__init__()
        self._owner = owner
        self._index = index
        self.is_initialized = True

    def lazy_initialization(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to do: the buffers exist."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = self._owner.state
        keys, values = state.keys[self._index], state.values[self._index]
        if self._owner.prefill:
            length = key_states.shape[-2]
            keys[:, :, :length].copy_(key_states)
            values[:, :, :length].copy_(value_states)
            # attention over the prompt alone, not over the whole capacity: that is what keeps the flash kernels usable
            return key_states, value_states
        keys.index_copy_(2, state.slot[:1], key_states)
        values.index_copy_(2, state.slot[:1], value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int, *_args: Any) -> tuple[int, int]:
        return (query_length, 0) if self._owner.prefill else (self._owner.state.capacity, 0)

    def get_seq_length(self, *_args: Any) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._owner.state.capacity

    def get_max_cache_shape(self) -> int:
        return self._owner.state.capacity


class SlotCache(Cache):
    """A transformers cache over a StepState's buffers, written at the state's own slot.

    Unlike StaticCache it keeps no counter of its own, so a captured step needs no reset between samples, and a captured
    prefill attends to its prompt only.
    """

    def __init__(self, state: StepState) -> None:
        self.state = state
        self.prefill = True
        super().__init__(layers=[_SlotLayer(self, index) for index in range(len(state.keys))])
