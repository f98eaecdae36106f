"""What a linear of the fused step has to give, in float64."""

import torch
from torch.nn.functional import silu


def in_float64(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 1e-5,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """(onto +) act(w @ rmsnorm(x) + bias), float64 [B, N], for x [B, K], w [N, K] (gated: [2N, K])."""
    given = x.double()
    if norm is not None:
        given = given / (given.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    want = given @ w.double().T
    if gated:
        gate, up = want.chunk(2, -1)
        want = silu(gate) * up
    for added in (onto, bias):
        if added is not None:
            want = want + added.double()
    return want


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """Length of the difference over that of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())
