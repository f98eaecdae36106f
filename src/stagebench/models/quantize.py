"""Weight-only quantisation of a loaded model's language model, in place.

    int8    one symmetric scale an output channel
    int4    16 even steps a group of 128 columns
    nf4     NormalFloat-4 a block of 64 columns

The linears of the text decoder's layers are replaced, and nothing else: vision tower, projector, adaptor, embeddings and output head keep
their weights. The layers are our own (`_packed`), so that what a study measures does not depend on which library happens to be installed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from stagebench.errors import ModelError
from stagebench.models._packed import Int4Linear, Int8Linear, Nf4Linear, PackedLinear

__all__ = ["SCHEMES", "Quantized", "apply", "text_layers"]

log = logging.getLogger(__name__)

SCHEMES: Mapping[str, type[PackedLinear]] = {"int8": Int8Linear, "int4": Int4Linear, "nf4": Nf4Linear}


@dataclass(frozen=True)
class Quantized:
    """What was done to a model."""

    scheme: str
    linears: int
    bytes_before: int
    bytes_after: int
    """Of the replaced linears, biases included."""
    kernel: str
    """"triton": single rows are multiplied by a kernel that reads the codes; "torch": always unpacked first."""


def apply(model: nn.Module, *, scheme: str, device: torch.device, vision: nn.Module) -> Quantized:
    """Replace the linears of the text decoder's layers by packed ones; layer by layer, so that the peak is little above the model itself.

    vision: the adapter's vision module, which must stay as it is. On CUDA the single rows' kernels are compiled here, outside any timed
    window. Raises ModelError for an unknown scheme, and when there is no text decoder or it holds the vision module.
    """
    if scheme not in SCHEMES:
        raise ModelError(f"quantization {scheme!r}: expected one of {', '.join(SCHEMES)}. Set variants.quantization to these, or none.")
    layers = text_layers(model)
    inside = set(map(id, layers.modules()))
    if any(id(module) in inside for module in vision.modules()):
        raise ModelError(
            f"{type(model).__name__}: its vision module lies inside the text decoder's layers. Set variants.quantization: [none]."
        )
    found = [
        (parent, name, linear)
        for parent in layers.modules()
        for name, linear in parent.named_children()
        if type(linear) is nn.Linear and linear.in_features % 2 == 0
    ]
    if not found:
        raise ModelError(
            f"{type(model).__name__}: no plain Linear in its text layers (quantised already?). Set variants.quantization: [none]."
        )
    before = after = 0
    packed: list[PackedLinear] = []
    with torch.no_grad():
        for parent, name, linear in found:
            made = SCHEMES[scheme](linear)
            before += _bytes(linear)
            after += _bytes(made)
            setattr(parent, name, made)
            packed.append(made)
    del found
    kernel = "triton" if device.type == "cuda" and _use_kernels(packed) else "torch"
    log.info("%s: %d linears, %.2f -> %.2f GB, single rows by %s", scheme, len(packed), before * 1e-9, after * 1e-9, kernel)
    return Quantized(scheme, len(packed), before, after, kernel)


def text_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers: the `layers` that stand beside an `embed_tokens`. Raises ModelError when there is not exactly one such list."""
    found = [
        layers
        for module in model.modules()
        if isinstance(layers := getattr(module, "layers", None), nn.ModuleList)
        and isinstance(getattr(module, "embed_tokens", None), nn.Module)
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__}: {len(found)} text decoders (modules with embed_tokens and layers), expected one. "
            "Its weights cannot be quantised here: set variants.quantization: [none]."
        )
    return found[0]


def _use_kernels(packed: list[PackedLinear]) -> bool:
    """Give single rows our kernel, and run it once a shape. False, with the reason logged, where Triton does not work."""
    try:
        from stagebench.models._packed_launch import row_product

        seen: set[tuple[int, int, bool]] = set()
        for linear in packed:
            if linear.in_features % linear.QUAD:
                continue
            linear.row_product = row_product
            shape = (linear.out_features, linear.in_features, linear.bias is None)
            if shape not in seen:
                seen.add(shape)
                with torch.inference_mode():
                    linear(torch.zeros(1, linear.in_features, dtype=linear.dtype, device=linear.parts()[0].device))
    except Exception as error:  # no Triton, no compiler, a device it does not know: all mean the plain way
        log.warning("no kernel for single rows (%s: %s); weights are unpacked for every token", type(error).__name__, error)
        for linear in packed:
            linear.row_product = None
        return False
    return any(linear.row_product is not None for linear in packed)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
