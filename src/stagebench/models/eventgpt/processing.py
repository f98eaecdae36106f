"""Event frames and a query -> pixel values and token ids, as EventGPT takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stagebench.errors import ModelError
from stagebench.models._text import TextCodec, load_codec
from stagebench.models.device_pixels import DevicePixels
from stagebench.models.eventgpt.configuration import EventGptConfig

__all__ = ["EVENT_TOKEN", "PROMPT", "EventGptProcessor"]

EVENT_TOKEN = "<event>"  # noqa: S105 - a placeholder in a prompt, not a secret
PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
    "to the human's questions. USER: <ev_start><event><ev_end>\n{query} ASSISTANT:"
)


class EventGptProcessor:
    """CLIP preprocessing by PIL (bit-identical to the original's, without torchvision) and the prompt, split at `<event>`."""

    def __init__(self, image_processor: Any, codec: TextCodec, event_token_index: int) -> None:
        self.image_processor = image_processor
        self.codec = codec
        self.event_token_index = event_token_index
        self._on_device: DevicePixels | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: EventGptConfig | None = None, **_: Any) -> EventGptProcessor:
        """From a checkpoint folder: its tokenizer, and the tower's `preprocessor_config.json` where there is one."""
        folder = Path(folder)
        config = config or EventGptConfig.from_pretrained(folder)
        return cls(clip_processor(config, folder), load_codec(folder), config.event_token_index)

    def __call__(self, frames: Sequence[np.ndarray], query: str, prompt: str | None = None) -> dict[str, torch.Tensor]:
        """uint8 RGB frames [H, W, 3] of any sizes -> pixel_values [1, T, 3, S, S] float32, input_ids and attention_mask [1, L] int64."""
        ids = self.tokenize((prompt or PROMPT).replace("{query}", query))
        return {"pixel_values": self.pixel_values(frames)[None], "input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}

    def pixel_values(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        """[T, 3, S, S] float32: shortest edge resized (bicubic), centre crop, CLIP's mean and standard deviation."""
        if self._on_device is not None:
            return self._on_device(frames)
        done = self.image_processor(list(frames), return_tensors="np", input_data_format="channels_last")["pixel_values"]
        return torch.from_numpy(np.ascontiguousarray(done, dtype=np.float32))

    def preprocess_on(self, device: torch.device) -> None:
        """Pixels are made on the device from here on. Raises ModelError for an image processor with other steps than CLIP's."""
        self._on_device = DevicePixels(self.image_processor, device)

    def tokenize(self, prompt: str) -> torch.Tensor:
        """[L] int64 with -200 for `<event>`; one BOS, in front. Raises ModelError unless the prompt has exactly one `<event>`."""
        parts = prompt.split(EVENT_TOKEN)
        if len(parts) != 2:
            raise ModelError(
                f"the prompt has {len(parts) - 1} {EVENT_TOKEN}: expected one. "
                "Keep <ev_start><event><ev_end> in models.<name>.prompt, and none in queries."
            )
        before, after = (self.codec.encode(part, special=i == 0) for i, part in enumerate(parts))
        return torch.tensor([*before, self.event_token_index, *after], dtype=torch.int64)


def clip_processor(config: EventGptConfig, folder: Path | None = None) -> Any:
    """The tower's image processor: its stated settings, or CLIP's own at the tower's image size."""
    from transformers import CLIPImageProcessorPil

    if folder is not None:
        for place in (folder / (config.mm_visual_tower or ""), folder):
            if (place / "preprocessor_config.json").is_file():
                return CLIPImageProcessorPil.from_pretrained(place)
    vision: Any = config.vision_config
    edge = int(vision.image_size)
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
