"""The weights of a LLaMA-family decoder, laid out for the fused step, and the check that a model is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stagebench.engines._stepped import Unsupported

__all__ = ["Layer", "Weights", "pack", "rope_tables"]

_ATTENTION = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}
_MLP = {"LlamaMLP", "MistralMLP", "Qwen2MLP"}
_NORM = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"}
_ROPE = {"default", "linear", "llama3"}
"""RoPE kinds whose angles depend on the position alone; `dynamic` and `longrope` change with the length."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer. q, k, v are one matrix, gate and up another, in that order."""

    qkv: torch.Tensor
    """[(H+2G)*D, hidden]"""
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    """[hidden, H*D]"""
    gate_up: torch.Tensor
    """[2*intermediate, hidden]"""
    down: torch.Tensor
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
        """Bytes of weights that one step must read (of the embedding only one row)."""
        matrices = [t for layer in self.layers for t in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return sum(t.numel() * t.element_size() for t in (*matrices, self.head))


@torch.inference_mode(False)
@torch.no_grad()
def pack(model: nn.Module, decoder: Any) -> Weights:
    """Check the decoder layer by layer, then join q, k, v and gate, up. The model's own parameters become views of the
    joined matrices, so memory does not double and the model still runs.

    Raises Unsupported, before anything is changed, when a layer is not plain LLaMA arithmetic.
    """
    head: Any = getattr(model, "lm_head", None)
    for layer in decoder.layers:
        _check(layer)
    _plain(head, "lm_head", bias=False)
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


def _check(layer: Any) -> None:
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
    for name in ("q_proj", "k_proj", "v_proj"):
        _plain(getattr(attention, name), name, bias=True)
    for owner, name in ((attention, "o_proj"), (mlp, "gate_proj"), (mlp, "up_proj"), (mlp, "down_proj")):
        _plain(getattr(owner, name), name, bias=False)
    width = int(attention.head_dim)
    if width & (width - 1) or width < 16:
        raise Unsupported(f"heads {width} wide; a power of two from 16 on is fused")


def _plain(linear: Any, name: str, *, bias: bool) -> None:
    """A torch Linear with an ordinary floating-point weight; quantised ones have their own classes or tensor types."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or not linear.weight.is_floating_point():
        raise Unsupported(f"{name} is a {type(linear).__name__} of {type(linear.weight).__name__}, expected a plain Linear (quantised?)")
    if linear.bias is not None and not bias:
        raise Unsupported(f"{name} has a bias")


def _pack_layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    biases = [p.bias for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return Layer(
        qkv=_join(attention.q_proj, attention.k_proj, attention.v_proj),
        qkv_bias=torch.cat([b.detach() for b in biases]) if biases[0] is not None else None,
        out=attention.o_proj.weight.detach(),
        gate_up=_join(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight.detach(),
        norm_in=layer.input_layernorm.weight.detach(),
        norm_post=layer.post_attention_layernorm.weight.detach(),
    )


def _join(*linears: nn.Linear) -> torch.Tensor:
    rows = [linear.weight.shape[0] for linear in linears]
    first = linears[0].weight
    joined = first.detach().untyped_storage().nbytes() == sum(rows) * first.shape[1] * first.element_size()
    if joined and all(linear.weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for linear in linears):
        return first.detach().as_strided((sum(rows), first.shape[1]), (first.shape[1], 1), 0)  # packed by an earlier engine
    whole = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, whole.split(rows), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return whole
