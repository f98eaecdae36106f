"""Any Hugging Face image or video-text model as stages.

encode: the model's own `get_image_features` / `get_video_features` (tower and projector). merge: features scattered over the placeholders'
embeddings, and the positions that the model's own `generate` would count, so nothing else is needed to run its language model. Position ids
of M-RoPE models (Qwen2.5-VL) come from the token type ids and grids; without them such a model runs, and is silently another model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from stagebench.errors import ModelError
from stagebench.models import _routes, _weights, presets, pruning
from stagebench.models._adapter import TransformersAdapter, check_frames, rename_architecture
from stagebench.models.base import Features, Inputs, ModelSpec, Prompt
from stagebench.models.hooks import find_vision_modules
from stagebench.models.registry import register

__all__ = ["HuggingFaceAdapter"]


@register("hf")
class HuggingFaceAdapter(TransformersAdapter):
    """LLaVA-1.5, Video-LLaVA, and what else `AutoModelForImageTextToText` knows."""

    name = "hf"
    route: _routes.Route
    _share = 1.0

    def _load_preset(self, spec: ModelSpec) -> None:
        from transformers import AutoModelForImageTextToText

        preset = presets.build(spec.architecture, spec.preset or "")
        self.route = _routes.preset_route(preset, spec.frames_as)
        self.model = _weights.random_model(AutoModelForImageTextToText, preset.config, spec, self.device)
        self._prepared(spec)

    def _load_folder(self, spec: ModelSpec, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # an unknown model type is a ValueError, a malformed value one of many kinds
            raise ModelError(f"{folder}: config.json is not one that transformers can use: {error}") from error
        self.route = _routes.load_route(config, folder, spec.frames_as)
        self.model = _weights.from_folder(AutoModelForImageTextToText, folder, spec, self.device)
        self._prepared(spec)

    def _prepared(self, spec: ModelSpec) -> None:
        self.codec = self.route.codec
        self.pad_crops = isinstance(self.route, _routes.ProcessorRoute)
        self.base = getattr(self.model, "model", self.model)
        self.as_video = self.route.frames_as == "video"
        encode = getattr(self.base, "get_video_features" if self.as_video else "get_image_features", None)
        if encode is None:
            raise ModelError(
                f"{type(self.model).__name__} has no get_{'video' if self.as_video else 'image'}_features. Write an adapter for it."
            )
        self._encode = encode
        self._encode_takes = _parameters(encode)
        self._forward_takes = _parameters(self.model.forward)
        self.spec = rename_architecture(spec, self.model.config.model_type, self.route.frames_as)

    @property
    def _has_mrope(self) -> bool:
        return hasattr(self.base, "get_rope_index")

    def preprocess(self, frames: Sequence[np.ndarray], query: str) -> Inputs:
        check_frames(frames)
        inputs = self.route(frames, query, self.spec.prompt)
        pixels = dict(inputs.pixels)
        if "pixel_values_images" in self._encode_takes and "pixel_values" not in self._encode_takes:
            pixels["pixel_values_images"] = pixels.pop("pixel_values")
        extra = {key: value for key, value in inputs.extra.items() if key in self._forward_takes}
        return Inputs(inputs.input_ids, inputs.attention_mask, pixels, extra, inputs.visual_counts)

    @torch.inference_mode()
    def encode(self, inputs: Inputs) -> Features:
        extra = {key: value for key, value in inputs.extra.items() if key in self._encode_takes}
        output = self._encode(**inputs.pixels, **extra, return_dict=True)
        if getattr(output, "deepstack_features", None) is not None:
            raise ModelError(
                f"{type(self.model).__name__} feeds vision features into inner layers (deepstack), which inputs_embeds "
                "cannot carry. Write an adapter for it."
            )
        found = output.pooler_output
        scores = getattr(output, "cls_scores", None)
        if scores is not None:
            return self._pruned(inputs, found, scores)
        # a list of [n_i, D], or one [images, n, D]; a video of Video-LLaVA is [frames, n, D]
        flat = torch.cat([part.flatten(0, -2) for part in found]) if isinstance(found, (list, tuple)) else found.flatten(0, -2)
        counts = (inputs.input_ids == self.route.placeholder_id).sum(dim=1).tolist()
        if sum(counts) != flat.shape[0]:
            raise ModelError(
                f"{type(self.model).__name__}: {flat.shape[0]} features for {sum(counts)} placeholders ({self.route.placeholder_id}). "
                "The preprocessor's image size does not fit the model's: check preprocessor_config.json against config.json."
            )
        return Features(tuple(flat.split(counts)))

    def _preprocess_on_device(self) -> None:
        if not isinstance(self.route, _routes.ClipRoute):
            super()._preprocess_on_device()
        self.route.preprocess_on(self.device)  # type: ignore[attr-defined]

    def _keep_visual(self, share: float) -> None:
        layer = getattr(self.model.config, "vision_feature_layer", None)
        if self._has_mrope or not isinstance(layer, int):
            super()._keep_visual(share)
        watch, whole = pruning.ClsScores(self.vision_module(), int(layer or -1)), self._encode
        self._share = share

        def encode(**arguments: Any) -> SimpleNamespace:
            # the scores are an output: an engine that captures this function in a graph would never run the watching hook again
            output = whole(**arguments)
            deepstack = getattr(output, "deepstack_features", None)
            return SimpleNamespace(pooler_output=output.pooler_output, deepstack_features=deepstack, cls_scores=watch.take())

        self._encode = encode

    def _pruned(self, inputs: Inputs, found: Any, scores: torch.Tensor) -> Features:
        """The tower's features without those left out; `extra["kept"]` says which of a sample's placeholders stay, [k] each."""
        each = torch.stack(list(found)) if isinstance(found, (list, tuple)) else found  # [images, n, D]
        if each.ndim != 3 or len(each) != len(scores):
            raise ModelError(f"{type(self.model).__name__}: features are not one [n, D] an image. Set variants.keep_visual: [1.0].")
        tokens = each.shape[1]
        kept = pruning.kept_tokens(scores, tokens, self._share)  # [images, k]
        chosen = each.gather(1, kept[..., None].expand(-1, -1, each.shape[2]))
        counts = (inputs.input_ids == self.route.placeholder_id).sum(dim=1).tolist()
        images = [count // tokens for count in counts]
        if sum(images) != len(each):
            raise ModelError(f"{type(self.model).__name__}: {len(each)} images for {counts} placeholders of {tokens} an image.")
        places = [
            (k + torch.arange(len(k), device=k.device)[:, None] * tokens).flatten() for k in kept.split(images)
        ]  # among the sample's own placeholders
        return Features(tuple(part.flatten(0, 1) for part in chosen.split(images)), {"kept": tuple(places)})

    @torch.inference_mode()
    def merge(self, inputs: Inputs, features: Features) -> Prompt:
        if "kept" in features.extra:
            inputs = self._narrowed(inputs, features.extra["kept"])
        ids = inputs.input_ids
        places = ids == self.route.placeholder_id
        embeds = self.model.get_input_embeddings()(ids.masked_fill(places, 0))  # a placeholder's id may lie beyond the table
        visual = torch.cat([embed.to(embeds) for embed in features.embeds])
        if visual.shape != (int(places.sum()), embeds.shape[-1]):
            raise ModelError(
                f"features of shape {tuple(visual.shape)} for {int(places.sum())} placeholders of width {embeds.shape[-1]}. "
                "Merge a batch with the features of the same batch."
            )
        embeds = embeds.masked_scatter(places.unsqueeze(-1), visual)
        # token_type_ids: what a prefix-attention model (PaliGemma, Gemma 3) needs to see its image tokens in both directions
        extra = {key: inputs.extra[key] for key in ("token_type_ids",) if key in inputs.extra}
        return Prompt(embeds, inputs.attention_mask, self._positions(inputs), extra, text_ids=ids, placeholder_id=self.route.placeholder_id)

    def _narrowed(self, inputs: Inputs, kept: Sequence[torch.Tensor]) -> Inputs:
        """The inputs without the placeholders of tokens that were left out. Left-padded rows stay so."""
        ids, places = inputs.input_ids, inputs.input_ids == self.route.placeholder_id
        stays = ~places
        for row, chosen in enumerate(kept):
            stays[row, places[row].nonzero()[:, 0][chosen]] = True
        longest = int(stays.sum(1).max())

        def narrow(tensor: torch.Tensor, fill: int) -> torch.Tensor:
            rows = [row[keep] for row, keep in zip(tensor, stays, strict=True)]
            return torch.stack([nn.functional.pad(row, (longest - len(row), 0), value=fill) for row in rows])

        extra = {key: narrow(value, 0) if value.shape == ids.shape else value for key, value in inputs.extra.items()}
        return Inputs(narrow(ids, self.pad_id), narrow(inputs.attention_mask, 0), inputs.pixels, extra, inputs.visual_counts)

    def _positions(self, inputs: Inputs) -> torch.Tensor:
        """[B, L], or [4, B, L] (text, time, height, width) for M-RoPE."""
        if not self._has_mrope:
            return (inputs.attention_mask.cumsum(-1) - 1).clamp_min(0)
        if "mm_token_type_ids" in self._forward_takes and "mm_token_type_ids" not in inputs.extra:
            raise ModelError(
                f"{type(self.model).__name__} takes 3-D positions from mm_token_type_ids and grids, and Inputs.extra has none: it would "
                "run with text positions and answer as another model. Keep what its processor returns."
            )
        return self.model._prepare_position_ids_for_generation(inputs.input_ids, {"attention_mask": inputs.attention_mask, **inputs.extra})

    def _forward_positions(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        # an M-RoPE model's forward counts its own positions, from mask, type ids and grids
        return {} if self._has_mrope else {"position_ids": self._positions(inputs)}

    def vision_module(self) -> nn.Module:
        for name in ("video_tower",) if self.as_video else ("image_tower", "vision_tower", "visual"):
            tower = getattr(self.base, name, None)
            if isinstance(tower, nn.Module):
                return tower
        return next(iter(find_vision_modules(self.model).values()))


def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
