"""Engines static, graph and fused against generate, on tiny fp32 models; the control logic around captured steps.

Without CUDA the captured functions run directly, and the fused step in its torch form: same buffers, same loop.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stagebench.engines import available, create
from stagebench.engines._loop import DoneFlag, decode
from stagebench.engines._state import StepState, choose, next_positions
from stagebench.engines._stepped import CAPACITY_STEP, Session
from stagebench.engines._weights import Weights, pack
from stagebench.engines.encoder import GraphedCall, graph_encoder
from stagebench.engines.quality import compare_logits
from stagebench.errors import ModelError
from stagebench.models.base import Decoding, Prompt, Tokens
from stagebench.stages import StageClock, StageTimes

torch.set_num_threads(1)
WIDTH, VOCABULARY = 64, 67
STEPPED = ("graph", "fused")
SMALL: dict[str, Any] = dict(  # noqa: C408 (reads as the call it stands for)
    hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY
)


class Bare:
    """The part of an adapter that engines look at."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = torch.device("cpu")

    def language_model(self) -> Any:
        return self.model


def build(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(5)
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[family]
    model = cls(config(**{**SMALL, **changes})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


def prompt_of(batch: int, length: int, pads: tuple[int, ...] = (), seed: int = 0) -> Prompt:
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    generator = torch.Generator().manual_seed(seed)
    return Prompt(torch.randn(batch, length, WIDTH, generator=generator), mask, (mask.cumsum(1) - 1).clamp(min=0))


def run(engine: Any, prompt: Prompt, decoding: Decoding) -> tuple[Tokens, StageTimes]:
    clock = StageClock("cpu")
    with clock.total():
        tokens = engine.run(lambda: prompt, decoding, clock)
    return tokens, clock.times()


def ready(name: str, model: Any) -> Any:
    engine = create(name)
    engine.prepare(Bare(model), Decoding(12, 12), 1)
    return engine


def test_all_engines_are_known() -> None:
    assert {"fused", "generate", "graph", "static"} <= set(available())


@pytest.mark.parametrize("name", ["static", *STEPPED])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("batch", "pads"), [(1, ()), (3, (4, 0, 9))])
def test_fixed_length_equals_generate(name: str, family: str, batch: int, pads: tuple[int, ...]) -> None:
    model = build(family)
    prompt, decoding = prompt_of(batch, 13, pads), Decoding(12, 12, (2,))
    want, _ = run(ready("generate", model), prompt, decoding)
    got, times = run(ready(name, model), prompt, decoding)
    assert got.ids == want.ids
    assert got.finish_reasons == want.finish_reasons == ("length",) * batch
    assert len(times.token_ms) == 11
    assert set(times.host_ms) == {"prefill", "decode"}


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize(("batch", "pads"), [(1, ()), (2, (0, 3))])
def test_eager_attention_gets_its_mask_from_us(name: str, batch: int, pads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own mask for it is copied from the host, which no capture allows."""
    model = build(attn_implementation="eager")
    prompt, decoding = prompt_of(batch, 13, pads), Decoding(12, 12, (2,))
    want, _ = run(ready("generate", model), prompt, decoding)
    engine = ready(name, model)
    forward, masks = Session.forward, []

    def seen(self: Session, **inputs: Any) -> torch.Tensor:
        masks.append(inputs["attention_mask"])
        return forward(self, **inputs)

    monkeypatch.setattr(Session, "forward", seen)
    engine.admit(prompt, decoding)
    got, _ = run(engine, prompt, decoding)
    assert got.ids == want.ids
    assert masks and all(mask is not None and mask.dtype is torch.float32 for mask in masks)


@pytest.mark.parametrize("name", STEPPED)
@settings(max_examples=8, deadline=None)
@given(at=st.integers(0, 11), minimum=st.integers(0, 12), batch=st.integers(1, 3), seed=st.integers(0, 5))
def test_eos_anywhere_equals_generate(name: str, at: int, minimum: int, batch: int, seed: int) -> None:
    """EOS chosen from what the model says at step `at`; held back until `minimum`; rows of a batch end at different steps."""
    model = build()
    prompt = prompt_of(batch, 9, tuple(range(batch)), seed)
    reference = ready("generate", model)
    free, _ = run(reference, prompt, Decoding(12, 12))
    decoding = Decoding(12, minimum, (free.ids[0][at], free.ids[-1][(at + 3) % 12]))
    want, _ = run(reference, prompt, decoding)
    got, times = run(ready(name, model), prompt, decoding)
    assert (got.ids, got.finish_reasons) == (want.ids, want.finish_reasons)
    assert len(times.token_ms) == max(map(len, got.ids)) - 1


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("length", [CAPACITY_STEP - 13, CAPACITY_STEP - 12, CAPACITY_STEP - 11, CAPACITY_STEP + 1])
def test_context_up_to_the_capacity_and_across_it(name: str, length: int, model: Any) -> None:
    prompt, decoding = prompt_of(1, length), Decoding(12, 12)
    want, _ = run(ready("generate", model), prompt, decoding)
    engine = ready(name, model)
    engine.admit(prompt, decoding)
    got, _ = run(engine, prompt, decoding)
    assert got.ids == want.ids
    session = next(iter(engine._sessions.values()))
    assert session.state.capacity == (CAPACITY_STEP if length + 12 <= CAPACITY_STEP else 2 * CAPACITY_STEP)


@pytest.mark.parametrize("name", STEPPED)
def test_one_session_serves_lengths_and_decodings_in_any_order(name: str, model: Any) -> None:
    """Nothing of an earlier sample is left: longer, shorter, ended early, other EOS."""
    engine, reference = ready(name, model), ready("generate", model)
    cases = [
        (30, Decoding(12, 12)),
        (5, Decoding(12, 0, (7, 9))),
        (30, Decoding(3, 0, (1,))),
        (17, Decoding(12, 4, (63,))),
        (5, Decoding(12, 12)),
    ]
    for seed, (length, decoding) in enumerate(cases):
        prompt = prompt_of(1, length, seed=seed)
        assert run(engine, prompt, decoding)[0].ids == run(reference, prompt, decoding)[0].ids
    assert len(engine._sessions) == 1


@pytest.mark.parametrize("name", STEPPED)
def test_one_new_token_opens_decode_and_runs_no_step(name: str, model: Any) -> None:
    got, times = run(ready(name, model), prompt_of(1, 6), Decoding(1, 1))
    assert len(got.ids[0]) == 1
    assert times.token_ms == ()
    assert "decode" in times.host_ms


@pytest.mark.parametrize("name", STEPPED)
def test_capture_inside_a_timed_run_is_recorded(name: str, model: Any) -> None:
    engine, prompt, decoding = ready(name, model), prompt_of(1, 8), Decoding(4, 4)
    run(engine, prompt, decoding)
    assert engine.late == ["prefill 1x8", "step 1x256"]
    other = prompt_of(1, 9)
    assert set(engine.admit(other, decoding)) == {"prefill 1x9"}
    assert engine.admit(other, decoding) == {}
    run(engine, other, decoding)
    assert engine.late == ["prefill 1x8", "step 1x256"]
    assert set(engine.prepare_ms) == {"prefill 1x8", "prefill 1x9", "step 1x256"}


@pytest.mark.parametrize("name", STEPPED)
def test_nan_is_reported(name: str) -> None:
    model = build()
    prompt = prompt_of(1, 8)
    assert not run(ready(name, model), prompt, Decoding(4, 4))[0].nan
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    assert run(ready(name, model), prompt, Decoding(4, 4))[0].nan


@pytest.mark.parametrize("name", STEPPED)
def test_refusals_name_the_remedy(name: str, model: Any) -> None:
    with pytest.raises(ModelError, match="before prepare"):
        run(create(name), prompt_of(1, 4), Decoding(2))
    engine = ready(name, model)
    right = prompt_of(2, 6)
    right.attention_mask[0, -2:] = 0
    with pytest.raises(ModelError, match="Pad on the left"):
        engine.admit(right, Decoding(2))
    odd = replace(prompt_of(1, 6), extra={"deepstack": torch.zeros(1)})
    with pytest.raises(ModelError, match="deepstack"):
        engine.admit(odd, Decoding(2))


def test_other_families_fall_back_and_say_so() -> None:
    qwen3 = build("qwen3", head_dim=16)
    engine = create("fused")
    info = engine.prepare(Bare(qwen3), Decoding(6, 6), 1)
    assert info.note is not None
    assert "fused falls back to graph: layers of Qwen3Attention" in info.note
    prompt = prompt_of(1, 9)
    assert run(engine, prompt, Decoding(6, 6))[0].ids == run(ready("generate", qwen3), prompt, Decoding(6, 6))[0].ids

    sliding = build("mistral", sliding_window=8)
    engine = create("fused")
    note = engine.prepare(Bare(sliding), Decoding(6, 6), 1).note
    assert note is not None
    assert "fused falls back to graph" in note
    assert "graph falls back to generate" in note
    assert run(engine, prompt, Decoding(6, 6))[0].ids == run(ready("generate", sliding), prompt, Decoding(6, 6))[0].ids


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation"),
        ({"mlp_bias": True}, "has a bias"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE of type dynamic"),
        ({"hidden_size": 96, "head_dim": 24}, "heads 24 wide"),
    ],
)
def test_what_is_not_plain_llama_is_refused_before_anything_changes(changes: dict[str, Any], reason: str) -> None:
    odd = build(**changes)
    before = odd.model.layers[0].self_attn.q_proj.weight.data_ptr()
    note = create("fused").prepare(Bare(odd), Decoding(4), 1).note
    assert note is not None
    assert reason in note
    assert odd.model.layers[0].self_attn.q_proj.weight.data_ptr() == before


def test_packing_shares_memory_once_and_keeps_the_model() -> None:
    packed = build("qwen2")
    ids = torch.arange(7)[None]
    with torch.inference_mode():
        before = packed(ids).logits
    first = pack(packed, packed.model)
    again = pack(packed, packed.model)
    with torch.inference_mode():
        assert torch.equal(packed(ids).logits, before)
    for one, two in zip(first.layers, again.layers, strict=True):
        assert one.qkv.data_ptr() == two.qkv.data_ptr()
        assert one.gate_up.data_ptr() == two.gate_up.data_ptr()
        assert torch.equal(one.qkv, two.qkv)
    attention = packed.model.layers[1].self_attn
    assert attention.q_proj.weight.data_ptr() == first.layers[1].qkv.data_ptr()
    assert torch.equal(first.layers[1].qkv, torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))


def test_step_bytes_count_every_matrix_once() -> None:
    packed = build()
    weights: Weights = pack(packed, packed.model)
    linears = sum(m.weight.numel() for m in packed.modules() if isinstance(m, torch.nn.Linear))
    assert weights.step_bytes == 4 * linears


def _state(batch: int = 2, capacity: int = 16, planes: int = 1) -> StepState:
    return StepState.build(
        layers=1, batch=batch, kv_heads=1, head_dim=16, capacity=capacity, planes=planes, dtype=torch.float32, device=torch.device("cpu")
    )


def test_the_first_part_runs_ahead_and_nothing_more() -> None:
    """When step n ends the sequence, only the first part of step n + 1 has been launched."""
    state, launched = _state(), []
    flag = DoneFlag(state)

    def rest() -> None:
        launched.append("rest")
        if launched.count("rest") == 3:
            state.done.fill_(1)

    clock = StageClock("cpu")
    with clock.total(), clock.stage("decode"):
        produced = decode([lambda: launched.append("first"), rest], flag, Decoding(20, 0, (2,)), clock)
    assert produced == 4
    assert launched == ["first", "rest"] * 3 + ["first"]
    assert len(clock.times().token_ms) == 3


def test_fixed_length_never_looks_at_the_flag() -> None:
    state = _state()
    state.done.fill_(1)
    flag = DoneFlag(state)
    flag.all_done = lambda: pytest.fail("asked")  # type: ignore[method-assign]
    clock = StageClock("cpu")
    with clock.total(), clock.stage("decode"):
        assert decode([lambda: None], flag, Decoding(7, 7, (2,)), clock) == 7


def test_state_refuses_what_does_not_fit() -> None:
    state = _state(1, 16)
    with pytest.raises(ModelError, match="16 slots"):
        state.begin(prompt_of(1, 10), Decoding(7))
    state.begin(prompt_of(1, 9), Decoding(7))
    with pytest.raises(ModelError, match="5 EOS ids"):
        state.begin(prompt_of(1, 4), Decoding(2, 0, (1, 2, 3, 4, 5)))


def test_mrope_positions_go_on_from_the_highest() -> None:
    planes = torch.tensor([[[0, 1, 1, 1]], [[0, 1, 4, 2]], [[0, 1, 1, 3]]])
    assert next_positions(planes).tolist() == [[5], [5], [5]]
    text = torch.arange(4)[None, None]
    assert next_positions(torch.cat([text, planes])).tolist() == [[4], [5], [5], [5]]
    assert next_positions(torch.tensor([[0, 0, 1, 2]])).tolist() == [[3]]


def test_sampling_keeps_to_the_nucleus_and_the_seed(model: Any) -> None:
    state = _state(1, 64)
    state.begin(prompt_of(1, 4), Decoding(50))
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    torch.manual_seed(0)
    for _ in range(50):
        choose(state, logits, Decoding(50, temperature=1.0, top_p=0.7))
    assert set(state.ids[0, :50].tolist()) == {0, 1}
    engine = ready("fused", model)
    decoding = Decoding(12, 12, temperature=0.8, top_p=0.9, seed=3)
    first, second = (run(engine, prompt_of(1, 8), decoding)[0].ids for _ in range(2))
    other = run(engine, prompt_of(1, 8), replace(decoding, seed=4))[0].ids
    assert first == second != other


def test_graphed_call_counts_and_keeps_arguments_by_place_and_name() -> None:
    class Adapter:
        def _encode(self, x: torch.Tensor, *, scale: int) -> torch.Tensor:
            return x * scale

    adapter = Adapter()
    graphed = graph_encoder(adapter)
    assert isinstance(graphed, GraphedCall)
    assert torch.equal(adapter._encode(torch.ones(2), scale=3), torch.full((2,), 3.0))
    assert graph_encoder(adapter) is graphed
    assert graphed.calls == 0  # on a CPU nothing is replayed
    with pytest.raises(ModelError, match="no feature function"):
        graph_encoder(object())


def test_quality_of_equal_and_of_shifted_logits() -> None:
    torch.manual_seed(0)
    reference = torch.randn(20, 50)
    same = compare_logits(reference, reference + 3.0)  # a constant changes no probability
    assert same.agreement == 1.0
    assert same.mean_kl < 1e-6
    assert same.relative_error < 1e-6
    worse = compare_logits(reference, reference.flip(1))
    assert worse.agreement < 0.3
    assert worse.mean_kl > 0.1
    with pytest.raises(ValueError, match="expected equal"):
        compare_logits(reference, reference[:, :-1])
