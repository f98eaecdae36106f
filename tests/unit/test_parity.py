"""Our EventGPT against what the original implementation computes (shared/data/eventgpt_parity)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from stagebench.errors import ModelError
from stagebench.models import registry
from stagebench.models.base import Decoding, ModelSpec
from stagebench.models.eventgpt import PROMPT, EventGptForConditionalGeneration, EventGptProcessor

GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(real_data) -> Path:
    return real_data / "eventgpt_parity"


@pytest.fixture(scope="module")
def expected(folder):
    return load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def facts(folder):
    return json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def model(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def adapter(folder):
    adapter = registry.create("eventgpt")
    adapter.load(ModelSpec(str(folder), "eventgpt"), "cpu")
    return adapter


@pytest.fixture(scope="module")
def images(expected):
    return [expected[f"event_image_{i}"].numpy() for i in range(5)]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_auto_class_loads_it(model, folder):
    assert type(model) is EventGptForConditionalGeneration
    assert model.config.vision_config.hidden_size == 32  # read from the folder that mm_visual_tower names


def test_pixel_values_are_exact(folder, images, expected):
    processor = EventGptProcessor.from_pretrained(folder)
    assert torch.equal(processor.pixel_values(images), expected["pixel_values"])


def test_input_ids_are_exact(folder, images, expected, facts):
    processor = AutoProcessor.from_pretrained(folder)
    done = processor(images, facts["query"])
    assert torch.equal(done["input_ids"][0], expected["input_ids"])
    assert PROMPT.replace("{query}", facts["query"]) == facts["prompt"]
    assert (done["input_ids"] == 1).sum() == 1  # one BOS though the prompt is tokenized in two parts


def test_features_step_by_step(model, expected):
    hidden = model.model.visual_tower(expected["pixel_values"])
    close(hidden, expected["vision_last_hidden"])
    close(model.project(hidden), expected["projected"])
    close(model.adapt(model.project(hidden)), expected["adapted"])
    close(model.get_event_features(expected["pixel_values"][None])[0], expected["st_features"])


def test_wrong_ports_would_be_seen(model, expected, facts):
    """The bound on logits (1e-4) is far below what any wrong port moves them by."""
    assert min(value for name, value in facts["max_abs_logit_change_of_wrong_ports"].items() if name != "right") > 0.1
    twice = model.pool(model.adapt(model.adapt(model.project(expected["vision_last_hidden"])))[None])
    assert (twice[0] - expected["st_features"]).abs().max() > 0.01


def test_embeds_and_prefill_logits(model, expected):
    embeds, mask, positions = model.merge_event_features(expected["input_ids"][None], None, expected["st_features"][None])
    close(embeds[0], expected["inputs_embeds"])
    assert mask.sum() == 151 and positions[0].tolist() == list(range(151))
    for output in (
        model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions),
        model(expected["input_ids"][None], pixel_values=expected["pixel_values"][None]),
    ):
        torch.testing.assert_close(output.logits[0], expected["prefill_logits"], rtol=0, atol=1e-4)


def test_greedy_ids_both_ways(model, expected, facts):
    ids, pixels = expected["input_ids"][None], expected["pixel_values"][None]
    embeds, mask, _ = model.merge_event_features(ids, None, model.get_event_features(pixels))
    wanted = facts["gen_ids"][1:]  # the old transformers put one BOS in front
    assert model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)[0].tolist() == wanted
    assert model.generate(ids, pixel_values=pixels, **GREEDY)[0].tolist() == wanted
    assert model.generate(input_ids=ids, pixel_values=pixels, **GREEDY)[0].tolist() == wanted


def test_stops_at_eos(adapter, images, facts):
    inputs = adapter.preprocess(images, facts["query"])
    eos = facts["eos_used_for_gen_ids_eos"]
    tokens = adapter.monolithic(inputs, Decoding(24, eos_token_ids=(eos,)))
    assert list(tokens.ids[0]) == facts["gen_ids_eos"][1:]
    assert tokens.finish_reasons == ("eos",)


def test_batch_of_two(model, expected):
    """The fixture's second sample has the frames in reverse order."""
    ids, pixels = expected["input_ids"].repeat(2, 1), torch.stack([expected["pixel_values"], expected["pixel_values"].flip(0)])
    embeds, _, _ = model.merge_event_features(ids, None, model.get_event_features(pixels))
    close(embeds, expected["inputs_embeds_batch2"])


def test_adapter_stages(adapter, images, expected, facts):
    inputs = adapter.preprocess(images, facts["query"])
    assert torch.equal(inputs.input_ids[0], expected["input_ids"]) and inputs.visual_counts == (5,)
    features = adapter.encode(inputs)
    assert features.visual_tokens == (22,)
    prompt = adapter.merge(inputs, features)
    close(prompt.embeds[0], expected["inputs_embeds"])
    torch.testing.assert_close(adapter.monolithic_logits(inputs)[0], expected["prefill_logits"][-1], rtol=0, atol=1e-4)
    assert list(adapter.monolithic(inputs, Decoding(24)).ids[0]) == facts["gen_ids"][1:]
    assert "road" in adapter.detokenize(facts["gen_ids"])


def test_batch_with_different_prompts_equals_singles(adapter, images, facts):
    singles = [adapter.preprocess(images, facts["query"]), adapter.preprocess(images[::-1], "Cars?")]
    assert singles[1].input_ids.shape[1] < singles[0].input_ids.shape[1]
    batch = adapter.collate(singles)
    assert batch.attention_mask[1, 0] == 0  # padded on the left
    logits = adapter.monolithic_logits(batch)
    for i, single in enumerate(singles):
        torch.testing.assert_close(logits[i], adapter.monolithic_logits(single)[0], rtol=0, atol=1e-4)
    rows = adapter.monolithic(batch, Decoding(12, 12)).ids
    assert rows == tuple(adapter.monolithic(single, Decoding(12, 12)).ids[0] for single in singles)


def copy_checkpoint(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("expected.*", "events.*"))
    for path in (to, *to.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return to


def test_other_key_layouts_load(folder, model, tmp_path, expected, facts):
    """The layout that 5.x saves for a bare CLIP (no vision_model level), and what our own save_pretrained writes."""
    flat = copy_checkpoint(folder, tmp_path / "flat")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key.replace("visual_tower.vision_model.", "visual_tower."): value for key, value in weights.items()}, flat / "model.safetensors"
    )
    model.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(weights)
    for place in (flat, tmp_path / "saved"):
        again, info = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        wanted = expected["input_ids"][None], expected["pixel_values"][None]
        assert again.generate(wanted[0], pixel_values=wanted[1], **GREEDY)[0].tolist() == facts["gen_ids"][1:]


def test_known_tower_needs_no_download(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "EventChat_llama", "mm_visual_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 4096})
    )
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers, config.vision_config.image_size) == (1024, 24, 336)


def test_unknown_tower_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "EventChat_llama", "mm_visual_tower": "my/tower"}))
    with pytest.raises(ModelError, match="my/tower.*vision_config"):
        AutoConfig.from_pretrained(tmp_path)


def test_missing_weight_is_an_error(folder, tmp_path):
    """transformers fills a missing weight with random numbers and only warns."""
    broken = copy_checkpoint(folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    del weights["model.feature_adaptor.weight"]
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(ModelError, match=r"feature_adaptor\.weight"):
        registry.create("eventgpt").load(ModelSpec(str(broken), "eventgpt"), "cpu")


@pytest.mark.parametrize("prompt", ["no event here: {query}", "<event><event>{query}"])
def test_prompt_needs_one_event(folder, prompt):
    with pytest.raises(ModelError, match="expected one"):
        EventGptProcessor.from_pretrained(folder).tokenize(prompt)


def test_pixel_shape_and_placeholder_count_are_checked(model, expected):
    with pytest.raises(ModelError, match=r"\[B, T, 3, H, W\]"):
        model.get_event_features(expected["pixel_values"])
    with pytest.raises(ModelError, match="expected one a row"):
        model.merge_event_features(torch.tensor([[1, 5, 6]]), None, expected["st_features"][None])
