"""Whether two greedy decodings of the same prompt differ only because rounding broke a tie.

Below float32 a decode step is not reproducible to the last bit on a GPU (matrix-vector products reduce in an order that may vary), so
two tokens whose logits are nearly equal can change places from run to run, and everything after that token differs. Equal ids are
therefore the test in float32 alone; elsewhere the first differing step is looked at with the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stagebench.models.base import Adapter, Prompt

__all__ = ["LOGIT_TOLERANCE", "Divergence", "first_divergence"]

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
"""Differences of logits that rounding explains, in units of the logits' standard deviation over the vocabulary. The two paths run the
same kernels on the same shapes; what remains is the order of operations. The mildest wrong port known (frames reversed) is at 0.18."""


@dataclass(frozen=True)
class Divergence:
    """Where two decodings part."""

    step: int
    """Index of the first differing token; the length of the shorter when one is a prefix of the other."""
    gap: float
    """Logit of the one token less that of the other at that step, in standard deviations; infinite where it cannot be read."""
    bound: float

    @property
    def tie(self) -> bool:
        """Rounding explains it. Never in float32."""
        return self.gap <= self.bound

    def __str__(self) -> str:
        return (
            f"they part at token {self.step}, with {self.gap:.3g} standard deviations between the two logits ({self.bound:.3g} is rounding)"
        )


def first_divergence(adapter: Adapter, prompt: Prompt, a: Sequence[int], b: Sequence[int]) -> Divergence | None:
    """None for equal ids; else where they part, judged by one teacher-forced forward over the prompt and the common prefix.

    prompt: of one sample. Never inside a timed window.
    """
    if tuple(a) == tuple(b):
        return None
    step = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    exact = adapter.spec.dtype is torch.float32
    bound = 0.0 if exact else LOGIT_TOLERANCE[adapter.spec.dtype]
    if exact or step >= min(len(a), len(b)):
        return Divergence(step, float("inf"), bound)
    model: Any = adapter.language_model()
    with torch.inference_mode():
        tail = model.get_input_embeddings()(torch.tensor([list(a[:step])], dtype=torch.int64, device=prompt.embeds.device))
        embeds = torch.cat([prompt.embeds, tail.to(prompt.embeds.dtype)], dim=1)
        mask = torch.cat([prompt.attention_mask, prompt.attention_mask.new_ones((1, step))], dim=1)
        last = prompt.position_ids[..., -1:]
        positions = torch.cat([prompt.position_ids, last + torch.arange(1, step + 1, device=last.device)], dim=-1)
        extra = {k: v for k, v in prompt.extra.items() if k != "token_type_ids"}  # its rows end with the prompt
        output = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1, **extra)
    logits = output.logits[0, -1].float()
    return Divergence(step, float((logits[a[step]] - logits[b[step]]).abs() / logits.std()), bound)
