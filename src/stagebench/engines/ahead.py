"""Engines that guess several tokens ahead and let the model check them in one forward: the loop that they share.

Greedy only, one sample at a time. The model looks at its last token and the guesses at once; guesses are kept as far as they are its own
choices, and its own choice follows them, so the text is the one that plain greedy decoding gives (in float32; below, two forwards of
different widths may round a tie differently). transformers' assisted generation is not used: it takes its history from input_ids, which a
prompt of embeddings does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from stagebench.engines._state import next_positions
from stagebench.engines.base import EngineInfo
from stagebench.engines.generate import GenerateEngine, cache_bytes
from stagebench.errors import ModelError
from stagebench.models.base import Adapter, Decoding, Prompt, Tokens
from stagebench.stages import StageClock

__all__ = ["AheadEngine", "crop", "greedy", "history_of"]


class AheadEngine:
    """A subclass proposes tokens; what the model accepts is recorded in `Tokens.drafted` and `Tokens.accepted`."""

    name = "ahead"

    def __init__(self) -> None:
        self._model: Any = None
        self._fallback: GenerateEngine | None = None

    def prepare(self, adapter: Adapter, decoding: Decoding, batch: int) -> EngineInfo:
        """Falls back to engine generate, and says so, for batches, sampling, and caches that cannot be cut back."""
        model: Any = adapter.language_model()
        reason = _refusal(model, decoding, batch)
        if reason is not None:
            self._fallback = GenerateEngine()
            info = self._fallback.prepare(adapter, decoding, batch)
            return replace(info, name=self.name, note=f"{self.name} falls back to generate: {reason}")
        self._fallback, self._model = None, model
        return EngineInfo(self.name, note=self._set_up(adapter))

    def _set_up(self, adapter: Adapter) -> str | None:
        """What the subclass needs of the adapter; returns the note."""
        return None

    def begin(self, history: list[int]) -> None:
        """A new sample, whose prompt has this text. Inside the prefill stage."""
        raise NotImplementedError

    def propose(self, history: list[int], most: int, hold_back: Sequence[frozenset[int]]) -> list[int]:
        """At most `most` guesses that go on from `history`. hold_back[i]: ids that the i-th may not be. Inside the decode stage."""
        raise NotImplementedError

    @torch.inference_mode()
    def run(self, merge: Callable[[], Prompt], decoding: Decoding, clock: StageClock) -> Tokens:
        """Prefill and decode on the clock. Raises ModelError when `prepare` was not called."""
        if self._fallback is not None:
            return self._fallback.run(merge, decoding, clock)
        if self._model is None:
            raise ModelError(f"engine {self.name} ran before prepare: call prepare(adapter, decoding, batch) once per model")
        clock.begin("prefill")
        prompt = merge()
        history = history_of(prompt)
        self.begin(history)
        output = self._model(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{key: value for key, value in prompt.extra.items() if key != "input_ids"},
        )
        cache = output.past_key_values
        choices, bad = greedy(output.logits[0], [_held_back(decoding, 0)])
        ids = choices.tolist()
        history += ids
        clock.switch("decode")
        drafted = accepted = 0
        positions = next_positions(prompt.position_ids)  # [P, 1]
        while len(ids) < decoding.max_new_tokens and ids[-1] not in decoding.eos_token_ids:
            room = decoding.max_new_tokens - len(ids) - 1
            holds = [_held_back(decoding, len(ids) + i) for i in range(room + 1)]
            guesses = self.propose(history, room, holds)[:room]
            width = 1 + len(guesses)
            at = positions[:, :, None] + torch.arange(len(ids) - 1, len(ids) - 1 + width, device=positions.device)
            output = self._model(
                input_ids=torch.tensor([[ids[-1], *guesses]], device=positions.device),
                attention_mask=prompt.attention_mask.new_ones((1, prompt.length + len(ids) - 1 + width)),
                position_ids=at[0] if len(at) == 1 else at,
                past_key_values=cache,
                use_cache=True,
            )
            choices, poor = greedy(output.logits[0, -width:], holds[:width])
            bad = bad | poor
            own = choices.tolist()
            right = next((i for i, guess in enumerate(guesses) if guess != own[i]), len(guesses))
            new = own[: right + 1]
            end = next((i + 1 for i, token in enumerate(new) if token in decoding.eos_token_ids), len(new))
            drafted, accepted = drafted + len(guesses), accepted + right
            ids += new[:end]
            history += new[:end]
            crop(cache, prompt.length + len(ids) - 1)
            for _ in new[:end]:
                clock.token()
        clock.end()
        reason = "eos" if ids[-1] in decoding.eos_token_ids else "length"
        return Tokens((tuple(ids),), (reason,), cache_bytes(cache), bool(bad.item()), drafted, accepted)


def greedy(logits: torch.Tensor, hold_back: Sequence[frozenset[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row-wise argmax of [n, V] with each row's ids held back, [n] int64, and whether any logit was NaN or +inf."""
    scores = logits.float()
    bad = ~torch.isfinite(scores.amax())
    if any(hold_back):
        scores = scores.clone()
        for row, held in enumerate(hold_back[: len(scores)]):
            for token in held:
                scores[row, token] = -torch.inf
    return scores.argmax(-1), bad


def crop(cache: Any, length: int) -> None:
    """Forget all positions from `length` on. (transformers' own `crop` changed its meaning between 5.17 and 5.23.)"""
    for layer in cache.layers:
        if layer.keys.shape[-2] > length:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def history_of(prompt: Prompt) -> list[int]:
    """The prompt's text as ids, without placeholders; empty when the adapter does not say."""
    if prompt.text_ids is None:
        return []
    return [i for i in prompt.text_ids[0].tolist() if i >= 0 and i != prompt.placeholder_id]


def _held_back(decoding: Decoding, index: int) -> frozenset[int]:
    """EOS until min_new_tokens are there; `index` counts new tokens from 0."""
    return frozenset(decoding.eos_token_ids) if index < decoding.min_new_tokens else frozenset()


def _refusal(model: Any, decoding: Decoding, batch: int) -> str | None:
    if batch > 1:
        return f"batch {batch}, one sample at a time is guessed for"
    if decoding.temperature > 0:
        return f"temperature {decoding.temperature:g}, guesses are checked greedily"
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return f"layers of {', '.join(sorted(kinds))}, whose cache cannot be cut back" if kinds else None
