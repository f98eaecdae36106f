"""What all adapters on transformers' classes share: loading, collation, the monolithic reference, digests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stagebench.errors import ModelError
from stagebench.models import _weights, quantize
from stagebench.models._text import TextCodec
from stagebench.models.base import Decoding, Features, Inputs, ModelSpec, Prompt, Tokens

__all__ = ["TransformersAdapter", "check_frames", "cut_at_eos", "generate_arguments"]


class TransformersAdapter(ABC):
    """Base of the adapters. A subclass builds the model and the codec, and says how pixels become features and features a prompt."""

    name: str
    spec: ModelSpec
    device: torch.device
    model: Any
    codec: TextCodec
    pad_crops = False
    """Whether the model itself drops crops that were filled up with zeros, as the anyres models do."""

    quantized: quantize.Quantized | None = None
    """What quantisation did to the model."""

    _folder: Path | None = None
    _revision: str | None = None

    def load(self, spec: ModelSpec, device: torch.device | str) -> None:
        """Build model and tokenizer from a folder, a hub id or a seed. Raises ModelError with the remedy when they do not fit together."""
        self.device = torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else torch.device(device)
        _weights.check_attention(spec.attention)
        self.spec = spec
        if spec.dummy_seed is not None:
            self._folder, self._revision = None, f"{spec.weights}/{spec.preset}"
            self._load_preset(spec)
        else:
            self._folder, self._revision = _weights.checkpoint_folder(spec.weights), None
            self._load_folder(spec, self._folder)
        self.model.generation_config = _clean_generation_config(self.model, self.codec)
        self.model.requires_grad_(False)
        if spec.quantization != "none":
            self.quantized = quantize.apply(self.model, scheme=spec.quantization, device=self.device, vision=self.vision_module())
        if spec.preprocess == "device":
            self._preprocess_on_device()
        if spec.keep_visual < 1:
            self._keep_visual(spec.keep_visual)

    @abstractmethod
    def _load_preset(self, spec: ModelSpec) -> None: ...

    @abstractmethod
    def _load_folder(self, spec: ModelSpec, folder: Path) -> None: ...

    @abstractmethod
    def preprocess(self, frames: Sequence[np.ndarray], query: str) -> Inputs: ...

    @abstractmethod
    def encode(self, inputs: Inputs) -> Features: ...

    @abstractmethod
    def merge(self, inputs: Inputs, features: Features) -> Prompt: ...

    @abstractmethod
    def vision_module(self) -> nn.Module: ...

    @property
    def pad_id(self) -> int:
        return self.codec.pad_id

    def collate(self, batch: Sequence[Inputs]) -> Inputs:
        """Batches of one -> one batch; shorter prompts are padded on the left, since right padding moves their logits."""
        if len(batch) == 1:
            return batch[0]
        longest = max(int(inputs.input_ids.shape[1]) for inputs in batch)
        fill = {"input_ids": self.pad_id}
        extra = [
            {
                key: _left_fill(value, longest, 0) if value.shape[-1] == i.input_ids.shape[1] and value.ndim == 2 else value
                for key, value in i.extra.items()
            }
            for i in batch
        ]
        return Inputs(
            input_ids=torch.cat([_left_fill(i.input_ids, longest, fill["input_ids"]) for i in batch]),
            attention_mask=torch.cat([_left_fill(i.attention_mask, longest, 0) for i in batch]),
            pixels=_joined([i.pixels for i in batch], pad_crops=self.pad_crops),
            extra=_joined(extra),
            visual_counts=tuple(count for i in batch for count in i.visual_counts),
        )

    @torch.inference_mode()
    def monolithic(self, inputs: Inputs, decoding: Decoding) -> Tokens:
        """The model's own `generate`, from pixel values to ids."""
        if decoding.temperature > 0:
            torch.manual_seed(decoding.seed)
        eos = decoding.eos_token_ids or self.eos_token_ids()
        ids = self._generate(inputs, generate_arguments(decoding, eos, self.pad_id))
        return cut_at_eos(ids, eos)

    def _generate(self, inputs: Inputs, arguments: dict[str, Any]) -> torch.Tensor:
        """New ids only, [B, n]. `generate` with input_ids returns the prompt in front of them."""
        prompt = int(inputs.input_ids.shape[1])
        output = self.model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels, **inputs.extra, **arguments
        )
        return output[:, prompt:]

    @torch.inference_mode()
    def monolithic_logits(self, inputs: Inputs) -> torch.Tensor:
        """The model's own forward from pixel values: logits of the last prompt position, [B, V] float32."""
        output = self.model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            **self._forward_positions(inputs),
            **inputs.pixels,
            **inputs.extra,
            use_cache=False,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _forward_positions(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Positions for a forward of a left-padded batch: `generate` counts them from the mask, a plain forward counts the padding too."""
        return {}

    def language_model(self) -> nn.Module:
        return self.model

    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.model.generation_config.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.codec.decode([int(i) for i in ids])

    def revision(self) -> str:
        if self._revision is None:
            if self._folder is None:
                raise ModelError("the adapter is not loaded, so it has no revision. Call load(spec, device) first.")
            self._revision = _weights.content_digest(self._folder)
        return self._revision

    def tokenizer_digest(self) -> str:
        return self.codec.digest()

    def _preprocess_on_device(self) -> None:
        """From here on `preprocess` gives pixels that are on the device already. Raises ModelError where the processor is not CLIP's."""
        raise ModelError(f"adapter {self.name} has no preprocessing on the device. Set variants.preprocess: [pil].")

    def _keep_visual(self, share: float) -> None:
        """From here on `encode` gives that share of the visual tokens (see `pruning`). Raises ModelError where the rule does not apply."""
        raise ModelError(f"adapter {self.name} cannot leave out visual tokens. Set variants.keep_visual: [1.0].")


def check_frames(frames: Sequence[np.ndarray]) -> None:
    """Raises ModelError unless all frames are uint8 RGB [H, W, 3]."""
    if not len(frames):
        raise ModelError("no frames to preprocess: expected at least one uint8 RGB frame [H, W, 3]. Check the clip's row in the shard.")
    for i, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ModelError(
                f"frame {i} has dtype {frame.dtype} and shape {frame.shape}: expected uint8 RGB [H, W, 3]. "
                "Convert it (render.voxel_to_frames for voxel grids)."
            )


def generate_arguments(decoding: Decoding, eos: Sequence[int], pad_id: int) -> dict[str, Any]:
    """`Decoding` in the terms of transformers' `generate`. Sampling has no top-k: temperature and top_p are all there is."""
    arguments: dict[str, Any] = {
        "max_new_tokens": decoding.max_new_tokens,
        "min_new_tokens": decoding.min_new_tokens or None,
        "do_sample": decoding.temperature > 0,
        "eos_token_id": list(eos) or None,
        "pad_token_id": pad_id,
        "use_cache": True,
        "return_dict_in_generate": False,
    }
    if decoding.temperature > 0:
        arguments |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    return arguments


def cut_at_eos(ids: torch.Tensor, eos: Sequence[int]) -> Tokens:
    """[B, n] new ids -> a tuple a row, EOS kept, padding behind it cut."""
    rows, reasons = [], []
    stop = set(eos)
    for row in ids.tolist():
        end = next((i for i, token in enumerate(row) if token in stop), None)
        rows.append(tuple(row if end is None else row[: end + 1]))
        reasons.append("length" if end is None else "eos")
    return Tokens(ids=tuple(rows), finish_reasons=tuple(reasons))


def _clean_generation_config(model: Any, codec: TextCodec) -> Any:
    """Ids of BOS, EOS and padding, and nothing else: no checkpoint's own repetition penalty or sampling default may make it differ."""
    from transformers import GenerationConfig

    stated = getattr(model, "generation_config", None)
    eos = getattr(stated, "eos_token_id", None)
    if eos is None:
        eos = list(codec.eos_ids) or None
    if isinstance(eos, (list, tuple)) and len(eos) == 1:
        eos = eos[0]
    return GenerationConfig(
        bos_token_id=getattr(stated, "bos_token_id", None), eos_token_id=eos, pad_token_id=codec.pad_id, do_sample=False
    )


def _left_fill(tensor: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """[1, n] -> [1, length]."""
    missing = length - int(tensor.shape[-1])
    return tensor if missing == 0 else torch.nn.functional.pad(tensor, (missing, 0), value=value)


def _joined(parts: Sequence[Mapping[str, torch.Tensor]], pad_crops: bool = False) -> dict[str, torch.Tensor]:
    """Join along the first dimension. `pad_crops`: fill up with zeros where images have different numbers of crops (dimension 1 of 5)."""
    joined = {}
    for key in parts[0]:
        tensors = [part[key] for part in parts]
        if pad_crops and tensors[0].ndim == 5:
            most = max(t.shape[1] for t in tensors)
            tensors = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 0, 0, most - t.shape[1])) for t in tensors]
        try:
            joined[key] = torch.cat(tensors)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
            raise ModelError(
                f"{key}: samples of shapes {shapes} do not make a batch. Use the same frame count for all, or variants.batch: 1."
            ) from error
    return joined


def rename_architecture(spec: ModelSpec, model_type: str, frames_as: str | None) -> ModelSpec:
    """The spec with what was found out on loading: the checkpoint's own model type and how frames are taken."""
    return replace(spec, architecture=model_type if spec.dummy_seed is None else spec.architecture, frames_as=frames_as)
