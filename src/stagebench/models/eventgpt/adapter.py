"""EventGPT as stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stagebench.models import _weights, presets, pruning
from stagebench.models._adapter import TransformersAdapter, check_frames, rename_architecture
from stagebench.models.base import Features, Inputs, ModelSpec, Prompt
from stagebench.models.eventgpt.configuration import EventGptConfig
from stagebench.models.eventgpt.modeling import EventGptForConditionalGeneration
from stagebench.models.eventgpt.processing import EventGptProcessor, clip_processor
from stagebench.models.registry import register

__all__ = ["EventGptAdapter"]


@register("eventgpt")
class EventGptAdapter(TransformersAdapter):
    """Event frames through one batched tower call, then spatio-temporal pooling, then Llama.

    `Inputs.input_ids` holds one -200 where T + P event tokens go, so a prompt is longer than its ids.
    """

    name = "eventgpt"
    model: EventGptForConditionalGeneration
    processor: EventGptProcessor

    def _load_preset(self, spec: ModelSpec) -> None:
        preset = presets.build("eventgpt", spec.preset or "")
        self.model = _weights.random_model(_Own, preset.config, spec, self.device)
        self.codec = preset.codec
        self.processor = EventGptProcessor(clip_processor(preset.config), preset.codec, preset.config.event_token_index)
        self.spec = rename_architecture(spec, "eventgpt", None)

    def _load_folder(self, spec: ModelSpec, folder: Path) -> None:
        self.model = _weights.from_folder(EventGptForConditionalGeneration, folder, spec, self.device)
        self.processor = EventGptProcessor.from_pretrained(folder, self.model.config)
        self.codec = self.processor.codec
        self.spec = rename_architecture(spec, "eventgpt", None)

    def preprocess(self, frames: Sequence[np.ndarray], query: str) -> Inputs:
        check_frames(frames)
        done = self.processor(frames, query, self.spec.prompt)
        return Inputs(done["input_ids"], done["attention_mask"], {"pixel_values": done["pixel_values"]}, visual_counts=(len(frames),))

    @torch.inference_mode()
    def encode(self, inputs: Inputs) -> Features:
        return Features(tuple(self.model.get_event_features(inputs.pixels["pixel_values"])))

    def _preprocess_on_device(self) -> None:
        self.processor.preprocess_on(self.device)

    def _keep_visual(self, share: float) -> None:
        watch, whole = pruning.ClsScores(self.vision_module(), -1), self.model.get_event_features

        def kept_features(pixel_values: torch.Tensor) -> torch.Tensor:
            """[B, T, 3, H, W] -> [B, T + k, D]: the mean over each frame stays; of the P places those go on that CLS attends to most, on
            average over the frames."""
            batch, frames = pixel_values.shape[:2]
            features = whole(pixel_values)
            scores = watch.take().unflatten(0, (batch, frames)).mean(1)  # [B, P - 1]
            kept = pruning.kept_tokens(scores, features.shape[1] - frames, share) + frames  # [B, k]
            chosen = torch.cat([torch.arange(frames, device=kept.device).expand(batch, -1), kept], 1)
            return features.gather(1, chosen[..., None].expand(-1, -1, features.shape[2]))

        self.model.get_event_features = kept_features  # type: ignore[method-assign]

    @torch.inference_mode()
    def merge(self, inputs: Inputs, features: Features) -> Prompt:
        merged = self.model.merge_event_features(inputs.input_ids, inputs.attention_mask, features.embeds)
        return Prompt(*merged, text_ids=inputs.input_ids)

    def vision_module(self) -> nn.Module:
        return self.model.model.visual_tower.encoder

    def _generate(self, inputs: Inputs, arguments: dict[str, Any]) -> torch.Tensor:
        # this model's generate returns new ids only
        return self.model.generate(
            inputs.input_ids, pixel_values=inputs.pixels["pixel_values"], attention_mask=inputs.attention_mask, **arguments
        )


class _Own:
    """`from_config` without the Auto registry."""

    @staticmethod
    def from_config(config: EventGptConfig, **kwargs: Any) -> EventGptForConditionalGeneration:
        return EventGptForConditionalGeneration._from_config(config, **kwargs)
