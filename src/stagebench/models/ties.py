"""Whether two greedy decodings of the same prompt differ only because rounding broke a tie.

Below float32 a decode step is not reproducible to the last bit on a GPU (matrix-vector products reduce in an order that may vary), so
two tokens whose logits are nearly equal can change places from run to run, and everything after that token differs. Equal ids are
therefore the test in float32 alone; elsewhere the first differing step is looked at with the model itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stagebench.models.base import Adapter, Prompt

__all__ = ["LOGIT_TOLERANCE", "PASSES", "Divergence", "first_divergence", "gap_after", "spread"]

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
"""Differences of logits that rounding explains, in units of the logits' standard deviation over the vocabulary. The two paths run the
same kernels on the same shapes; what remains is the order of operations. The mildest wrong port known (frames reversed) is at 0.18."""

PASSES = 8
"""Times that the model is asked where one pass finds no tie: that pass has the rounding of a decode too, and the mean has little of it."""


@dataclass(frozen=True)
class Divergence:
    """Where two decodings part."""

    step: int
    """Index of the first differing token; the length of the shorter when one is a prefix of the other."""
    gap: float
    """Distance of the two tokens' logits at that step, in standard deviations, mean of the passes; infinite where it cannot be read."""
    bound: float
    passes: int = 1
    scattered: float | None = None
    """Standard deviation of the passes, where it is more than rounding scatters them. Then `gap` is that of the first: a mean of eight
    makes anything small that has either sign, such as the noise of a port whose dropout is on."""

    @property
    def tie(self) -> bool:
        """Rounding explains it. Never in float32."""
        return self.gap <= self.bound

    def __str__(self) -> str:
        looked = "" if self.passes == 1 else f" in the mean of {self.passes} passes"
        if self.scattered is not None:
            looked = f" in the first of {self.passes} passes, which scatter by {self.scattered:.3g}"
        between = f"{self.gap:.3g} standard deviations between the two logits{looked}"
        return f"they part at token {self.step}, with {between} ({self.bound:.3g} is rounding)"


def first_divergence(adapter: Adapter, prompt: Prompt, a: Sequence[int], b: Sequence[int]) -> Divergence | None:
    """None for equal ids; else where they part, judged by the logits that follow the prompt and the common prefix.

    prompt: of one sample. Asks the model once, and PASSES times where that finds no tie. Never inside a timed window.
    """
    if tuple(a) == tuple(b):
        return None
    step = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    exact = adapter.spec.dtype is torch.float32
    # each of the two logits may be off by the tolerance, and in opposite directions
    bound = 0.0 if exact else 2 * LOGIT_TOLERANCE[adapter.spec.dtype]
    if exact or step >= min(len(a), len(b)):
        return Divergence(step, float("inf"), bound)
    gaps = [gap_after(adapter, prompt, a[:step], a[step], b[step])]
    if abs(gaps[0]) <= bound:
        return Divergence(step, abs(gaps[0]), bound)
    gaps += [gap_after(adapter, prompt, a[:step], a[step], b[step]) for _ in range(PASSES - 1)]
    if not all(map(math.isfinite, gaps)):
        return Divergence(step, float("inf"), bound, PASSES)
    scatter = statistics.stdev(gaps)
    if scatter > bound:
        return Divergence(step, abs(gaps[0]), bound, PASSES, scatter)
    return Divergence(step, abs(statistics.fmean(gaps)), bound, PASSES)


def gap_after(adapter: Adapter, prompt: Prompt, ids: Sequence[int], one: int, other: int) -> float:
    """Logit of the one token less that of the other after prompt and ids, in standard deviations."""
    logits = _logits_after(adapter, prompt, ids)
    return float(logits[one] - logits[other]) / (spread(logits, adapter.spec.dtype) or float("nan"))


def spread(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """Standard deviation of the logits that a model of that dtype leaves sayable: one that rules tokens out by the dtype's least number
    (Chameleon its image tokens) would else have any two logits next to each other."""
    return float(logits[logits > torch.finfo(dtype).min / 2].std())


@torch.inference_mode()
def _logits_after(adapter: Adapter, prompt: Prompt, ids: Sequence[int]) -> torch.Tensor:
    """[V] float32 that follow the prompt and these ids, token by token as a decode makes them: one pass over everything takes other
    kernels (quantised weights even other roundings), and its logits lie further off than the tie is wide."""
    model: Any = adapter.language_model()
    device = prompt.embeds.device
    output = model(
        inputs_embeds=prompt.embeds,
        attention_mask=prompt.attention_mask,
        position_ids=prompt.position_ids,
        use_cache=True,
        logits_to_keep=1,
        **{name: value for name, value in prompt.extra.items() if name != "token_type_ids"},  # its rows end with the prompt
    )
    mask, last = prompt.attention_mask, prompt.position_ids[..., -1:]
    for count, token in enumerate(ids, start=1):
        mask = torch.cat([mask, mask.new_ones((1, 1))], dim=1)
        output = model(
            input_ids=torch.tensor([[token]], dtype=torch.int64, device=device),
            attention_mask=mask,
            position_ids=last + count,
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
    logits: torch.Tensor = output.logits[0, -1].float()
    return logits
