"""Engine `graph`: the HF model's own prefill and one-token step, captured in CUDA graphs over a static cache.

The arithmetic is the model's; what goes away is the host's work between kernels. Prefill is captured per exact prompt
length, the step per cache capacity (multiples of 256 slots), in two graphs so that EOS is noticed without a stall.
"""

from __future__ import annotations

from stagebench.engines._stepped import SteppedEngine

__all__ = ["GraphEngine"]


class GraphEngine(SteppedEngine):
    """Falls back to `generate` for sliding windows, linear attention and attention kernels that cannot be captured."""

    name = "graph"
