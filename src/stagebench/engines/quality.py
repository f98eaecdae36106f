"""How far one way of computing logits is from another, on the same inputs: beside every speed, its quality.

Free-running ids are no test in bf16 (with random weights they part after 1-36 of 45 tokens): logits are compared
position by position with the ids forced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Quality", "compare_logits"]


@dataclass(frozen=True)
class Quality:
    """A candidate's logits against a reference's."""

    positions: int
    agreement: float
    """Share of positions with the same argmax."""
    mean_kl: float
    """Mean KL(reference || candidate) in nats."""
    max_kl: float
    relative_error: float
    """Frobenius norm of the difference over that of the reference, after removing each position's mean."""


@torch.inference_mode()
def compare_logits(reference: torch.Tensor, candidate: torch.Tensor) -> Quality:
    """Both [positions, vocabulary], any float dtype; computed in float32. Raises ValueError when the shapes differ."""
    if reference.shape != candidate.shape:
        raise ValueError(f"logits of shapes {tuple(reference.shape)} and {tuple(candidate.shape)}: expected equal ones")
    reference, candidate = reference.float(), candidate.float()
    agreement = (reference.argmax(-1) == candidate.argmax(-1)).float().mean()
    log_reference, log_candidate = reference.log_softmax(-1), candidate.log_softmax(-1)
    kl = (log_reference.exp() * (log_reference - log_candidate)).sum(-1)
    centred = reference - reference.mean(-1, keepdim=True)
    difference = centred - (candidate - candidate.mean(-1, keepdim=True))
    return Quality(
        positions=int(reference.shape[0]),
        agreement=float(agreement),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        relative_error=float(difference.norm() / centred.norm()),
    )
