"""Preset tokenizers and shapes: prompt lengths as published, any text there and back."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagebench.errors import ModelError
from stagebench.models import _routes, presets
from stagebench.models._tokenizer import STANDARD_QUERY, TEMPLATES
from stagebench.models.eventgpt import PROMPT

FRAMES = [np.zeros((48, 64, 3), np.uint8)] * 8


def test_published_prompt_lengths_of_the_frame_models():
    """598 and 2078 tokens for the standard query at full size; no weights are needed to know."""
    for architecture, wanted, visual in (("llava", 598, 576), ("video_llava", 2078, 2056)):
        preset = presets.build(architecture, "7b")
        route = _routes.preset_route(preset, None)
        inputs = route(FRAMES, STANDARD_QUERY, None)
        assert inputs.input_ids.shape == (1, wanted)
        assert int((inputs.input_ids == route.placeholder_id).sum()) == visual
        assert int((inputs.input_ids == 1).sum()) == 1 and inputs.input_ids[0, 0] == 1


def test_published_prompt_length_of_eventgpt():
    """642: 60 ids of text and 5 + 577 event tokens."""
    preset = presets.build("eventgpt", "7b")
    before, after = PROMPT.replace("{query}", STANDARD_QUERY).split("<event>")
    text = preset.codec.encode(before, special=True) + preset.codec.encode(after, special=False)
    vision = preset.config.vision_config
    assert len(text) + 5 + (vision.image_size // vision.patch_size) ** 2 + 1 == 642


def test_standard_query_costs_nine_tokens_everywhere():
    for architecture in ("llava", "video_llava", "eventgpt"):
        assert len(presets.build(architecture, "tiny").codec.encode(" " + STANDARD_QUERY, special=False)) == 9


def test_a_longer_query_costs_more():
    codec = presets.build("video_llava", "tiny").codec
    short, long = (
        len(codec.encode(text, special=False)) for text in ("What is moving?", "What is moving, and in which direction is it going?")
    )
    assert short == 4 and long > short


@pytest.mark.parametrize("architecture", ["llava", "video_llava", "eventgpt"])
def test_templates_are_cut_as_stated(architecture):
    codec = presets.build(architecture, "tiny").codec
    text = "".join(TEMPLATES[architecture])
    pieces = [codec.decode([i]) for i in codec.encode(text, special=False)]
    assert pieces == list(TEMPLATES[architecture])


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_any_text_there_and_back(text):
    codec = presets.build("eventgpt", "tiny").codec
    if any(special in text for special in ("<unk>", "<s>", "</s>", "<ev_")):
        return
    assert codec.decode(codec.encode(text, special=False)) == text


def test_every_id_decodes_to_something_readable():
    codec = presets.build("llava", "tiny").codec
    ids = list(range(300, 32000))
    text = codec.decode(ids)
    assert len(codec.tokenizer) == 32002 and text.isprintable()
    assert len(text) > 2.5 * len(ids)


def test_vocabulary_is_the_same_in_another_process():
    command = "from stagebench.models import presets; print(presets.build('video_llava', 'tiny').codec.digest())"
    other = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    ).stdout.strip()
    assert other == presets.build("video_llava", "tiny").codec.digest()


def test_tokenizer_digests_tell_tokenizers_apart():
    digests = {presets.build(a, "tiny").codec.digest() for a in ("llava", "video_llava", "eventgpt")}
    assert len(digests) == 3


@pytest.mark.parametrize("architecture", presets.ARCHITECTURES)
def test_full_size_has_the_published_parameter_count(architecture):
    """In billions, towers included; built on the meta device, so nothing is allocated."""
    from transformers import AutoModelForImageTextToText

    from stagebench.models.eventgpt import EventGptForConditionalGeneration

    config = presets.build(architecture, "7b").config
    with torch.device("meta"):
        if architecture == "eventgpt":
            model = EventGptForConditionalGeneration._from_config(config)
        else:
            model = AutoModelForImageTextToText.from_config(config)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    wanted = {"eventgpt": 7.08, "llava": 7.06, "video_llava": 7.37, "qwen2_5_vl": 8.29, "llava_onevision": 8.03}[architecture]
    assert billions == pytest.approx(wanted, abs=0.02)


def test_unknown_names_list_the_known():
    with pytest.raises(ModelError, match="qwen2_5_vl"):
        presets.build("gpt", "tiny")
    with pytest.raises(ModelError, match="tiny, 7b"):
        presets.build("llava", "13b")
