"""Frames and query -> model inputs, for the two kinds of Hugging Face model that `hf` serves.

`ClipRoute`: LLaVA-1.5 and Video-LLaVA. Their preprocessing is CLIP's, done here by PIL: transformers' own processors want torchvision, and
    differ from the original by up to 0.015 with it.
`ProcessorRoute`: any other model, through its own processor, images only. Video processors need torchvision, so frames go in as images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from stagebench.errors import ModelError
from stagebench.models import device_pixels
from stagebench.models._frames import GRID_COLUMNS, arrange, llava_prompt, pad_to_square, video_llava_prompt
from stagebench.models._text import FastCodec, TextCodec, load_codec, load_tokenizer, read_json
from stagebench.models.base import Inputs
from stagebench.models.device_pixels import DevicePixels
from stagebench.models.presets import Preset

__all__ = ["ClipRoute", "ProcessorRoute", "Route"]


class Route(Protocol):
    """Preprocessing of one family."""

    codec: TextCodec
    frames_as: str
    placeholder_id: int
    """The id in input_ids that a visual token replaces."""

    def __call__(self, frames: Sequence[np.ndarray], query: str, prompt: str | None) -> Inputs: ...


class ClipRoute:
    """CLIP preprocessing and placeholder expansion for `llava` and `video_llava`."""

    def __init__(self, config: Any, codec: TextCodec, frames_as: str | None, folder: Path | None = None) -> None:
        self.video_model = config.model_type == "video_llava"
        self.frames_as = _frames_as(config.model_type, frames_as, "video" if self.video_model else "grid", video=self.video_model)
        self.codec = codec
        self.image_processor = _clip_processor(config, folder)
        self.mean_colour = [int(255 * mean) for mean in self.image_processor.image_mean]
        self._on_device: DevicePixels | None = None
        as_video = self.frames_as == "video"
        self.token = "<video>" if as_video else "<image>"
        self.placeholder_id = int(config.video_token_index if as_video else config.image_token_index)
        cut_cls = not as_video and config.vision_feature_select_strategy == "default"  # a video keeps CLS in every frame
        vision = config.vision_config
        self.tokens_each = (vision.image_size // vision.patch_size) ** 2 + (0 if cut_cls else 1)

    def __call__(self, frames: Sequence[np.ndarray], query: str, prompt: str | None) -> Inputs:
        pieces_of = 1 if self.frames_as in ("grid", "first") else len(frames)  # images that the vision tower sees
        template = prompt or (video_llava_prompt if self.video_model else llava_prompt)(self.frames_as)
        as_video = self.frames_as == "video"
        pieces = 1 if as_video else pieces_of
        text = fill_template(template, query, len(frames), self.token, pieces, behind="\n")
        each = self.tokens_each * (pieces_of if as_video else 1)
        ids = torch.tensor([_expanded(self.codec.encode(text, special=True), self.placeholder_id, each)])
        pixels = self._pixels(frames) if self._on_device is None else self._on_device(frames)  # [n, 3, S, S]
        # transformers 5.17 calls Video-LLaVA's image argument pixel_values_images; the adapter renames it there
        named = {"pixel_values_videos": pixels[None]} if as_video else {"pixel_values": pixels}
        return Inputs(ids, torch.ones_like(ids), named, visual_counts=(pieces,))

    def _pixels(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        images = arrange(frames, self.frames_as)
        if self.frames_as == "grid":
            # a grid of 8 is 2.7 times as wide as high: CLIP's centre crop would cut off its outer columns, half of the frames
            images = [pad_to_square(image, self.mean_colour) for image in images]
        done = self.image_processor(images, return_tensors="np", input_data_format="channels_last")["pixel_values"]
        return torch.from_numpy(np.ascontiguousarray(done, dtype=np.float32))

    def preprocess_on(self, device: torch.device) -> None:
        """Pixels are made on the device from here on. Raises ModelError for an image processor with other steps than CLIP's."""

        def arranged(frames: list[torch.Tensor]) -> list[torch.Tensor]:
            if self.frames_as == "grid":
                return [device_pixels.pad_to_square(device_pixels.frame_grid(frames, GRID_COLUMNS), self.mean_colour)]
            return frames[:1] if self.frames_as == "first" else frames

        self._on_device = DevicePixels(self.image_processor, device, arranged)


class ProcessorRoute:
    """A transformers processor without its video part."""

    def __init__(self, config: Any, processor: Any, frames_as: str | None, prompt: str | None, image: str | None) -> None:
        self.frames_as = _frames_as(config.model_type, frames_as, "images", video=False)
        self.processor, self.prompt, self.image = processor, prompt, image
        self.codec: TextCodec = FastCodec(processor.tokenizer)
        found = getattr(config, "image_token_id", None)
        if found is None:
            found = getattr(config, "image_token_index", None)
        if found is None:
            raise ModelError(
                f"{config.model_type}: its config names no image_token_id, so its placeholders cannot be found. Write an adapter for it."
            )
        self.placeholder_id = int(found)

    @classmethod
    def of_preset(cls, preset: Preset, frames_as: str | None) -> ProcessorRoute:
        return cls(preset.config, _preset_processor(preset), frames_as, preset.prompt, preset.image_token)

    @classmethod
    def of_folder(cls, config: Any, folder: Path, frames_as: str | None) -> ProcessorRoute:
        kind = image_only(_processor_class(config.model_type, folder))
        try:
            processor = kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers raises many kinds; all mean that this processor cannot be had here
            raise ModelError(
                f"{folder}: the processor of {config.model_type} cannot be built ({type(error).__name__}: {error}). "
                "Check that preprocessor_config.json and the tokenizer's files are there."
            ) from error
        return cls(config, processor, frames_as, None, None)

    def __call__(self, frames: Sequence[np.ndarray], query: str, prompt: str | None) -> Inputs:
        images = arrange(frames, self.frames_as)
        text = self._text(query, len(frames), len(images), prompt)
        done = self.processor(
            text=[text], images=[[Image.fromarray(image) for image in images]], return_tensors="pt"
        )  # nested: the images of one sample
        named = {key: value for key, value in done.items() if isinstance(value, torch.Tensor)}
        ids, mask = named.pop("input_ids"), named.pop("attention_mask")
        pixels = {key: named.pop(key) for key in list(named) if key.startswith("pixel_values")}
        return Inputs(ids, mask, pixels, named, visual_counts=(len(images),))

    def _text(self, query: str, n: int, images: int, prompt: str | None) -> str:
        template = prompt or self.prompt
        if template is not None:
            return fill_template(template, query, n, self.image or self.processor.image_token, images)
        if not getattr(self.processor, "chat_template", None):
            raise ModelError("the checkpoint has no chat template. Set models.<name>.prompt with {images} and {query}.")
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": query}]
        return str(self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False))


def fill_template(template: str, query: str, n: int, token: str, count: int, behind: str = "") -> str:
    """Put query, frame count and placeholders into a template; braces in a query stay as they are.

    A template names its images by `{images}`, or holds one placeholder that is repeated. Raises ModelError when neither is there, or
    when the query holds a placeholder.
    """
    if token in query:
        raise ModelError(f"the query holds {token}, which stands for visual input. Take it out of the query.")
    text = template.replace("{n}", str(n))
    if "{images}" in text:
        text = text.replace("{images}", (token + behind) * count)
    elif text.count(token) == 1 and count > 1:
        text = text.replace(token, behind.join([token] * count))
    if text.count(token) != count:
        raise ModelError(f"the prompt {template!r} has {text.count(token)} of {token}: expected {count}. Use {{images}} where they go.")
    return text.replace("{query}", query)


def image_only(kind: Any) -> Any:
    """The processor class with image processor (by PIL) and tokenizer only: its video part would need torchvision to be built.

    PIL also where torchvision is installed: its resize gives other pixels, and a study's machines must agree.
    """
    parts = [name for name in kind.get_attributes() if name in ("image_processor", "tokenizer")]

    def load_parts(_: Any, folder: Any, *__: Any, **___: Any) -> list[Any]:
        make = {"image_processor": _pil_image_processor, "tokenizer": load_tokenizer}
        return [make[name](Path(folder)) for name in parts]

    members = {"get_attributes": classmethod(lambda _: parts), "_get_arguments_from_pretrained": classmethod(load_parts)}
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__})


def _pil_image_processor(folder: Path) -> Any:
    """The folder's image processor, as its PIL class. `AutoImageProcessor` alone would need torchvision in transformers 5.17."""
    import transformers

    stated = read_json(folder / "preprocessor_config.json") or read_json(folder / "processor_config.json").get("image_processor", {})
    name = str(stated.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    kind = getattr(transformers, f"{name}Pil", None)
    if kind is not None:
        return kind.from_pretrained(folder)
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


def _frames_as(model_type: str, asked: str | None, default: str, *, video: bool) -> str:
    chosen = asked or default
    if chosen == "video" and not video:
        raise ModelError(
            f"{model_type}: frames_as: video is not available (its video processor needs torchvision, or it takes images only). "
            "Set models.<name>.frames_as to images, grid or first."
        )
    return chosen


def _expanded(ids: list[int], placeholder: int, count: int) -> list[int]:
    return [token for i in ids for token in ([i] * count if i == placeholder else [i])]


def _clip_processor(config: Any, folder: Path | None) -> Any:
    from transformers import CLIPImageProcessorPil

    if folder is not None and (folder / "preprocessor_config.json").is_file():
        return CLIPImageProcessorPil.from_pretrained(folder)
    edge = int(config.vision_config.image_size)
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})


def _processor_class(model_type: str, folder: Path) -> Any:
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ModelError(
            f"{folder}: transformers {transformers.__version__} has no processor for {model_type}. Update it, or write an adapter."
        )
    return getattr(transformers, name if isinstance(name, str) else name[0])


def _preset_processor(preset: Preset) -> Any:
    import transformers

    config, tokenizer = preset.config, preset.codec.tokenizer
    tiny = preset.name == "tiny"
    if preset.architecture == "qwen2_5_vl":
        size = {"shortest_edge": 56 * 56, "longest_edge": (112 * 112 if tiny else 28 * 28 * 1280)}
        return image_only(transformers.Qwen2_5_VLProcessor)(transformers.Qwen2VLImageProcessorPil(size=size), tokenizer)
    edge = config.vision_config.image_size
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": edge, "width": edge}, image_grid_pinpoints=config.image_grid_pinpoints
    )
    return image_only(transformers.LlavaOnevisionProcessor)(
        images,
        tokenizer,
        num_image_tokens=(edge // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
    )


def load_route(config: Any, folder: Path, frames_as: str | None) -> Route:
    """The route of a checkpoint folder."""
    clip = getattr(getattr(config, "vision_config", None), "model_type", "") == "clip_vision_model"
    if config.model_type in ("llava", "video_llava") and clip:
        codec = load_codec(folder)
        return ClipRoute(config, codec, frames_as, folder)
    return ProcessorRoute.of_folder(config, folder, frames_as)


def preset_route(preset: Preset, frames_as: str | None) -> Route:
    """The route of a preset."""
    if preset.architecture in ("llava", "video_llava"):
        return ClipRoute(preset.config, preset.codec, frames_as)
    return ProcessorRoute.of_preset(preset, frames_as)
