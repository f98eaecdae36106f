"""The Triton step against its torch reference: on a GPU compiled, elsewhere interpreted (TRITON_INTERPRET=1) if triton is there."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1", allow_module_level=True)

from linears import apart, in_float64
from stagebench.engines._launch import Form, Linear, launch_linear
from stagebench.engines._reference_step import ReferenceStep
from stagebench.engines._state import StepState, choose
from stagebench.engines._stepped import decoder_of
from stagebench.engines._triton_step import StepConfig, TritonStep, default_splits
from stagebench.engines._weights import pack, rope_tables
from stagebench.models.base import Decoding, Prompt

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else [pytest.mark.gpu]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PDL = DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
KINDS = [Linear("rows", 4, 64, 4), Linear("rows", 2, 32, 2), Linear("pipelined", 4, 32, 4, 3), Linear("persistent", 2, 0, 4, 2)]


@pytest.mark.parametrize("how", KINDS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(48, 64), (41, 80)])
@pytest.mark.parametrize("form", ["plain", "norm", "gated", "residual", "bias"])
def test_gemv_equals_float64(how: Linear, n: int, k: int, form: str) -> None:
    torch.manual_seed(n + k)
    x = torch.randn(1, k, device=DEVICE)
    w = torch.randn(2 * n if form == "gated" else n, k, device=DEVICE)
    norm = torch.rand(k, device=DEVICE) + 0.5
    bias = torch.randn(n, device=DEVICE) if form == "bias" else None
    out = torch.full((1, n), float("nan"), device=DEVICE)
    before = torch.randn(1, n, device=DEVICE)
    if form == "residual":
        out.copy_(before)
    norm = norm if form in ("norm", "gated") else None
    gated, residual = form == "gated", form == "residual"
    launch_linear(how, x, w, out, Form(norm=norm, eps=1e-5, bias=bias, gated=gated, residual=residual, pdl=PDL))
    want = in_float64(x, w, norm=norm, bias=bias, gated=gated, onto=before if residual else None)
    assert apart(out, want) < 1e-5


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_library_product_with_our_norm_and_gate_equals_float64(batch: int) -> None:
    torch.manual_seed(batch)
    n, k = 40, 80
    x, w, norm = torch.randn(batch, k, device=DEVICE), torch.randn(2 * n, k, device=DEVICE), torch.rand(k, device=DEVICE)
    out = torch.full((batch, n), float("nan"), device=DEVICE)
    launch_linear(Linear("cublas"), x, w, out, Form(norm=norm, eps=1e-5, gated=True, pdl=PDL))
    assert apart(out, in_float64(x, w, norm=norm, gated=True)) < 1e-5


@pytest.mark.parametrize(("batch", "heads", "groups"), [(1, 4, 4), (3, 4, 2)])
@pytest.mark.parametrize("splits", [1, 4])
def test_steps_equal_the_reference(batch: int, heads: int, groups: int, splits: int) -> None:
    """Several steps through all layers: logits, ids, cache and counters, with padding, grouped heads and EOS held back."""
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=67,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval().to(DEVICE)
    decoder = decoder_of(model)
    weights = pack(model, decoder)
    mask = torch.ones(batch, 9, dtype=torch.int64, device=DEVICE)
    for row in range(1, batch):
        mask[row, :row] = 0
    prompt = Prompt(torch.randn(batch, 9, 64, device=DEVICE), mask, (mask.cumsum(1) - 1).clamp(min=0))
    decoding = Decoding(6, 3, (2, 5))
    linear = Linear("rows", 4, 64, 2) if batch == 1 else Linear("cublas")
    settings = StepConfig(qkv=linear, out=linear, gate_up=linear, down=linear, head=linear, splits=splits, block_s=16, pdl=PDL)
    states, steps = [], []
    cache = torch.randn(2, 2, batch, groups, 32, 64 // heads, device=DEVICE)
    for kind in ("reference", "triton"):
        state = StepState.build(
            layers=2, batch=batch, kv_heads=groups, head_dim=64 // heads, capacity=32, planes=1, dtype=torch.float32, device=DEVICE
        )
        for layer in range(2):
            state.keys[layer][:, :, :9] = cache[layer, 0][:, :, :9]
            state.values[layer][:, :, :9] = cache[layer, 1][:, :, :9]
        state.begin(prompt, decoding)
        choose(state, torch.arange(67, device=DEVICE).flip(0)[None].repeat(batch, 1).float(), decoding)
        cos, sin = rope_tables(decoder, 33)
        if kind == "reference":
            step = ReferenceStep(weights, state, cos, sin, lambda logits, state=state: choose(state, logits, decoding))
        else:
            step = TritonStep(weights, state, cos, sin, None, settings)
        step.begin()
        states.append(state)
        steps.append(step)
    for _ in range(5):
        for step in steps:
            step.layers(range(2))
            step.finish()
        assert apart(steps[1].logits, steps[0].logits) < 1e-5
    for name in ("ids", "count", "slot", "positions", "done", "bad", "token"):
        assert torch.equal(getattr(states[0], name), getattr(states[1], name)), name
    for layer in range(2):
        assert torch.allclose(states[0].keys[layer], states[1].keys[layer], atol=1e-5)
        assert torch.allclose(states[0].values[layer], states[1].values[layer], atol=1e-5)


def test_selection_marks_nan_and_stops_at_eos() -> None:
    """A NaN logit marks its row only; a row that ended stays ended and its later ids are 0."""
    torch.manual_seed(1)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=67)
    model = LlamaForCausalLM(config).eval().to(DEVICE)
    decoder = decoder_of(model)
    state = StepState.build(layers=1, batch=2, kv_heads=4, head_dim=16, capacity=32, planes=1, dtype=torch.float32, device=DEVICE)
    mask = torch.ones(2, 4, dtype=torch.int64, device=DEVICE)
    state.begin(Prompt(torch.zeros(2, 4, 64, device=DEVICE), mask, mask.cumsum(1) - 1), Decoding(8, 0, (5,)))
    cos, sin = rope_tables(decoder, 33)
    linear = Linear("cublas")
    step = TritonStep(pack(model, decoder), state, cos, sin, None, StepConfig(linear, linear, linear, linear, linear, pdl=PDL))
    step.logits.zero_()
    step.logits[0, 5] = 1.0
    step.logits[1, 9] = 1.0
    step.select()
    step.logits[:, 11] = 2.0
    step.logits[1, 3] = float("nan")
    step.select()
    assert state.ids[:, :2].tolist() == [[5, 0], [9, 11]]
    assert state.done.tolist() == [1, 0]
    assert state.bad.tolist() == [0, 1]


def test_settings_follow_batch_width_and_capacity() -> None:
    """What won on an H200: docs/engines.md."""
    seven = StepConfig.for_batch(1, pdl=True, hidden=4096)
    assert [getattr(seven, name).kind for name in ("qkv", "out", "gate_up", "down", "head")] == ["persistent"] * 3 + ["rows"] * 2
    assert (seven.block_s, seven.attention_warps) == (32, 2)
    assert default_splits(768, 32, 132) == default_splits(2304, 32, 132) == 16
    assert StepConfig.for_batch(1, pdl=True, hidden=5120).qkv.kind == "rows"  # 13B: no power of two
    assert {getattr(StepConfig.for_batch(2, pdl=True), name).kind for name in ("qkv", "out", "gate_up", "down", "head")} == {"cublas"}
