"""Teacher forcing: what a model makes of an answer that is given, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stagebench.engines.generate import generation_config
from stagebench.models.base import Adapter, Decoding, Prompt

__all__ = ["forced_logits", "greedy_answer"]


@torch.inference_mode()
def greedy_answer(adapter: Adapter, prompt: Prompt, tokens: int) -> tuple[int, ...]:
    """Exactly `tokens` ids by the model's own `generate`. prompt: of one sample."""
    model: Any = adapter.language_model()
    given = {"inputs_embeds": prompt.embeds, "attention_mask": prompt.attention_mask, "position_ids": prompt.position_ids}
    config = generation_config(Decoding(tokens, tokens, adapter.eos_token_ids()))
    ids = model.generate(**given, **prompt.extra, generation_config=config).sequences[0].tolist()
    return tuple(ids[-tokens:])


@torch.inference_mode()
def forced_logits(adapter: Adapter, prompt: Prompt, ids: Sequence[int]) -> torch.Tensor:
    """[len(ids), V] float32: what the model would have chosen each of `ids` from, given the prompt and the ids before."""
    model: Any = adapter.language_model()
    count = len(ids) - 1
    tail = model.get_input_embeddings()(torch.tensor([list(ids[:-1])], dtype=torch.int64, device=prompt.embeds.device))
    last = prompt.position_ids[..., -1:]
    output = model(
        inputs_embeds=torch.cat([prompt.embeds, tail.to(prompt.embeds.dtype)], dim=1),
        attention_mask=torch.cat([prompt.attention_mask, prompt.attention_mask.new_ones((1, count))], dim=1),
        position_ids=torch.cat([prompt.position_ids, last + torch.arange(1, count + 1, device=last.device)], dim=-1),
        use_cache=False,
        logits_to_keep=len(ids),
    )
    return output.logits[0].float()
