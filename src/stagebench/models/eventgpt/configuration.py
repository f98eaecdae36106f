"""Configuration of EventGPT, in the published checkpoint's terms."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig

from stagebench.errors import ModelError

__all__ = ["EVENT_TOKEN_INDEX", "EventGptConfig"]

EVENT_TOKEN_INDEX = -200
"""Stands in `input_ids` where the event tokens go."""

_KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
_KNOWN_TOWERS["openai/clip-vit-large-patch14"] = {**_KNOWN_TOWERS["openai/clip-vit-large-patch14-336"], "image_size": 224}


class EventGptConfig(LlamaConfig):
    """A Llama configuration and the vision tower's.

    mm_visual_tower: the published name of the tower (its shape is known here, nothing is downloaded), or a folder with a CLIP
        `config.json`, absolute or relative to the checkpoint.
    vision_config: the tower's shape; read from `mm_visual_tower` where the checkpoint does not state it.
    event_feature_adaptor: whether the linear adaptor follows the projector.

    The published `config.json` calls its model type `EventChat_llama`.
    """

    model_type = "EventChat_llama"
    sub_configs = {"vision_config": CLIPVisionConfig}  # noqa: RUF012 - transformers declares it as a plain class attribute

    mm_visual_tower: str | None = None
    vision_config: dict | PreTrainedConfig | None = None
    event_feature_adaptor: bool = True
    event_token_index: int = EVENT_TOKEN_INDEX

    def __post_init__(self, **kwargs: Any) -> None:
        # by the time a config is built from a folder, from_dict has put vision_config there
        vision = self.vision_config
        if vision is None and self.mm_visual_tower in _KNOWN_TOWERS:
            vision = _KNOWN_TOWERS[self.mm_visual_tower]
        if isinstance(vision, dict):
            vision = CLIPVisionConfig(**vision)
        self.vision_config = vision
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        folder = kwargs.get("name_or_path") or config_dict.get("_name_or_path")
        return super().from_dict(_with_vision_config(config_dict, folder), **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _with_vision_config(found, pretrained_model_name_or_path), unused


def _with_vision_config(config: dict[str, Any], folder: str | os.PathLike | None) -> dict[str, Any]:
    """The same configuration with the tower's shape in it, read from the folder that `mm_visual_tower` names."""
    tower = config.get("mm_visual_tower")
    if config.get("vision_config") is not None or not tower:
        return config
    base = Path(folder) if folder and Path(folder).is_dir() else Path()
    path = base / tower / "config.json"  # an absolute tower path replaces the base
    if path.is_file():
        stated = json.loads(path.read_text(encoding="utf-8"))
        return {**config, "vision_config": stated.get("vision_config", stated)}  # a whole CLIP's config nests the tower's
    if tower in _KNOWN_TOWERS:
        return {**config, "vision_config": _KNOWN_TOWERS[tower]}
    raise ModelError(
        f"mm_visual_tower {tower!r}: neither a folder with a config.json beside the checkpoint ({path}) nor one of "
        f"{sorted(_KNOWN_TOWERS)}. Put the CLIP folder there, or state vision_config in the checkpoint's config.json."
    )
