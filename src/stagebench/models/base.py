"""What a model gives to a timing job: the Adapter protocol and the values that pass between its stages.

Shapes: B batch, L prompt length in tokens, N visual tokens, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import xxhash
from torch import nn


@dataclass(frozen=True)
class ModelSpec:
    """Which weights, in which shape and precision."""

    weights: str
    """A local folder, a hub id, or "dummy:<seed>"."""
    architecture: str
    """Preset family for dummy weights: eventgpt, llava, video_llava, qwen2_5_vl, ..."""
    preset: str | None = None
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    frames_as: str | None = None
    quantization: str = "none"
    prompt: str | None = None
    preprocess: str = "pil"
    """pil: on the CPU, bit-identical to the original processors. device: by torch on the model's device."""
    keep_visual: float = 1.0
    """Share of the visual tokens that the language model is given."""

    @property
    def dummy_seed(self) -> int | None:
        """The seed of random weights, or None for real ones."""
        return int(self.weights[6:]) if self.weights.startswith("dummy:") else None


@dataclass(frozen=True)
class Decoding:
    """When to stop and how to choose. `fixed` lengths set min_new_tokens == max_new_tokens."""

    max_new_tokens: int
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def fixed(self) -> bool:
        return self.min_new_tokens == self.max_new_tokens


@dataclass(frozen=True)
class Inputs:
    """A batch after preprocessing: token ids with placeholders, and pixel values. Left-padded."""

    input_ids: torch.Tensor
    """[B, L] int64; a placeholder id stands where visual tokens go."""
    attention_mask: torch.Tensor
    """[B, L] int64, 0 at left padding."""
    pixels: Mapping[str, torch.Tensor]
    """What the vision encoder takes, by the model's own argument names."""
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Grids, token type ids and the like, by the model's own argument names."""
    visual_counts: tuple[int, ...] = ()
    """Images, frames or videos of each sample of the batch: how `pixels` divides into samples."""

    @property
    def batch(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def pixel_bytes(self) -> int:
        return sum(t.nbytes for t in self.pixels.values())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Inputs:
        """Copy to the device. Floating-point tensors are cast on the host side first only when that halves the bytes."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
            return tensor.to(device)

        return replace(
            self,
            input_ids=move(self.input_ids),
            attention_mask=move(self.attention_mask),
            pixels={k: move(v) for k, v in self.pixels.items()},
            extra={k: move(v) for k, v in self.extra.items()},
        )


@dataclass(frozen=True)
class Features:
    """What the language model takes: tower + projector + adaptor + pooling done, for all frames."""

    embeds: tuple[torch.Tensor, ...]
    """One tensor a sample of the batch: [N_b, D]."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What some models hand on besides (deepstack features and the like)."""

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        return tuple(int(e.shape[0]) for e in self.embeds)

    def content_hash(self) -> str:
        """XXH3 of 128 bits over shapes, dtypes and bytes. Synchronises and copies to the host: never inside a timed window.

        It stands between any two runs, so it is a fast one: it tells accidents apart, and nobody gains by forging one's own features.
        """
        digest = xxhash.xxh3_128()
        for embed in self.embeds:
            flat = embed.detach().contiguous()
            digest.update(f"{tuple(flat.shape)}{flat.dtype}".encode())
            digest.update(_on_host(flat.view(torch.uint8)).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Prompt:
    """Embedded prompt, ready for the language model."""

    embeds: torch.Tensor
    """[B, L, D], left-padded."""
    attention_mask: torch.Tensor
    """[B, L] int64."""
    position_ids: torch.Tensor
    """[B, L], or [3, B, L] / [4, B, L] for M-RoPE models."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What `generate` needs besides: input_ids, grids, type ids, by the model's own argument names."""
    text_ids: torch.Tensor | None = None
    """[B, L'] int64: the prompt's ids with placeholders as the adapter has them, left-padded; for engines that read the prompt's text."""
    placeholder_id: int | None = None
    """The id in `text_ids` that stands for a visual token."""

    @property
    def length(self) -> int:
        return int(self.embeds.shape[1])


@dataclass(frozen=True)
class Tokens:
    """New tokens only, EOS included, padding cut off."""

    ids: tuple[tuple[int, ...], ...]
    """One tuple a sample of the batch."""
    finish_reasons: tuple[str, ...]
    """eos | length, one a sample."""
    kv_bytes: int | None = None
    """Bytes of the KV cache at the end, where the engine can tell."""
    nan: bool = False
    """Whether any logits were NaN or infinite."""
    drafted: int | None = None
    """Tokens proposed to the model by an engine that guesses ahead."""
    accepted: int | None = None
    """Those of them that were the model's own choice."""


@runtime_checkable
class Adapter(Protocol):
    """One model, cut at its stages. Everything but `preprocess`, `collate` and `detokenize` runs under inference_mode on the device."""

    name: str
    spec: ModelSpec
    device: torch.device

    def load(self, spec: ModelSpec, device: torch.device | str) -> None:
        """Build the model. Raises ModelError with the remedy when weights do not fit."""

    def preprocess(self, frames: Sequence[np.ndarray], query: str) -> Inputs:
        """uint8 RGB frames [H, W, 3] and a query -> a batch of one, on the CPU."""

    def collate(self, batch: Sequence[Inputs]) -> Inputs:
        """Batches of one -> one left-padded batch, on the CPU."""

    def encode(self, inputs: Inputs) -> Features:
        """Device pixel values -> features, by exactly one call of `vision_module`."""

    def merge(self, inputs: Inputs, features: Features) -> Prompt:
        """Features into the embedded prompt. No call of the vision module."""

    def monolithic(self, inputs: Inputs, decoding: Decoding) -> Tokens:
        """The model's own `generate` from pixel values to ids: the reference that verify compares with."""

    def monolithic_logits(self, inputs: Inputs) -> torch.Tensor:
        """The model's own one-pass forward from pixel values: logits of the last prompt position, [B, V] float32."""

    def language_model(self) -> nn.Module:
        """The causal LM that engines drive with `inputs_embeds`.

        It has `forward(inputs_embeds, attention_mask, position_ids, past_key_values, ...)` with logits, and `generate`.
        """

    def vision_module(self) -> nn.Module:
        """What is counted and hooked: the tower whose forward runs once an encode."""

    def eos_token_ids(self) -> tuple[int, ...]: ...

    def detokenize(self, ids: Sequence[int]) -> str: ...

    def revision(self) -> str:
        """Content digest of the weight files, or "dummy:<seed>/<preset>"."""

    def tokenizer_digest(self) -> str:
        """Equal for tokenizers that map ids to the same strings: acceptance is refused between different ones."""


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory; from a GPU by way of page-locked memory, which torch keeps for the next one."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
