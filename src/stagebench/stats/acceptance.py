"""How far two models' outputs agree, token by token, and what speculative decoding would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Acceptance", "acceptance", "speculative_speedup"]


@dataclass(frozen=True)
class Acceptance:
    """Agreement of a draft's and a target's free-running greedy outputs over the same samples."""

    n: int
    per_sample: tuple[float, ...]
    """Share of equal positions over the shorter output, one a sample."""
    position_share: float | None
    """Equal positions over compared positions, all samples together (weighted by length)."""
    prefix_mean: float | None
    """Mean length of the longest common prefix, in tokens."""
    prefix_lengths: tuple[int, ...]
    alpha: float | None
    """Chance that a draft token is accepted given that all before it were: common-prefix tokens over the trials that they took. It is
    what a speculative decoder's first round meets; agreement after the first difference says nothing about acceptance."""
    by_position: tuple[float, ...]
    """Share of samples whose outputs agree at position 0, 1, ... (of those that have that position)."""


def acceptance(
    draft: Sequence[Sequence[int]], target: Sequence[Sequence[int]], *, draft_tokenizer: str, target_tokenizer: str, bos: int | None = None
) -> Acceptance:
    """Compare token ids of the same samples in the same order.

    draft_tokenizer, target_tokenizer: digests of the tokenizers. bos: the tokenizer's BOS, for outputs of a
    library that puts it in front of what was generated: taken off where both outputs of a sample begin with it. Rows hold generated ids
    only, so it is not given for them: their first id, whatever its number, was chosen by the model.
    Raises ValueError when the digests differ (equal ids would not be equal text) or the numbers of samples differ.
    """
    if draft_tokenizer != target_tokenizer:
        raise ValueError(
            f"acceptance: tokenizers {draft_tokenizer[:12]} and {target_tokenizer[:12]} differ, so equal ids are not equal text. "
            "Compare models of one tokenizer."
        )
    if len(draft) != len(target):
        raise ValueError(f"acceptance: {len(draft)} draft outputs against {len(target)}: pair them by sample first")
    shares: list[float] = []
    prefixes: list[int] = []
    equal = compared = trials = 0
    hits: list[int] = []
    seen: list[int] = []
    for one, other in zip(draft, target, strict=True):
        begin = int(bos is not None and list(one[:1]) == list(other[:1]) == [bos])
        same = [a == b for a, b in zip(one[begin:], other[begin:], strict=False)]
        if not same:
            continue
        prefix = same.index(False) if False in same else len(same)
        shares.append(sum(same) / len(same))
        prefixes.append(prefix)
        equal += sum(same)
        compared += len(same)
        trials += min(prefix + 1, len(same))
        for position, hit in enumerate(same):
            if position == len(hits):
                hits.append(0)
                seen.append(0)
            hits[position] += hit
            seen[position] += 1
    return Acceptance(
        n=len(shares),
        per_sample=tuple(shares),
        position_share=equal / compared if compared else None,
        prefix_mean=sum(prefixes) / len(prefixes) if prefixes else None,
        prefix_lengths=tuple(prefixes),
        alpha=sum(prefixes) / trials if trials else None,
        by_position=tuple(h / s for h, s in zip(hits, seen, strict=True)),
    )


def speculative_speedup(alpha: float, gamma: int, cost: float) -> float:
    """Computed, not measured: speed-up of speculative decoding over the target alone (Leviathan et al. 2023, theorem 3.8).

    alpha: chance that a draft token is accepted, in [0, 1]. gamma: drafts a round. cost: draft's ms/token over the target's.
    Assumes acceptance independent between positions and a check of gamma + 1 tokens that costs one target step.
    """
    if not 0 <= alpha <= 1 or gamma < 1 or cost < 0:
        raise ValueError(f"speculative_speedup(alpha={alpha}, gamma={gamma}, cost={cost}): expected alpha in [0, 1], gamma >= 1, cost >= 0")
    expected = gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)
    return expected / (gamma * cost + 1)
