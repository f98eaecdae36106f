"""Shapes of the presets: the published ones, and tiny ones that keep the same structure.

Sources: the `config.json` of llava-hf/llava-1.5-7b-hf, LanguageBind/Video-LLaVA-7B-hf, EventGPT-7b, Qwen/Qwen2.5-VL-7B-Instruct and
llava-hf/llava-onevision-qwen2-7b-ov-hf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["SHAPES", "SPECIALS"]

_LLAMA = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
}
_LLAMA_COMMON = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
_QWEN2 = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
}
_CLIP = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 64},
    "7b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768},
}
_TINY_EDGE = 56  # pixels; 16 patches of 14

_QWEN_WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

SPECIALS: dict[str, Callable[[int], dict[str, int]]] = {
    "llava": lambda base: {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": base, "<pad>": base + 1},
    "video_llava": lambda base: {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": base, "<video>": base + 1, "<pad>": base + 2},
    "eventgpt": lambda base: {"<unk>": 0, "<s>": 1, "</s>": 2, "<ev_start>": base, "<ev_end>": base + 1},
    "qwen2_5_vl": lambda base: (
        dict(zip(_QWEN_WORDS, range(base, base + 3), strict=True))
        | {"<|vision_start|>": base + 9, "<|vision_end|>": base + 10, "<|image_pad|>": base + 12, "<|video_pad|>": base + 13}
    ),
    "llava_onevision": lambda base: dict(zip(_QWEN_WORDS, range(base, base + 3), strict=True)) | {"<image>": base + 3, "<video>": base + 4},
}
"""Special tokens and their ids behind (or, for Llama's first three, in front of) a vocabulary of `base` pieces."""


def llava(preset: str, base: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    edge = _TINY_EDGE if preset == "tiny" else 336
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**_CLIP[preset], image_size=edge, patch_size=14),
        text_config=LlamaConfig(**_LLAMA[preset], **_LLAMA_COMMON, vocab_size=base + 64, pad_token_id=base + 1),
        image_token_index=base,
        image_seq_length=(edge // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def video_llava(preset: str, base: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig

    edge = _TINY_EDGE if preset == "tiny" else 224
    patches = (edge // 14) ** 2
    return VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**_CLIP[preset], image_size=edge, patch_size=14),
        text_config=LlamaConfig(**_LLAMA[preset], **_LLAMA_COMMON, vocab_size=base + 64, pad_token_id=base + 2),
        image_token_index=base,
        video_token_index=base + 1,
        image_seq_length=patches,
        video_seq_length=8 * (patches + 1),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def eventgpt(preset: str, base: int) -> Any:
    from stagebench.models.eventgpt.configuration import EventGptConfig

    edge = _TINY_EDGE if preset == "tiny" else 336
    return EventGptConfig(
        **_LLAMA[preset],
        **_LLAMA_COMMON,
        vocab_size=base + 2,
        pad_token_id=0,
        vision_config={**_CLIP[preset], "image_size": edge, "patch_size": 14},
        event_feature_adaptor=True,
    )


def qwen2_5_vl(preset: str, base: int) -> Any:
    from transformers import Qwen2_5_VLConfig

    tiny = preset == "tiny"
    special = SPECIALS["qwen2_5_vl"](base)
    text = {
        **_QWEN2[preset],
        "vocab_size": base + 64 if tiny else 152064,
        "max_position_embeddings": 4096 if tiny else 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3] if tiny else [16, 24, 24]},
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 2 if tiny else 32,
        "hidden_size": 64 if tiny else 1280,
        "intermediate_size": 128 if tiny else 3420,
        "num_heads": 4 if tiny else 16,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1] if tiny else [7, 15, 23, 31],
        "window_size": _TINY_EDGE if tiny else 112,
        "patch_size": 14,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def llava_onevision(preset: str, base: int) -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    tiny = preset == "tiny"
    special = SPECIALS["llava_onevision"](base)
    vision = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": _TINY_EDGE}
        if tiny
        else {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384}
    )
    text = {
        **_QWEN2[preset],
        "vocab_size": base + 64 if tiny else 152000,
        "max_position_embeddings": 4096 if tiny else 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
        "tie_word_embeddings": False,
    }
    steps = range(1, 3 if tiny else 7)
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, patch_size=14, vision_use_head=False),
        text_config=Qwen2Config(**text),
        image_token_index=special["<image>"],
        video_token_index=special["<video>"],
        image_grid_pinpoints=[[h * vision["image_size"], w * vision["image_size"]] for h in steps for w in steps],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


SHAPES: dict[str, Callable[[str, int], Any]] = {
    "eventgpt": eventgpt,
    "llava": llava,
    "video_llava": video_llava,
    "qwen2_5_vl": qwen2_5_vl,
    "llava_onevision": llava_onevision,
}
"""(preset, vocabulary without specials) -> the model's configuration."""
