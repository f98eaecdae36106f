"""The reference engine against plain use of the same model."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from stagebench import engines
from stagebench.engines.generate import cut_at_eos, generation_config
from stagebench.errors import ModelError, SampleTimeoutError
from stagebench.models.base import Decoding, Prompt
from stagebench.stages import StageClock

torch.set_num_threads(1)
NO_EOS = Decoding(max_new_tokens=12, min_new_tokens=12, eos_token_ids=(2,))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


class Holder:
    """As much of an adapter as an engine asks for."""

    def __init__(self, model):
        self._model = model

    def language_model(self):
        return self._model


def prompt_of(model, rows: list[list[int]]) -> Prompt:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Prompt(model.get_input_embeddings()(ids).detach(), mask, positions)


def run(model, prompt, decoding, clock=None):
    engine = engines.create("generate")
    engine.prepare(Holder(model), decoding, 1)
    clock = clock or StageClock("cpu")
    with clock.total():
        tokens = engine.run(lambda: prompt, decoding, clock)
    return tokens, clock.times()


@torch.inference_mode()
def by_hand(model, row: list[int], steps: int, hold_back: int | None = None) -> list[int]:
    """Greedy ids by repeated full forward passes."""
    ids = list(row)
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        if hold_back is not None:
            logits[hold_back] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(row) :]


def test_fixed_length_is_exact_and_equals_full_forwards(model):
    row = [5, 9, 41, 7]
    tokens, times = run(model, prompt_of(model, [row]), NO_EOS)
    assert list(tokens.ids[0]) == by_hand(model, row, 12, hold_back=2)
    assert tokens.finish_reasons == ("length",) and not tokens.nan
    assert set(times.host_ms) == {"prefill", "decode"}
    assert len(times.token_ms) == 11 and list(times.token_ms) == sorted(times.token_ms)
    # 2 layers x (keys + values) x 2 kv heads x 8 wide x 4 bytes x (4 prompt + 11 fed back)
    assert tokens.kv_bytes == 2 * 2 * 2 * 8 * 4 * 15


@pytest.mark.parametrize("stop_at", [1, 2, 6])
def test_eos_at_any_step_ends_and_is_counted(model, stop_at):
    row = [11, 3, 60]
    free = by_hand(model, row, 8)
    eos = free[stop_at - 1]
    stop_at = free.index(eos) + 1
    tokens, times = run(model, prompt_of(model, [row]), Decoding(max_new_tokens=8, eos_token_ids=(eos,)))
    assert list(tokens.ids[0]) == free[:stop_at]
    assert tokens.finish_reasons == ("eos",)
    assert len(times.token_ms) == stop_at - 1


def test_one_token_still_opens_decode(model):
    tokens, times = run(model, prompt_of(model, [[4, 5]]), replace(NO_EOS, max_new_tokens=1, min_new_tokens=1))
    assert len(tokens.ids[0]) == 1 and "decode" in times.host_ms and times.token_ms == ()


def test_a_left_padded_batch_equals_single_runs(model):
    rows = [[5, 9, 41, 7, 8, 30], [12, 4], [3, 3, 50]]
    singles = [run(model, prompt_of(model, [row]), NO_EOS)[0].ids[0] for row in rows]
    batch, _ = run(model, prompt_of(model, rows), NO_EOS)
    assert list(batch.ids) == singles


def test_a_batch_row_is_cut_at_its_own_eos(model):
    rows = [[5, 9, 41, 7, 8, 30], [12, 4]]
    eos = run(model, prompt_of(model, [rows[0]]), NO_EOS)[0].ids[0][2]
    free = [by_hand(model, row, 12) for row in rows]
    tokens, _ = run(model, prompt_of(model, rows), Decoding(max_new_tokens=12, eos_token_ids=(eos,)))
    assert [list(ids) for ids in tokens.ids] == [list(cut_at_eos(ids, (eos,))) for ids in free]
    assert tokens.finish_reasons[0] == "eos"


def test_ids_beside_embeds_do_not_count_as_new(model):
    row = [5, 9, 41, 7]
    plain = prompt_of(model, [row])
    with_ids = replace(plain, extra={"input_ids": torch.tensor([row])})
    assert run(model, with_ids, NO_EOS)[0].ids == run(model, plain, NO_EOS)[0].ids


def test_a_checkpoints_own_generation_settings_do_not_leak_in(model):
    row = [5, 9, 41, 7]
    expected, _ = run(model, prompt_of(model, [row]), NO_EOS)
    kept = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            repetition_penalty=5.0, no_repeat_ngram_size=1, temperature=0.2, do_sample=True, num_beams=3, eos_token_id=2
        )
        assert run(model, prompt_of(model, [row]), NO_EOS)[0].ids == expected.ids
    finally:
        model.generation_config = kept


def test_sampling_repeats_with_its_seed_and_differs_with_another(model):
    prompt = prompt_of(model, [[5, 9, 41, 7]])
    sampled = replace(NO_EOS, temperature=1.0, top_p=0.95, seed=3)
    first, again = (run(model, prompt, sampled)[0].ids for _ in range(2))
    assert first == again
    assert run(model, prompt, replace(sampled, seed=4))[0].ids != first


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_logits_are_told(model, value, temperature):
    def poison(module, args, output):
        output[..., 13] = value
        return output

    handle = model.lm_head.register_forward_hook(poison)
    try:
        tokens, _ = run(model, prompt_of(model, [[5, 9]]), replace(NO_EOS, temperature=temperature))
    finally:
        handle.remove()
    assert tokens.nan
    assert not run(model, prompt_of(model, [[5, 9]]), replace(NO_EOS, temperature=temperature))[0].nan


def test_a_model_that_never_stops_is_stopped(model):
    clock = StageClock("cpu", timeout_s=0.05)
    with pytest.raises(SampleTimeoutError, match="sample_timeout_s"):
        run(model, prompt_of(model, [[5, 9]]), replace(NO_EOS, max_new_tokens=100_000, min_new_tokens=100_000), clock)


def test_plain_clock_gives_the_same_ids(model):
    prompt = prompt_of(model, [[5, 9, 41, 7]])
    assert run(model, prompt, NO_EOS, StageClock("cpu", sync=False))[0].ids == run(model, prompt, NO_EOS)[0].ids


def test_unknown_engine_names_the_known_ones():
    with pytest.raises(ModelError, match=r"turbo.*generate.*variants\.engine"):
        engines.create("turbo")


def test_run_before_prepare_is_refused():
    with pytest.raises(ModelError, match="prepare"):
        engines.create("generate").run(lambda: None, NO_EOS, StageClock("cpu"))


def test_greedy_config_states_every_setting_that_moves_tokens():
    config = generation_config(NO_EOS)
    assert (config.do_sample, config.repetition_penalty, config.num_beams, config.no_repeat_ngram_size) == (False, 1.0, 1, 0)
    assert config.min_new_tokens == config.max_new_tokens == 12
