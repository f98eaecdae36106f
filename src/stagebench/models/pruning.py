"""Fewer visual tokens, without training: those that the vision tower's CLS token attends to most are kept, in their order.

The rule is FasterVLM's (Zhang et al. 2024, "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv:2412.01818):
the score of a patch is the attention that CLS pays to it in the layer whose output the projector takes, averaged over heads; the best
share of each image's (each frame's) tokens goes on to the language model. Towers without a CLS token are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stagebench.errors import ModelError

__all__ = ["ClsScores", "kept_tokens"]


class ClsScores:
    """Watches one attention layer of a tower; after each forward, `take()` gives CLS's attention to the patches.

    tower: a CLIP-like vision module. feature_layer: index into the tower's hidden states that the projector takes (-2, say).
    Raises ModelError for a tower without CLS token or with another attention than q_proj and k_proj.
    """

    def __init__(self, tower: nn.Module, feature_layer: int) -> None:
        if not any(hasattr(module, "class_embedding") for module in tower.modules()):
            raise ModelError(
                f"{type(tower).__name__} has no CLS token, by whose attention visual tokens are kept. Set variants.keep_visual: [1.0]."
            )
        stacks = [layers for m in tower.modules() if isinstance(layers := getattr(m, "layers", None), nn.ModuleList) and len(layers)]
        if len(stacks) != 1:
            raise ModelError(f"{type(tower).__name__}: {len(stacks)} stacks of layers, expected one. Set variants.keep_visual: [1.0].")
        # hidden_states[0] is the embedding, so hidden_states[i] leaves layer i - 1; counted from the end the two agree
        layer: Any = stacks[0][feature_layer if feature_layer < 0 else feature_layer - 1]
        self._attention: Any = getattr(layer, "self_attn", nn.Identity())
        if not all(hasattr(self._attention, name) for name in ("q_proj", "k_proj", "num_heads")):
            raise ModelError(f"{type(tower).__name__}: its attention has no q_proj and k_proj. Set variants.keep_visual: [1.0].")
        self._scores: torch.Tensor | None = None
        self._attention.register_forward_pre_hook(self._watch, with_kwargs=True)

    def take(self) -> torch.Tensor:
        """[images, patches] float32 of the forward just done. Raises ModelError when none was."""
        scores, self._scores = self._scores, None
        if scores is None:
            raise ModelError("visual tokens are to be kept by the tower's attention, but the tower did not run. Report this as a bug.")
        return scores

    def _watch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]  # [images, 1 + patches, C]
        attention = self._attention
        heads = int(attention.num_heads)
        query = attention.q_proj(hidden[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)  # [images, heads, 1, d]
        key = attention.k_proj(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        logits = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        self._scores = logits.softmax(-1).mean(1)[:, 0, 1:]


def kept_tokens(scores: torch.Tensor, tokens: int, keep: float) -> torch.Tensor:
    """Which of an image's `tokens` stay, [images, k] int64 in ascending order, k = round(keep * tokens), at least 1.

    scores: [images, patches]. With one token more than patches the first is CLS, which always stays. Raises ModelError otherwise.
    """
    patches = scores.shape[1]
    if tokens not in (patches, patches + 1):
        raise ModelError(
            f"{tokens} visual tokens an image for {patches} patches: pruning by CLS attention needs one a patch, with or without CLS."
        )
    count = max(1, round(keep * tokens))
    if tokens == patches:
        return scores.topk(count, dim=1).indices.sort(dim=1).values
    best = scores.topk(count - 1, dim=1).indices.sort(dim=1).values + 1
    return torch.cat([best.new_zeros(len(best), 1), best], dim=1)
