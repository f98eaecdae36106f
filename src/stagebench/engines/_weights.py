"""The weights of a LLaMA-family decoder, laid out for the fused step, and the check that a model is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from stagebench.engines._stepped import Unsupported
from stagebench.models._packed import PackedLinear

__all__ = ["Layer", "Matrix", "PackedMatrix", "Weights", "multiply", "pack", "rope_tables"]

_ATTENTION = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}
_MLP = {"LlamaMLP", "MistralMLP", "Qwen2MLP"}
_NORM = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"}
_ROPE = {"default", "linear", "llama3"}
"""RoPE kinds whose angles depend on the position alone; `dynamic` and `longrope` change with the length."""


@dataclass(frozen=True)
class PackedMatrix:
    """Quantised weights of one or several linears, one under the other."""

    kind: type[PackedLinear]
    parts: tuple[torch.Tensor, ...]
    """In the order of `kind.PARTS`; rows are output channels, except in what `kind.SHARED` names."""
    shape: tuple[int, int]
    """[N, K] of what they stand for."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


Matrix = torch.Tensor | PackedMatrix


def multiply(x: torch.Tensor, w: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [B, K] @ w^T -> [B, N], in x's dtype, by the library's product; a packed matrix is unpacked first."""
    return w.kind.product(x, w.parts, bias) if isinstance(w, PackedMatrix) else functional.linear(x, w, bias)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. q, k, v are one matrix, gate and up another, in that order."""

    qkv: Matrix
    """[(H+2G)*D, hidden]"""
    qkv_bias: torch.Tensor | None
    out: Matrix
    """[hidden, H*D]"""
    gate_up: Matrix
    """[2*intermediate, hidden]"""
    down: Matrix
    """[hidden, intermediate]"""
    norm_in: torch.Tensor
    norm_post: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """A decoder and its head."""

    layers: tuple[Layer, ...]
    embed: torch.Tensor
    """[vocab, hidden]"""
    norm: torch.Tensor
    head: torch.Tensor
    """[vocab, hidden]"""
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    """What q·k is multiplied by."""

    @property
    def hidden(self) -> int:
        return int(self.embed.shape[1])

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one step must read, as stored (of the embedding only one row)."""
        return sum(w.nbytes for w in (*self.matrices, self.head))

    @property
    def matrices(self) -> list[Matrix]:
        """The layers' linears."""
        return [w for layer in self.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)]

    @property
    def packed(self) -> type[PackedLinear] | None:
        """How the layers' linears are quantised, if they are."""
        first = self.layers[0].qkv
        return first.kind if isinstance(first, PackedMatrix) else None


@torch.inference_mode(False)
@torch.no_grad()
def pack(model: nn.Module, decoder: Any) -> Weights:
    """Check the decoder layer by layer, then join q, k, v and gate, up. The model's own parameters become views of the
    joined matrices, so memory does not double and the model still runs.

    Raises Unsupported, before anything is changed, when a layer is not plain LLaMA arithmetic.
    """
    head: Any = getattr(model, "lm_head", None)
    kinds = {kind for layer in decoder.layers for kind in _check(layer)}
    if len(kinds) != 1:
        raise Unsupported(f"linears of several kinds: {', '.join(sorted(kind.__name__ for kind in kinds))}")
    if _readable(head, "lm_head", bias=False) is not nn.Linear:
        raise Unsupported("a quantised lm_head")
    rope = getattr(decoder, "rotary_emb", None)
    if getattr(rope, "rope_type", None) not in _ROPE:
        raise Unsupported(f"RoPE of type {getattr(rope, 'rope_type', None)}")
    if type(decoder.norm).__name__ not in _NORM:
        raise Unsupported(f"final norm {type(decoder.norm).__name__}")
    first = decoder.layers[0].self_attn
    config = decoder.config
    return Weights(
        layers=tuple(_pack_layer(layer) for layer in decoder.layers),
        embed=decoder.embed_tokens.weight.detach(),
        norm=decoder.norm.weight.detach(),
        head=head.weight.detach(),
        eps=float(decoder.norm.variance_epsilon),
        heads=int(config.num_attention_heads),
        kv_heads=int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        head_dim=int(first.head_dim),
        scaling=float(first.scaling),
    )


@torch.inference_mode()
def rope_tables(decoder: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [positions, D/2] float32, from the model's own rotary module (attention scaling included)."""
    device = decoder.embed_tokens.weight.device
    dummy = torch.zeros(1, 1, 1, dtype=torch.float32, device=device)
    cos, sin = decoder.rotary_emb(dummy, torch.arange(positions, device=device)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def _check(layer: Any) -> list[type[nn.Module]]:
    """The classes of the layer's linears. Raises Unsupported."""
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention).__name__ not in _ATTENTION or type(mlp).__name__ not in _MLP:
        raise Unsupported(f"layers of {type(attention).__name__} and {type(mlp).__name__}; LLaMA, Mistral and Qwen2 arithmetic is fused")
    if getattr(attention, "q_norm", None) is not None or getattr(attention, "k_norm", None) is not None:
        raise Unsupported("norms on q and k")
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        if type(norm).__name__ not in _NORM:
            raise Unsupported(f"norm {type(norm).__name__}")
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise Unsupported(f"activation {type(mlp.act_fn).__name__}, expected SiLU")
    kinds = [_readable(getattr(attention, name), name, bias=True) for name in ("q_proj", "k_proj", "v_proj")]
    for owner, name in ((attention, "o_proj"), (mlp, "gate_proj"), (mlp, "up_proj"), (mlp, "down_proj")):
        kinds.append(_readable(getattr(owner, name), name, bias=False))
    width = int(attention.head_dim)
    if width & (width - 1) or width < 16:
        raise Unsupported(f"heads {width} wide; a power of two from 16 on is fused")
    return kinds


def _readable(linear: Any, name: str, *, bias: bool) -> type[nn.Module]:
    """The class of a linear whose weights we can read: torch's, of floating point, or one of our packed ones. Raises Unsupported."""
    if isinstance(linear, PackedLinear):
        kind: type[nn.Module] = type(linear)
    elif type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and linear.weight.is_floating_point():
        kind = nn.Linear
    else:
        weight = type(getattr(linear, "weight", None)).__name__
        raise Unsupported(f"{name} is a {type(linear).__name__} of {weight}, expected a plain or one of our packed linears")
    if linear.bias is not None and not bias:
        raise Unsupported(f"{name} has a bias")
    return kind


def _pack_layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    biases = [p.bias for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return Layer(
        qkv=_matrix(attention.q_proj, attention.k_proj, attention.v_proj),
        qkv_bias=torch.cat([b.detach() for b in biases]) if biases[0] is not None else None,
        out=_matrix(attention.o_proj),
        gate_up=_matrix(mlp.gate_proj, mlp.up_proj),
        down=_matrix(mlp.down_proj),
        norm_in=layer.input_layernorm.weight.detach(),
        norm_post=layer.post_attention_layernorm.weight.detach(),
    )


def _matrix(*linears: Any) -> Matrix:
    """Their weights as one matrix, one under the other."""
    first = linears[0]
    if not isinstance(first, PackedLinear):
        return _join(linears, "weight")
    parts = tuple(getattr(first, name).detach() if name in first.SHARED else _join(linears, name) for name in first.PARTS)
    return PackedMatrix(type(first), parts, (sum(linear.out_features for linear in linears), first.in_features))


def _join(linears: tuple[Any, ...], name: str) -> torch.Tensor:
    """Their parameters `name` [n, ...] as one [N, ...], of which each parameter becomes a view."""
    first = getattr(linears[0], name).detach()
    if len(linears) == 1:
        return first
    rows = [getattr(linear, name).shape[0] for linear in linears]
    shape = (sum(rows), *first.shape[1:])
    joined = first.untyped_storage().nbytes() == sum(rows) * first[0].numel() * first.element_size()
    if joined and all(getattr(linear, name).untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for linear in linears):
        return first.as_strided(shape, (*first.stride(),), 0)  # packed by an earlier engine
    whole = torch.cat([getattr(linear, name).detach() for linear in linears])
    for linear, part in zip(linears, whole.split(rows), strict=True):
        setattr(linear, name, nn.Parameter(part, requires_grad=False))
    return whole
