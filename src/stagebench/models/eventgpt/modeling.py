"""EventGPT for transformers 5: a CLIP tower over event frames, projector, adaptor, spatio-temporal pooling, and Llama.

Shapes: B batch, T event frames, P vision tokens of a frame (CLS + patches), C width of the tower, D width of the language model,
L prompt length with one placeholder id, N = T + P event tokens. Written from the published checkpoint's layout and outputs; the parity
fixture of the tests holds what the original computes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPVisionModel, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from stagebench.errors import ModelError
from stagebench.models.eventgpt.configuration import EventGptConfig

__all__ = ["EventGptForConditionalGeneration", "EventGptModel", "register"]


_TOWER = "model.visual_tower.visual_tower."
_WITHOUT_LEVEL = {
    rf"^{re.escape(_TOWER)}{part}": f"{_TOWER}vision_model.{part}" for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
}


class EventVisualTower(nn.Module):
    """CLIP under the published key names: `visual_tower.visual_tower.vision_model.*`.

    `CLIPVisionModel` has no `vision_model` level of its own in transformers 5, hence the container.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.visual_tower = nn.ModuleDict({"vision_model": CLIPVisionModel._from_config(config)})

    @property
    def encoder(self) -> CLIPVisionModel:
        """The tower itself."""
        return self.visual_tower["vision_model"]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B*T, 3, H, W] -> [B*T, P, C]: the last hidden state, CLS kept, without the post-layernorm."""
        return self.encoder(pixel_values).last_hidden_state


class EventGptModel(LlamaModel):
    """Llama's decoder with the visual side beside it, as the published checkpoint lays it out."""

    config_class = EventGptConfig

    def __init__(self, config: EventGptConfig) -> None:
        if config.vision_config is None:
            raise ModelError(
                "EventGptConfig has no vision_config. Give it, or load the config from a checkpoint folder whose mm_visual_tower names "
                "a CLIP folder."
            )
        super().__init__(config)
        vision: Any = config.vision_config
        width, inner = config.hidden_size, vision.hidden_size
        self.visual_tower = EventVisualTower(vision)
        self.visual_projector = nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width))
        if config.event_feature_adaptor:
            self.feature_adaptor = nn.Linear(width, width)
        self.post_init()


class EventGptForConditionalGeneration(LlamaForCausalLM):
    """Llama that reads event frames where `input_ids` holds the placeholder -200.

    `generate(input_ids, pixel_values=...)` and `generate(inputs_embeds=...)` both return new tokens only, as the original does.
    """

    config_class = EventGptConfig

    def __init__(self, config: EventGptConfig) -> None:
        # not LlamaForCausalLM's own __init__: it would build and initialise a 7B decoder only to be replaced
        super(LlamaForCausalLM, self).__init__(config)
        self.model = EventGptModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`; the tower's keys may have the published `vision_model` level, or, as 5.x saves a CLIP, not."""
        return super().from_pretrained(*args, key_mapping={**_WITHOUT_LEVEL, **(key_mapping or {})}, **kwargs)

    def get_event_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, T, 3, H, W] -> [B, T + P, D]; all B*T frames go through the tower in one batch.

        Raises ModelError for another number of dimensions.
        """
        if pixel_values.ndim != 5:
            raise ModelError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: expected [B, T, 3, H, W]. Add the missing batch or frame dimension."
            )
        batch, frames = pixel_values.shape[:2]
        hidden = self.model.visual_tower(pixel_values.flatten(0, 1).to(self.lm_head.weight.dtype))  # [B*T, P, C]
        return self.pool(self.adapt(self.project(hidden)).unflatten(0, (batch, frames)))

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., D]: Linear, GELU, Linear."""
        return self.model.visual_projector(hidden)

    def adapt(self, projected: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.model.feature_adaptor(projected) if self.config.event_feature_adaptor else projected

    @staticmethod
    def pool(features: torch.Tensor) -> torch.Tensor:
        """[B, T, P, D] -> [B, T + P, D]: each frame's mean over its tokens, then each token's mean over the frames."""
        return torch.cat([features.mean(dim=2), features.mean(dim=1)], dim=1)

    def merge_event_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, features: Sequence[torch.Tensor] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Put features where the placeholder stands.

        input_ids: [B, L] with one -200 a row. features: [N, D] a row. Returns embeds [B, L - 1 + N, D], mask and positions
        [B, L - 1 + N]; shorter rows are padded on the left. Raises ModelError when a row has not exactly one placeholder.
        """
        index = self.config.event_token_index
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        found = (input_ids == index).sum(dim=1).tolist()
        if any(count != 1 for count in found) or len(features) != len(found):
            raise ModelError(
                f"{found} placeholders ({index}) in the rows of input_ids for {len(features)} feature tensors: expected one a row. "
                "Build the prompt with the processor, with one <event>."
            )
        embedding = self.get_input_embeddings()
        text = embedding(input_ids.clamp_min(0))  # [B, L, D]; the placeholder's own row is cut out below
        places = (input_ids == index).int().argmax(dim=1).tolist()
        rows = [torch.cat([row[:at], feature.to(row), row[at + 1 :]]) for row, at, feature in zip(text, places, features, strict=True)]
        masks = [
            torch.cat([mask[:at], mask.new_ones(len(feature)), mask[at + 1 :]])
            for mask, at, feature in zip(attention_mask, places, features, strict=True)
        ]
        embeds, mask = _left_pad(rows), _left_pad(masks)
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return embeds, mask, positions

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Llama's forward; `pixel_values` [B, T, 3, H, W] with `input_ids` are encoded and merged first."""
        if pixel_values is not None and inputs_embeds is None and input_ids is not None:
            features = self.get_event_features(pixel_values)
            inputs_embeds, attention_mask, position_ids = self.merge_event_features(input_ids, attention_mask, features)
            input_ids = None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`; with `pixel_values` the prompt is encoded and merged once, before its loop."""
        pixel_values = kwargs.pop("pixel_values", None)
        ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if pixel_values is None:
            if ids is not None:
                kwargs["inputs" if inputs is not None else "input_ids"] = ids
            return super().generate(**kwargs)
        features = self.get_event_features(pixel_values)
        embeds, mask, positions = self.merge_event_features(ids, kwargs.pop("attention_mask", None), features)
        return super().generate(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **kwargs)


def _left_pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """[n_i, ...] tensors -> [B, max n, ...] with zeros in front of the shorter ones."""
    longest = max(len(row) for row in rows)
    return torch.stack(
        [row if len(row) == longest else torch.cat([row.new_zeros(longest - len(row), *row.shape[1:]), row]) for row in rows]
    )


def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know the model. Importing `stagebench.models.eventgpt` does it."""
    AutoConfig.register(EventGptConfig.model_type, EventGptConfig, exist_ok=True)
    AutoModel.register(EventGptConfig, EventGptModel, exist_ok=True)
    AutoModelForCausalLM.register(EventGptConfig, EventGptForConditionalGeneration, exist_ok=True)
