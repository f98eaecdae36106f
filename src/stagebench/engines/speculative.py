"""Engine `speculative`: a smaller language model guesses, the model checks (Leviathan et al. 2023; greedy form).

The draft reads the prompt's text without the visual tokens, as Gagrani et al. 2024 ("On Speculative Decoding for Multimodal Large
Language Models", arXiv:2404.08856) found sufficient, so that no second vision tower runs. Its prefill is part of the prefill stage and
its steps part of decode: what is measured is what a user waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stagebench.engines.ahead import AheadEngine, crop, greedy
from stagebench.errors import ModelError
from stagebench.models.base import Adapter

__all__ = ["GUESSES", "SpeculativeEngine"]

GUESSES = 5
"""Tokens drafted a round."""


class SpeculativeEngine(AheadEngine):
    """The draft is the adapter's `draft`: another loaded adapter with an equal tokenizer (models.<name>.draft)."""

    name = "speculative"

    def _set_up(self, adapter: Adapter) -> str | None:
        draft: Adapter | None = getattr(adapter, "draft", None)
        if draft is None:
            raise ModelError("engine speculative needs a draft model. Set models.<name>.draft: {weights: ..., preset: ...}.")
        if draft.tokenizer_digest() != adapter.tokenizer_digest():
            raise ModelError(
                f"the draft {draft.revision()} has another tokenizer than {adapter.revision()}, so its ids are other words. "
                "Set models.<name>.draft to a model with an equal tokenizer."
            )
        self._draft: Any = draft.language_model()
        self._cache: Any = None
        return f"draft {draft.revision()} ({draft.spec.architecture}), text only, {GUESSES} tokens a round"

    def begin(self, history: list[int]) -> None:
        self._cache, self._held, self._fed = None, 0, list[int]()
        if len(history) > 1:
            self._feed(history[:-1])  # the last one goes in with the first proposal

    def propose(self, history: list[int], most: int, hold_back: Sequence[frozenset[int]]) -> list[int]:
        count = min(GUESSES, most)
        if count < 1:
            return []
        # guesses of the last round that were rejected go; those that were accepted are in history and in the cache already
        self._held = min(self._held, self._agreed(history), len(history) - 1)
        if self._cache is not None:
            crop(self._cache, self._held)
        self._fed = history[: self._held]
        logits = self._feed(history[self._held :])
        guesses = []
        for step in range(count):
            choice, _ = greedy(logits, [hold_back[step]])
            guesses.append(choice)
            if step + 1 < count:
                logits = self._step(choice)
        found = [int(i) for i in torch.cat(guesses).tolist()]  # the only wait for the device
        self._fed += found[:-1]
        return found

    def _agreed(self, history: list[int]) -> int:
        """How many of the tokens in the draft's cache are still the text's."""
        return next((i for i, (a, b) in enumerate(zip(self._fed, history, strict=False)) if a != b), min(len(self._fed), len(history)))

    def _feed(self, ids: list[int]) -> torch.Tensor:
        if self._held == 0:
            self._fed = []
        self._fed += ids
        return self._step(torch.tensor(ids, device=self._draft.device))

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [n] through the draft; logits [1, V] of the last."""
        at = torch.arange(self._held, self._held + len(ids), device=ids.device)[None]
        output = self._draft(
            input_ids=ids[None],
            position_ids=at,
            attention_mask=torch.ones((1, self._held + len(ids)), dtype=torch.int64, device=ids.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        self._held += len(ids)
        return output.logits[0, -1:]
