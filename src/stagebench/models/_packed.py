"""Linear layers with packed weights: int8, int4 and NF4, weight-only.

A weight W [N, K] is stored as codes and scales; activations keep their dtype. Many rows at once (a prefill, a batch) unpack W, on CUDA
by one kernel, and call the ordinary product. One row (a decode step at batch 1) is multiplied on CUDA by a kernel that reads the codes,
which is what makes weight-only quantisation fast where memory is the limit. Both kernels are Triton's; without it torch unpacks.

Codes lie so that a kernel needs no shuffling. Where K divides by the columns that sixteen bytes hold ("a quad": 16 of int8, 32 of four
bits), these are read as four little-endian words, and the j-th code of word r is column 4j + r. Elsewhere codes follow one another; two
four-bit ones share a byte, the even column in its lower half.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["INT4_GROUP", "NF4_BLOCK", "NF4_CODES", "Int4Linear", "Int8Linear", "Nf4Linear", "PackedLinear", "group_size"]


INT4_GROUP = 128
"""Columns that share a scale and a zero point, where K divides by it."""
NF4_BLOCK = 64
"""Columns that share a scale, as QLoRA has it."""

NF4_CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NormalFloat-4: quantiles of a normal distribution scaled to [-1, 1], with an exact zero (Dettmers et al. 2023, QLoRA, appendix E)."""


def group_size(columns: int, preferred: int) -> int:
    """The largest divisor of `columns` that is `preferred` halved zero or more times; `columns` itself where that would be below 8."""
    size = preferred
    while columns % size:
        size //= 2
    return size if size >= 8 else columns


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed. Codes and scales are parameters without gradient, so that they are counted as weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.dtype = linear.weight.dtype
        self.bias = None if linear.bias is None else _stored(linear.bias)
        self.row_product: Any = None
        """`_packed_launch.row_product`, or None: then a single row goes the way of many."""

    PARTS: tuple[str, ...] = ()
    """Names of the packed tensors, in the order that `unpack` takes them; those in SHARED are one for all output channels."""
    SHARED: frozenset[str] = frozenset()
    QUAD = 32
    """Columns that sixteen bytes of codes hold."""

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The packed tensors, in the order that `unpack` takes them."""
        return tuple(getattr(self, name) for name in self.PARTS)

    @staticmethod
    def unpack(*parts: torch.Tensor) -> torch.Tensor:
        """[N, K] float32."""
        raise NotImplementedError

    @classmethod
    def dense(cls, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        """What these parts stand for, [N, K]; rounded to `dtype` once, at the end."""
        return cls.unpack(*parts).to(dtype)

    def weight_as(self, dtype: torch.dtype) -> torch.Tensor:
        """What the packed weight stands for, [N, K]."""
        return self.dense(self.parts(), dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The unpacked weight, for code that asks a Linear for its dtype, device or shape. Made anew at each access."""
        return self.weight_as(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        if self.row_product is not None and x.numel() == self.in_features:
            y: torch.Tensor = self.row_product(type(self), self.parts(), x.reshape(-1), self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        return self.product(x, self.parts(), self.bias)

    @classmethod
    def product(cls, x: torch.Tensor, parts: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype, by the unpacked weight."""
        return functional.linear(x, cls.dense(parts, x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(PackedLinear):
    """One symmetric scale an output channel: W[n, k] = codes[n, k] * scale[n]."""

    PARTS = ("codes", "scale")
    QUAD = 16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127  # [N]
        self.codes = _stored(_turned(torch.round(weight / scale[:, None]).clamp_(-127, 127).to(torch.int8)))  # [N, K]
        self.scale = _stored(scale)

    @staticmethod
    def unpack(*parts: torch.Tensor) -> torch.Tensor:
        codes, scale = parts
        return _turned(codes).float() * scale[:, None]

    @classmethod
    def product(cls, x: torch.Tensor, parts: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        # codes are exact in every float dtype, and the scale is the output channel's own: one pass over the weight, not two
        codes, scale = parts
        if _triton_serves(codes):
            from stagebench.models._kernels_unpack import unpack8

            y = functional.linear(x, unpack8(codes, x.dtype, quads=codes.shape[1] % cls.QUAD == 0)) * scale.to(x.dtype)
        else:
            y = functional.linear(_turned(x), codes.to(x.dtype)) * scale.to(x.dtype)
        return y if bias is None else y + bias


class Int4Linear(PackedLinear):
    """16 evenly spaced values a group of columns: W[n, k] = codes[n, k] * scale[n, g] + low[n, g]. Two codes a byte."""

    PARTS = ("codes", "scale", "low")

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        groups = linear.weight.detach().float().unflatten(1, (-1, group_size(self.in_features, INT4_GROUP)))  # [N, G, g]
        low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scale = ((high - low) / 15).clamp_min(1e-12)
        # the low end is a whole number of steps, so that zero stays exactly zero
        low = torch.round(low / scale) * scale
        codes = torch.round((groups - low[..., None]) / scale[..., None]).clamp_(0, 15).to(torch.uint8)
        self.codes = _stored(_pack(codes.flatten(1)))  # [N, K/2]
        self.scale, self.low = _stored(scale.to(self.dtype)), _stored(low.to(self.dtype))  # [N, G]

    @staticmethod
    def unpack(*parts: torch.Tensor) -> torch.Tensor:
        codes, scale, low = parts
        groups = _unpack(codes).float().unflatten(1, (scale.shape[1], -1))
        return (groups * scale.float()[..., None] + low.float()[..., None]).flatten(1)

    @classmethod
    def dense(cls, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        return _dense4(parts, dtype, nf4=False) if _triton_serves(parts[0]) else super().dense(parts, dtype)


class Nf4Linear(PackedLinear):
    """NormalFloat-4: W[n, k] = NF4_CODES[codes[n, k]] * scale[n, block]. Two codes a byte. Scales stay float32."""

    PARTS = ("codes", "scale", "values")
    SHARED = frozenset({"values"})

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        blocks = linear.weight.detach().float().unflatten(1, (-1, group_size(self.in_features, NF4_BLOCK)))  # [N, B, b]
        scale = blocks.abs().amax(2).clamp_min(1e-12)
        values = torch.tensor(NF4_CODES, device=blocks.device)
        borders = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks / scale[..., None], borders, out_int32=True).to(torch.uint8)
        self.codes = _stored(_pack(codes.flatten(1)))
        self.scale = _stored(scale.to(torch.float32))  # [N, B]
        self.values = _stored(values)  # [16]

    @staticmethod
    def unpack(*parts: torch.Tensor) -> torch.Tensor:
        codes, scale, values = parts
        blocks = values[_unpack(codes).int()].unflatten(1, (scale.shape[1], -1))
        return (blocks * scale[..., None]).flatten(1)

    @classmethod
    def dense(cls, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        return _dense4(parts, dtype, nf4=True) if _triton_serves(parts[0]) else super().dense(parts, dtype)


def _stored(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _turned(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> the columns in the order of int8 codes, and back: 4j + r changes places with 4r + j."""
    if x.shape[-1] % Int8Linear.QUAD:
        return x
    return x.unflatten(-1, (-1, 4, 4)).transpose(-1, -2).flatten(-3)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] of 0..15 -> uint8 [N, K/2]."""
    low, high = _halves(codes)
    return low | (high << 4)


def _unpack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K/2] -> uint8 [N, K]."""
    if not _in_quads(2 * codes.shape[1]):
        return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    bytes_ = codes.unflatten(1, (-1, 4, 4)).transpose(2, 3)  # word, byte -> byte, word
    return torch.stack([bytes_ & 15, bytes_ >> 4], dim=3).flatten(1)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] -> the columns that lie in the bytes' lower and upper halves, each [..., K/2] in the bytes' order."""
    if not _in_quads(x.shape[-1]):
        return x[..., 0::2], x[..., 1::2]
    low, high = x.unflatten(-1, (-1, 4, 2, 4)).unbind(-2)  # byte, half, word
    return low.transpose(-1, -2).flatten(-3), high.transpose(-1, -2).flatten(-3)


def _in_quads(columns: int) -> bool:
    return columns % PackedLinear.QUAD == 0


def _triton_serves(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and find_spec("triton") is not None


def _dense4(parts: tuple[torch.Tensor, ...], dtype: torch.dtype, *, nf4: bool) -> torch.Tensor:
    from stagebench.models._kernels_unpack import unpack4

    codes, scale, third = parts
    return unpack4(codes, scale, third, dtype, quads=_in_quads(2 * codes.shape[1]), nf4=nf4)
