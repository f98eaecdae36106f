"""All families at tiny fp32: decoupled equals monolithic, one encoder call, batches equal singles."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from stagebench.errors import ModelError
from stagebench.models import registry
from stagebench.models._adapter import cut_at_eos
from stagebench.models._frames import arrange, frame_grid, pad_to_square
from stagebench.models._routes import fill_template
from stagebench.models.base import Adapter, Decoding, Features, ModelSpec
from stagebench.models.hooks import EncoderCounter, VisionTimingHooks

CASES = {
    "eventgpt": ("eventgpt", "eventgpt", None, 5),
    "llava-grid": ("hf", "llava", None, 8),
    "llava-images": ("hf", "llava", "images", 3),
    "llava-first": ("hf", "llava", "first", 3),
    "video_llava": ("hf", "video_llava", None, 8),
    "video_llava-images": ("hf", "video_llava", "images", 3),
    "qwen2_5_vl": ("hf", "qwen2_5_vl", None, 3),
    "qwen2_5_vl-grid": ("hf", "qwen2_5_vl", "grid", 3),
    "llava_onevision": ("hf", "llava_onevision", None, 3),
    "llava_onevision-grid": ("hf", "llava_onevision", "grid", 3),
}
QUERIES = (
    "What are the key elements in this scene?",
    "Describe the road.",
    "Is there any pedestrian near the crossing, and what does the light show?",
)
TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    adapter_name, architecture, frames_as, count = CASES[request.param]
    adapter = registry.create(adapter_name)
    adapter.load(ModelSpec("dummy:0", architecture, "tiny", frames_as=frames_as), "cpu")
    rng = np.random.default_rng(0)
    # the three samples have different sizes, so image processors have work to do
    clips = [[rng.integers(0, 255, (48 + 16 * i, 64, 3), dtype=np.uint8) for _ in range(count)] for i in range(3)]
    return adapter, [adapter.preprocess(clip, query) for clip, query in zip(clips, QUERIES, strict=True)]


def decoupled(adapter, inputs, features=None):
    """encode -> merge -> the language model's own forward and generate, from embeddings alone."""
    prompt = adapter.merge(inputs, features or adapter.encode(inputs))
    given = {"inputs_embeds": prompt.embeds, "attention_mask": prompt.attention_mask, "position_ids": prompt.position_ids}
    model = adapter.language_model()
    with torch.inference_mode():
        logits = model(**given, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        ids = model.generate(**given, **prompt.extra, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return logits, tuple(map(tuple, ids.tolist()))


def test_it_is_an_adapter(case):
    assert isinstance(case[0], Adapter)


def test_decoupled_equals_monolithic(case):
    adapter, samples = case
    for inputs in samples:
        logits, ids = decoupled(adapter, inputs)
        reference = adapter.monolithic_logits(inputs)
        assert reference.std() > 0
        torch.testing.assert_close(logits, reference, rtol=0, atol=1e-5 * float(reference.std()))
        assert ids == adapter.monolithic(inputs, Decoding(TOKENS, TOKENS)).ids


def test_batch_equals_singles(case):
    adapter, samples = case
    lengths = [int(inputs.input_ids.shape[1]) for inputs in samples]
    assert len(set(lengths)) == 3
    batch = adapter.collate(samples)
    shortest = lengths.index(min(lengths))
    assert batch.attention_mask[shortest].tolist() == [0] * (max(lengths) - min(lengths)) + [1] * min(lengths)
    logits, ids = decoupled(adapter, batch)
    for i, inputs in enumerate(samples):
        alone, alone_ids = decoupled(adapter, inputs)
        torch.testing.assert_close(logits[i], alone[0], rtol=0, atol=1e-4 * float(alone.std()))
        assert ids[i] == alone_ids[0]
    assert adapter.monolithic(batch, Decoding(TOKENS, TOKENS)).ids == ids


def test_one_encoder_call_and_none_after_it(case):
    adapter, samples = case
    for inputs in (*samples, adapter.collate(samples)):
        with EncoderCounter(adapter.vision_module()) as counter:
            counter.enter("encode")
            features = adapter.encode(inputs)
            counter.enter("decode")
            decoupled(adapter, inputs, features)
        assert (counter.count("encode"), counter.outside_encode) == (1, 0)


def test_features_fill_the_placeholders(case):
    adapter, samples = case
    features = adapter.encode(adapter.collate(samples))
    for inputs, embed in zip(samples, features.embeds, strict=True):
        alone = adapter.encode(inputs)
        torch.testing.assert_close(embed, alone.embeds[0], rtol=1e-4, atol=1e-5)
        prompt = adapter.merge(inputs, alone)
        assert prompt.length == int(prompt.attention_mask.sum())
        visual = alone.visual_tokens[0]
        assert prompt.length >= visual + 10


def test_a_changed_frame_changes_the_features(case):
    adapter, samples = case
    inputs = samples[0]
    key = next(iter(inputs.pixels))
    before = adapter.encode(inputs).content_hash()
    assert adapter.encode(inputs).content_hash() == before
    assert adapter.encode(replace(inputs, pixels={key: inputs.pixels[key] * -1})).content_hash() != before


def test_hooks_find_the_tower(case):
    adapter, samples = case
    hooks = VisionTimingHooks(adapter.language_model())
    alone = VisionTimingHooks(adapter.vision_module())
    with hooks, alone:
        begin = time.perf_counter()
        adapter.encode(samples[0])
        wall = time.perf_counter() - begin
    assert 0 < alone.get_vision_time() <= hooks.get_vision_time() * 1.5 and hooks.get_vision_time() <= wall
    assert hooks.calls == 1


def test_stopping_at_eos(case):
    adapter, samples = case
    free = adapter.monolithic(samples[0], Decoding(TOKENS, TOKENS)).ids[0]
    stop = free[5]
    tokens = adapter.monolithic(samples[0], Decoding(TOKENS, eos_token_ids=(stop,)))
    assert tokens.ids[0] == free[: free.index(stop) + 1] and tokens.finish_reasons == ("eos",)


def test_detokenize_gives_text(case):
    adapter, samples = case
    text = adapter.detokenize(adapter.monolithic(samples[0], Decoding(TOKENS, TOKENS)).ids[0])
    assert len(text) >= TOKENS


def test_same_seed_same_weights_and_another_seed_others():
    def weights(seed):
        adapter = registry.create("hf")
        adapter.load(ModelSpec(f"dummy:{seed}", "llava", "tiny"), "cpu")
        assert adapter.revision() == f"dummy:{seed}/tiny"
        return torch.cat([p.flatten() for p in adapter.language_model().parameters()])

    state = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    assert torch.equal(first, weights(3)) and not torch.equal(first, weights(4))


@pytest.mark.parametrize("name", ["eventgpt", "llava", "qwen2_5_vl"])
def test_bfloat16_keeps_rope_in_float32(name):
    adapter = registry.create("eventgpt" if name == "eventgpt" else "hf")
    adapter.load(ModelSpec("dummy:0", name, "tiny", dtype=torch.bfloat16), "cpu")
    model = adapter.language_model()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tables = [buffer for key, buffer in model.named_buffers() if key.endswith("inv_freq")]
    assert tables and all(t.dtype is torch.float32 for t in tables)
    assert torch.get_default_dtype() is torch.float32


def test_generation_config_has_no_penalties_or_sampling():
    adapter = registry.create("eventgpt")
    adapter.load(ModelSpec("dummy:0", "eventgpt", "tiny"), "cpu")
    config = adapter.language_model().generation_config
    assert adapter.eos_token_ids() == (2,) and config.do_sample is False
    assert config.repetition_penalty in (None, 1.0) and config.temperature in (None, 1.0)


def test_sampling_is_seeded():
    adapter = registry.create("hf")
    adapter.load(ModelSpec("dummy:0", "llava", "tiny"), "cpu")
    inputs = adapter.preprocess([np.zeros((64, 64, 3), np.uint8)] * 8, QUERIES[0])
    runs = [adapter.monolithic(inputs, Decoding(TOKENS, TOKENS, temperature=1.0, top_p=0.9, seed=seed)).ids for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.fixture(scope="module")
def qwen():
    adapter = registry.create("hf")
    adapter.load(ModelSpec("dummy:0", "qwen2_5_vl", "tiny"), "cpu")
    return adapter, adapter.preprocess([np.full((64, 64, 3), 90, np.uint8)] * 2, QUERIES[0])


class TestWrongUse:
    def test_mrope_without_type_ids_is_refused(self, qwen):
        adapter, inputs = qwen
        features = adapter.encode(inputs)
        with pytest.raises(ModelError, match="mm_token_type_ids"):
            adapter.merge(replace(inputs, extra={"image_grid_thw": inputs.extra["image_grid_thw"]}), features)

    def test_mrope_positions_are_not_text_positions(self, qwen):
        adapter, inputs = qwen
        prompt = adapter.merge(inputs, adapter.encode(inputs))
        assert prompt.position_ids.shape == (4, 1, prompt.length)
        assert not torch.equal(prompt.position_ids[1], prompt.position_ids[0])

    def test_features_of_another_batch_are_refused(self, qwen):
        adapter, inputs = qwen
        features = adapter.encode(inputs)
        with pytest.raises(ModelError, match="placeholders"):
            adapter.merge(inputs, Features((features.embeds[0][:-1],)))

    def test_fewer_placeholders_than_features_are_refused(self, qwen):
        adapter, inputs = qwen
        ids = inputs.input_ids.masked_fill(inputs.input_ids == adapter.route.placeholder_id, 5)
        with pytest.raises(ModelError, match=r"features for 0 placeholders.*preprocessor_config"):
            adapter.encode(replace(inputs, input_ids=ids))

    @pytest.mark.parametrize("frames", [[], [np.zeros((4, 4), np.uint8)], [np.zeros((4, 4, 3), np.float32)]])
    def test_frames_are_checked(self, qwen, frames):
        with pytest.raises(ModelError, match="expected"):
            qwen[0].preprocess(frames, "hello")

    @pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
    def test_video_is_refused_where_there_is_none(self, architecture):
        with pytest.raises(ModelError, match="images, grid or first"):
            registry.create("hf").load(ModelSpec("dummy:0", architecture, "tiny", frames_as="video"), "cpu")

    def test_missing_flash_kernel_is_refused_not_fetched(self):
        with pytest.raises(ModelError, match="flash-attn"):
            registry.create("hf").load(ModelSpec("dummy:0", "llava", "tiny", attention="flash_attention_2"), "cpu")

    def test_batch_of_different_frame_counts(self):
        adapter = registry.create("eventgpt")
        adapter.load(ModelSpec("dummy:0", "eventgpt", "tiny"), "cpu")
        frame = np.zeros((64, 64, 3), np.uint8)
        with pytest.raises(ModelError, match="same frame count"):
            adapter.collate([adapter.preprocess([frame] * n, "hello") for n in (2, 3)])

    def test_unknown_adapter_lists_the_known(self):
        with pytest.raises(ModelError, match="eventgpt, hf"):
            registry.create("nope")

    def test_a_second_class_of_one_name_is_refused(self):
        @registry.register("test-only")
        class One: ...

        with pytest.raises(ModelError, match="registered already"):

            @registry.register("test-only")
            class Two: ...

        assert type(registry.create("test-only")) is One


class TestFrames:
    def test_grid_is_row_by_row_in_four_columns(self):
        frames = [np.full((2, 3, 3), i, np.uint8) for i in range(1, 7)]
        grid = frame_grid(frames)
        assert grid.shape == (4, 12, 3)
        assert grid[0, ::3, 0].tolist() == [1, 2, 3, 4] and grid[2, ::3, 0].tolist() == [5, 6, 0, 0]

    def test_grid_keeps_each_frame_at_its_own_size(self):
        small, large = np.full((2, 2, 3), 7, np.uint8), np.full((4, 5, 3), 9, np.uint8)
        grid = frame_grid([small, large])
        assert grid.shape == (4, 10, 3) and (grid[:2, :2] == 7).all() and (grid[2:, :5] == 0).all() and (grid[:, 5:] == 9).all()

    def test_pad_to_square(self):
        square = pad_to_square(np.full((2, 4, 3), 9, np.uint8), (1, 2, 3))
        assert square.shape == (4, 4, 3) and (square[1:3] == 9).all() and (square[[0, 3]] == [1, 2, 3]).all()

    def test_no_frame_of_a_grid_is_cropped_away(self):
        adapter = registry.create("hf")
        adapter.load(ModelSpec("dummy:0", "llava", "tiny"), "cpu")
        black = [np.zeros((48, 64, 3), np.uint8)] * 8
        before = adapter.preprocess(black, "hello").pixels["pixel_values"]
        for i in range(8):
            changed = [*black[:i], np.full((48, 64, 3), 255, np.uint8), *black[i + 1 :]]
            assert (adapter.preprocess(changed, "hello").pixels["pixel_values"] != before).float().mean() > 0.03

    def test_arrange(self):
        frames = [np.full((2, 2, 3), i, np.uint8) for i in range(3)]
        assert [len(arrange(frames, kind)) for kind in ("grid", "images", "first", "video")] == [1, 3, 1, 3]

    def test_template_keeps_braces_of_the_query(self):
        text = fill_template("A <image> {n} {query} B", "what is {n} in {query}?", 8, "<image>", 1)
        assert text == "A <image> 8 what is {n} in {query}? B"

    def test_one_placeholder_is_repeated(self):
        assert fill_template("<i> {query}", "q", 3, "<i>", 3, behind="\n") == "<i>\n<i>\n<i> q"

    @pytest.mark.parametrize(("template", "query"), [("no image {query}", "q"), ("<i> {query}", "what is <i>?"), ("<i><i> {query}", "q")])
    def test_wrong_placeholders_are_refused(self, template, query):
        with pytest.raises(ModelError, match="<i>"):
            fill_template(template, query, 1, "<i>", 1)


def test_cut_at_eos_keeps_eos_and_cuts_padding():
    tokens = cut_at_eos(torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8]]), (2,))
    assert tokens.ids == ((5, 2), (5, 6, 7, 8)) and tokens.finish_reasons == ("eos", "length")


def test_custom_prompt_is_used():
    adapter = registry.create("hf")
    adapter.load(ModelSpec("dummy:0", "llava", "tiny", frames_as="images", prompt="{n} frames: {images} {query}"), "cpu")
    inputs = adapter.preprocess([np.zeros((64, 64, 3), np.uint8)] * 2, "Why?")
    text = adapter.codec.tokenizer.decode(inputs.input_ids[0])
    assert text.replace("<image>", "") == "<s>2 frames: \n\n Why?"
