"""The fused step in Triton: five kernels a layer, one for the head and one for the choice.

Batch 1: rmsnorm+QKV, attention (RoPE, cache write, split over the context, combined by the last to arrive), output projection
into the residual stream, rmsnorm+gate/up+SiLU, down projection into the residual stream. The residual stream is float32.
Larger batches take the library's matrix products between the same attention and choice; see docs/engines.md for why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from stagebench.engines import _kernels_decode, _kernels_linear
from stagebench.engines._state import EOS_SLOTS, StepState
from stagebench.engines._weights import Weights

__all__ = ["Linear", "StepConfig", "TritonStep", "default_splits", "launch_linear"]

_LOG2_E = math.log2(math.e)
_GATE_BLOCK = 1024


@dataclass(frozen=True)
class Linear:
    """How one linear of the step is launched."""

    kind: str = "rows"
    """rows | pipelined | persistent (batch 1); cublas (any batch)."""
    block_n: int = 4
    block_k: int = 1024
    warps: int = 4
    stages: int = 3
    """Depth of the software pipeline (pipelined); programs per multiprocessor (persistent)."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.block_n}x{self.block_k}w{self.warps}s{self.stages}"


_LIBRARY = Linear("cublas", 0, 0, 0, 0)
_WIDEST = 4096
"""A persistent program keeps a row of this many inputs in its registers; wider ones spill."""


@dataclass(frozen=True)
class StepConfig:
    """Launch settings of a whole step."""

    qkv: Linear = field(default_factory=Linear)
    out: Linear = field(default_factory=Linear)
    gate_up: Linear = field(default_factory=lambda: Linear(block_n=2))
    down: Linear = field(default_factory=Linear)
    head: Linear = field(default_factory=Linear)
    splits: int | None = None
    """Programs that share one head's context; by default from capacity and batch."""
    block_s: int = 64
    attention_warps: int = 4
    pdl: bool = True
    """Programmatic dependent launch (compute capability 9.0 and up)."""

    @classmethod
    def for_batch(cls, batch: int, *, pdl: bool, hidden: int = _WIDEST, capacity: int = 1024) -> StepConfig:
        """The settings that won on an H200 (docs/engines.md), for this batch, width and cache capacity.

        One sample: our matrix-vector kernels. More: cuBLAS, which was faster than our skinny product at every batch.
        """
        block_s = 64 if capacity <= 1024 else 128
        if batch > 1:
            return cls(_LIBRARY, _LIBRARY, _LIBRARY, _LIBRARY, _LIBRARY, block_s=block_s, pdl=pdl)
        rows = Linear("rows", 4, 1024, 4, 0)
        if hidden > _WIDEST or hidden & (hidden - 1):  # a row does not fill a power of two of registers
            return cls(qkv=rows, out=rows, gate_up=Linear("rows", 2, 1024, 4, 0), down=rows, head=rows, block_s=block_s, pdl=pdl)
        return cls(
            qkv=Linear("persistent", 4, 0, 8, 2),
            out=Linear("persistent", 4, 0, 8, 2),
            gate_up=Linear("persistent", 2, 0, 8, 2),
            down=rows,
            head=Linear("rows", 2, 4096, 4, 0),
            block_s=block_s,
            pdl=pdl,
        )


def launch_linear(
    how: Linear,
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    residual: bool = False,
    pdl: bool = False,
) -> None:
    """out [B, N] (+)= act(w @ rmsnorm(x)) for x [B, K]; the kernel that `how` names. w is [2N, K] when gated."""
    batch, k = x.shape
    n = out.shape[1]
    if how.kind == "cublas":
        return _library_linear(x, w, out, norm=norm, eps=eps, bias=bias, gated=gated, residual=residual, pdl=pdl)
    if batch != 1:
        raise ValueError(f"linear kernel {how.kind}: batch {batch}, expected 1. Use kind cublas.")
    flags = {"NORM": norm is not None, "GATED": gated, "BIAS": bias is not None, "RESIDUAL": residual, "PDL": pdl}
    options: dict[str, Any] = {"num_warps": how.warps, **_dependent(pdl)}
    head = (x, norm if norm is not None else x, w, bias if bias is not None else x, out, n, eps)
    if how.kind == "rows":
        _kernels_linear.gemv_rows[(-(-n // how.block_n),)](
            *head, K=k, BLOCK_N=how.block_n, BLOCK_K=how.block_k, EVEN_N=n % how.block_n == 0, **flags, **options
        )
    elif how.kind == "pipelined":
        _kernels_linear.gemv_pipelined[(-(-n // how.block_n),)](
            *head, K=k, BLOCK_N=how.block_n, BLOCK_K=how.block_k, EVEN_N=n % how.block_n == 0, STAGES=how.stages, **flags, **options
        )
    elif how.kind == "persistent":
        programs = min(-(-n // how.block_n), _multiprocessors(x.device) * how.stages)
        _kernels_linear.gemv_persistent[(programs,)](*head, K=k, BLOCK_N=how.block_n, BLOCK_K=_power_of_two(k), **flags, **options)
    else:
        raise ValueError(f"linear kernel {how.kind!r}: expected rows, pipelined, persistent or cublas")
    return None


def _library_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    gated: bool,
    residual: bool,
    pdl: bool,
) -> None:
    """The same by the library's matrix product, with norm and gate in kernels of their own around it."""
    if norm is not None:
        normed = torch.empty(x.shape, dtype=w.dtype, device=x.device)
        _kernels_linear.normalise[(x.shape[0],)](
            x, norm, normed, eps, K=x.shape[1], BLOCK_K=_power_of_two(x.shape[1]), PDL=pdl, num_warps=8, **_dependent(pdl)
        )
        x = normed
    if bias is None and not gated and not residual and out.dtype == w.dtype:
        torch.mm(x, w.t(), out=out)
        return
    y = functional.linear(x, w, bias)
    if gated:
        grid = (-(-out.shape[1] // _GATE_BLOCK), out.shape[0])
        _kernels_linear.gate[grid](y, out, out.shape[1], BLOCK_N=_GATE_BLOCK, PDL=pdl, **_dependent(pdl))
    elif residual:
        out.add_(y)
    else:
        out.copy_(y)


class TritonStep:
    """One token through the decoder. `choose`: None for the greedy kernel, or a function of logits [B, V] float32."""

    name = "triton"

    def __init__(
        self,
        weights: Weights,
        state: StepState,
        cos: torch.Tensor,
        sin: torch.Tensor,
        choose: Callable[[torch.Tensor], None] | None,
        config: StepConfig,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.weights, self.state, self.config = weights, state, config
        self._cos, self._sin, self._choose, self._after = cos, sin, choose, after
        device, dtype, b = weights.embed.device, weights.embed.dtype, state.batch
        self._splits = config.splits or default_splits(state.capacity, b * weights.heads, _multiprocessors(device))
        vectors = weights.heads + 2 * weights.kv_heads

        def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        self.hidden = empty(b, weights.hidden, kind=torch.float32)
        self._qkv = empty(b, vectors * weights.head_dim)
        self._mixed = empty(b, weights.heads * weights.head_dim)
        self._active = empty(b, weights.layers[0].down.shape[1])
        self.logits = empty(b, weights.head.shape[0], kind=torch.float32)
        self._partial = empty(b, weights.heads, self._splits, weights.head_dim, kind=torch.float32)
        self._weight = empty(b, weights.heads, self._splits, 2, kind=torch.float32)
        self._arrived = torch.zeros(b, weights.heads, dtype=torch.int32, device=device)

    def begin(self) -> None:
        """The embedding of the last chosen token into the residual stream; `finish` does it for the next step itself."""
        self.hidden.copy_(self.weights.embed[self.state.token])

    def layers(self, which: Sequence[int]) -> None:
        config, eps, pdl = self.config, self.weights.eps, self.config.pdl
        for index in which:
            layer = self.weights.layers[index]
            launch_linear(config.qkv, self.hidden, layer.qkv, self._qkv, norm=layer.norm_in, eps=eps, bias=layer.qkv_bias, pdl=pdl)
            self.attend(index)
            launch_linear(config.out, self._mixed, layer.out, self.hidden, residual=True, pdl=pdl)
            launch_linear(config.gate_up, self.hidden, layer.gate_up, self._active, norm=layer.norm_post, eps=eps, gated=True, pdl=pdl)
            launch_linear(config.down, self._active, layer.down, self.hidden, residual=True, pdl=pdl)

    def attend(self, index: int) -> None:
        w, state, config = self.weights, self.state, self.config
        _kernels_decode.attend[(w.heads, self._splits, state.batch)](
            self._qkv,
            state.keys[index],
            state.values[index],
            self._cos,
            self._sin,
            state.slot,
            state.start,
            state.positions,
            self._partial,
            self._weight,
            self._arrived,
            self._mixed,
            state.capacity,
            w.scaling * _LOG2_E,
            H=w.heads,
            G=w.kv_heads,
            D=w.head_dim,
            SPLITS=self._splits,
            BLOCK_S=config.block_s,
            PDL=config.pdl,
            num_warps=config.attention_warps,
            **_dependent(config.pdl),
        )

    def finish(self) -> None:
        """Final norm, head, choice, and the next token's embedding."""
        w, config = self.weights, self.config
        launch_linear(config.head, self.hidden, w.head, self.logits, norm=w.norm, eps=w.eps, pdl=config.pdl)
        if self._choose is None:
            self.select()
        else:
            self._choose(self.logits)
            self.begin()
        self._after()

    def select(self) -> None:
        state, pdl = self.state, self.config.pdl
        _kernels_decode.select[(state.batch,)](
            self.logits,
            self.weights.embed,
            self.hidden,
            state.token,
            state.ids,
            state.count,
            state.slot,
            state.positions,
            state.done,
            state.bad,
            state.eos,
            state.minimum,
            self.logits.shape[1],
            self.weights.hidden,
            state.capacity,
            EOS=EOS_SLOTS,
            BLOCK_V=4096,
            BLOCK_K=1024,
            PDL=pdl,
            num_warps=16,
            **_dependent(pdl),
        )


def default_splits(capacity: int, heads: int, multiprocessors: int) -> int:
    """A power of two: about four programs a multiprocessor, none with fewer than 32 slots."""
    wanted = max(1, min(4 * multiprocessors // heads, capacity // 32, 64))
    return 1 << (wanted.bit_length() - 1)


def _dependent(pdl: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if pdl else {}


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
