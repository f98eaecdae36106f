"""Where a difference in total time comes from: an exact split into stages, number of tokens, and ms a token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["PARTS", "Decomposition", "decompose"]

PARTS = ("load", "preprocess", "h2d", "encode", "prefill", "tokens", "ms_per_token", "residual")
"""What a total divides into. decode = steps x ms a token, so its difference divides into `tokens` and `ms_per_token`."""

_STAGES = ("load", "preprocess", "h2d", "encode", "prefill")


@dataclass(frozen=True)
class Decomposition:
    """Mean over pairs; both columns sum to their whole."""

    ms: dict[str, float]
    """Part -> mean difference in ms (model - reference); sums to `total_ms`."""
    log: dict[str, float]
    """Part -> contribution to the mean log ratio; sums to `total_log`, so that the product of exp() is the geometric-mean ratio."""
    total_ms: float
    total_log: float
    n: int

    def factors(self) -> dict[str, float]:
        """Part -> factor; their product is the geometric-mean ratio."""
        return {part: math.exp(value) for part, value in self.log.items()}


def decompose(model: Mapping[str, npt.ArrayLike], reference: Mapping[str, npt.ArrayLike]) -> Decomposition:
    """Split total(model) against total(reference), pair by pair, exactly.

    model, reference: columns [n] `load_ms ... decode_ms`, `total_ms` (ms) and `new_tokens`, the same samples in the same order.

    * A stage contributes its own difference. decode = s * m with s = new_tokens - 1 steps and m ms a step: the difference is
      (s_a - s_b) (m_a + m_b) / 2 + (m_a - m_b) (s_a + s_b) / 2, which is exact and treats both models alike (the Shapley split of
      a product). A model without a step has no m: the other's is taken, and all of it is `tokens`.
    * The log ratio of a pair divides in proportion to the ms differences: each part's difference over the logarithmic mean of the two
      totals (Ang's additive LMDI), exact again.

    Raises ValueError for unequal lengths, or no pairs.
    """
    a, b = ({name: np.asarray(column, dtype=np.float64) for name, column in side.items()} for side in (model, reference))
    n = len(a["total_ms"])
    if n == 0 or any(len(column) != n for side in (a, b) for column in side.values()):
        raise ValueError("decompose: expected columns of one length, at least one pair: pair the samples first")
    difference = {stage: a[f"{stage}_ms"] - b[f"{stage}_ms"] for stage in _STAGES}
    steps_a, steps_b = (np.maximum(side["new_tokens"] - 1, 0) for side in (a, b))
    pace_a, pace_b = _pace(a["decode_ms"], steps_a), _pace(b["decode_ms"], steps_b)
    pace_a, pace_b = np.where(np.isnan(pace_a), pace_b, pace_a), np.where(np.isnan(pace_b), pace_a, pace_b)
    pace_a, pace_b = np.nan_to_num(pace_a), np.nan_to_num(pace_b)
    difference["tokens"] = (steps_a - steps_b) * (pace_a + pace_b) / 2
    # by subtraction, so that a decode stage without a step still adds up
    difference["ms_per_token"] = (a["decode_ms"] - b["decode_ms"]) - difference["tokens"]
    whole = a["total_ms"] - b["total_ms"]
    rest = whole - sum(difference.values())
    # what rounding alone leaves is nothing
    difference["residual"] = np.where(np.abs(rest) < 1e-12 * (a["total_ms"] + b["total_ms"]), 0.0, rest)
    log_ratio = np.log(a["total_ms"]) - np.log(b["total_ms"])
    near = np.abs(whole) < 1e-9 * b["total_ms"]
    # 1 / logarithmic mean; its limit for equal totals is 1 / total
    weight = np.where(near, 1 / b["total_ms"], log_ratio / np.where(near, 1.0, whole))
    return Decomposition(
        ms={part: float(difference[part].mean()) for part in PARTS},
        log={part: float((difference[part] * weight).mean()) for part in PARTS},
        total_ms=float(whole.mean()),
        total_log=float(log_ratio.mean()),
        n=n,
    )


def _pace(decode_ms: npt.NDArray[np.float64], steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """ms a step, NaN where no step was taken."""
    return np.where(steps > 0, decode_ms / np.maximum(steps, 1), np.nan)
