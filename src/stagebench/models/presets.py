"""Models that need no download: published shapes (`7b`) and tiny ones, each with a tokenizer and a processor built in code.

With random weights a model's time is that of the real one, since no kernel's time depends on the weights' values, and its answers mean
nothing. Prompt lengths are kept as published (see `_tokenizer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from stagebench.errors import ModelError
from stagebench.models._shapes import SHAPES, SPECIALS
from stagebench.models._text import FastCodec
from stagebench.models._tokenizer import STANDARD_QUERY, build_tokenizer

__all__ = ["ARCHITECTURES", "PRESETS", "STANDARD_QUERY", "Preset", "build"]

ARCHITECTURES = tuple(SHAPES)
PRESETS = ("tiny", "7b")

_LLAMA_BASE, _QWEN_BASE = 32000, 151643


@dataclass(frozen=True)
class Preset:
    """One shape, ready to be filled with random weights."""

    architecture: str
    name: str
    config: Any
    """transformers configuration."""
    codec: FastCodec
    prompt: str | None = None
    """For models served through a transformers processor: template with {images} and {query}."""
    image_token: str | None = None
    """What {images} repeats, once an image."""


def build(architecture: str, preset: str) -> Preset:
    """The preset's configuration and tokenizer. Raises ModelError naming the known ones."""
    if architecture not in SHAPES:
        raise ModelError(
            f"architecture {architecture!r} has no preset. Set models.<name>.architecture to one of {', '.join(ARCHITECTURES)}, "
            "or models.<name>.weights to a checkpoint's folder."
        )
    if preset not in PRESETS:
        raise ModelError(f"preset {preset!r} of {architecture} is unknown. Set models.<name>.preset to one of {', '.join(PRESETS)}.")
    qwen = architecture in ("qwen2_5_vl", "llava_onevision")
    base = _QWEN_BASE if qwen and preset == "7b" else _LLAMA_BASE
    codec = FastCodec(_tokenizer(architecture, base))
    config = SHAPES[architecture](preset, base)  # a new one each time: loading a model writes into it
    prompt, image = _PROMPTS.get(architecture, (None, None))
    return Preset(architecture, preset, config, codec, prompt, image)


_PROMPTS = {
    "qwen2_5_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{images}{query}<|im_end|>\n<|im_start|>assistant\n",
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "llava_onevision": ("<|im_start|>user {images}\n{query}<|im_end|><|im_start|>assistant\n", "<image>"),
}


@lru_cache(maxsize=8)
def _tokenizer(architecture: str, base: int) -> Any:
    specials = tuple(SPECIALS[architecture](base).items())
    if architecture in ("qwen2_5_vl", "llava_onevision"):
        return build_tokenizer("qwen", base, specials, None, "<|im_end|>", "<|endoftext|>")
    pad = "<unk>" if architecture == "eventgpt" else "<pad>"
    return build_tokenizer(architecture, base, specials, "<s>", "</s>", pad, "<unk>")
