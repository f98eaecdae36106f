"""Engines that guess ahead: the text is plain greedy decoding's, token for token, whatever is guessed."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagebench import engines
from stagebench.engines import prompt_lookup
from stagebench.engines.ahead import history_of
from stagebench.engines.prompt_lookup import NgramIndex
from stagebench.errors import ModelError
from stagebench.models import registry
from stagebench.models.base import Decoding, ModelSpec
from stagebench.stages import StageClock

torch.set_num_threads(1)
CASES = {"eventgpt": "eventgpt", "llava": "hf", "video_llava": "hf", "qwen2_5_vl": "hf", "llava_onevision": "hf"}
NATURAL = Decoding(10)
LONG = Decoding(24, 24)


@cache
def model(architecture, seed=0):
    adapter = registry.create(CASES[architecture])
    adapter.load(ModelSpec(f"dummy:{seed}", architecture, "tiny"), "cpu")
    return adapter


@cache
def prompt(architecture):
    adapter = model(architecture)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (56, 64, 3), dtype=np.uint8) for _ in range(3)]
    inputs = adapter.preprocess(frames, "What stands on the road, and what stands behind it on the road?")
    return adapter.merge(inputs, adapter.encode(inputs))


def run(engine, architecture, decoding, draft=None):
    adapter = model(architecture)
    adapter.draft = draft
    made = engines.create(engine) if isinstance(engine, str) else engine
    info = made.prepare(adapter, decoding, 1)
    clock = StageClock("cpu")
    with clock.total():
        tokens = made.run(lambda: prompt(architecture), decoding, clock)
    return tokens, clock.times(), info


@pytest.mark.parametrize("architecture", CASES)
@pytest.mark.parametrize("engine", ["prompt_lookup", "speculative"])
def test_greedy_text_is_equal(architecture, engine):
    draft = model(architecture, seed=1)
    plain, _, _ = run("generate", architecture, NATURAL)
    ids = plain.ids[0]
    for decoding in (
        NATURAL,
        replace(NATURAL, min_new_tokens=10, eos_token_ids=(ids[3],)),
        replace(NATURAL, eos_token_ids=(ids[5],)),
        Decoding(1),
    ):
        expected = run("generate", architecture, decoding)[0]
        found, times, _ = run(engine, architecture, decoding, draft)
        assert found.ids == expected.ids and found.finish_reasons == expected.finish_reasons and not found.nan
        assert len(times.token_ms) == len(found.ids[0]) - 1
        assert found.kv_bytes == expected.kv_bytes  # rejected guesses are forgotten
        assert 0 <= found.accepted <= found.drafted


class Oracle(prompt_lookup.PromptLookupEngine):
    """Guesses what the model will say, right or wrong as told."""

    def __init__(self, future, wrong_every):
        super().__init__()
        self.future, self.wrong_every, self.rounds = future, wrong_every, 0

    def begin(self, history):
        self.start = len(history)

    def propose(self, history, most, hold_back):
        self.rounds += 1
        at = len(history) - self.start
        guess = list(self.future[at : at + min(4, most)])
        return [g + 1 if (at + i) % self.wrong_every == 0 else g for i, g in enumerate(guess)]


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("wrong_every", [10**6, 3, 1])
def test_right_guesses_are_kept_and_wrong_ones_are_not(architecture, wrong_every):
    decoding = LONG
    expected = run("generate", architecture, decoding)[0]
    oracle = Oracle(expected.ids[0], wrong_every)
    found, _, _ = run(oracle, architecture, decoding)
    assert found.ids == expected.ids
    if wrong_every == 10**6:
        assert found.accepted == found.drafted == 24 - 1 - oracle.rounds  # each round adds its guesses and one of the model's own
        assert oracle.rounds == 5
    if wrong_every == 1:
        assert found.accepted == 0 and oracle.rounds == 23


def test_a_draft_that_is_the_model_itself_reading_the_same_text_is_always_right():
    """With the visual tokens out of the prompt, the text-only draft and the model see the same."""
    adapter = model("llava")
    ids = adapter.codec.encode("What stands on the road?", special=True)
    embeds = adapter.model.get_input_embeddings()(torch.tensor([ids])).detach()
    ones = torch.ones(1, len(ids), dtype=torch.int64)
    text = replace(prompt("llava"), embeds=embeds, attention_mask=ones, position_ids=ones.cumsum(1) - 1, text_ids=torch.tensor([ids]))
    adapter.draft = adapter
    engine = engines.create("speculative")
    engine.prepare(adapter, NATURAL, 1)
    clock = StageClock("cpu")
    with clock.total():
        tokens = engine.run(lambda: text, NATURAL, clock)
    assert tokens.accepted == tokens.drafted > 0


def test_the_history_is_the_prompts_text():
    for architecture in ("eventgpt", "llava"):
        adapter, text = model(architecture), prompt(architecture)
        words = adapter.detokenize(history_of(text))
        assert "What stands on the road" in words and "image" not in words.replace("This image shows", "")


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 12), st.data())
@settings(max_examples=150, deadline=None)
def test_lookup_finds_the_latest_longest_match(text, most, data):
    index = NgramIndex()
    index.guess(text[: data.draw(st.integers(0, len(text)))], most)  # grown in two steps
    found = index.guess(text, most)
    expected = []
    for length in range(min(prompt_lookup.LONGEST, len(text)), 0, -1):
        tail = text[-length:]
        ends = [e for e in range(length, len(text)) if text[e - length : e] == tail]
        if ends:
            expected = text[ends[-1] : ends[-1] + most]
            break
    assert found == expected


def test_what_cannot_be_guessed_for_goes_to_generate():
    adapter = model("llava")
    for decoding, batch, why in ((NATURAL, 2, "batch 2"), (replace(NATURAL, temperature=0.7), 1, "temperature")):
        info = engines.create("prompt_lookup").prepare(adapter, decoding, batch)
        assert "falls back to generate" in info.note and why in info.note
    expected = run("generate", "llava", replace(NATURAL, temperature=0.7))[0]
    assert run("prompt_lookup", "llava", replace(NATURAL, temperature=0.7))[0].ids == expected.ids


def test_a_draft_needs_the_same_tokenizer():
    adapter = model("llava")
    adapter.draft = model("qwen2_5_vl")
    with pytest.raises(ModelError, match="another tokenizer"):
        engines.create("speculative").prepare(adapter, NATURAL, 1)
    adapter.draft = None
    with pytest.raises(ModelError, match=r"models.<name>.draft"):
        engines.create("speculative").prepare(adapter, NATURAL, 1)
    with pytest.raises(ModelError, match="before prepare"):
        engines.create("prompt_lookup").run(lambda: prompt("llava"), NATURAL, StageClock("cpu"))
