"""The fused step on packed weights: exact to unpacking first, then multiplying."""

import gc
import os
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from linears import apart, in_float64
from stagebench.engines import create
from stagebench.engines._graphs import capture, garbage_kept
from stagebench.engines._stepped import Unsupported, decoder_of
from stagebench.engines._weights import PackedMatrix, multiply, pack
from stagebench.models import quantize
from stagebench.models._packed import Int4Linear, Int8Linear, Nf4Linear, PackedLinear
from stagebench.models.base import Decoding, Prompt
from stagebench.stages import StageClock

torch.set_num_threads(1)
KINDS = (Int8Linear, Int4Linear, Nf4Linear)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(
    find_spec("triton") is None or not (torch.cuda.is_available() or INTERPRETED),
    reason="needs triton, and a CUDA device or TRITON_INTERPRET=1",
)


class Bare:
    """The part of an adapter that engines look at."""

    def __init__(self, model):
        self.model, self.device = model, DEVICE

    def language_model(self):
        return self.model


def build(family="llama", scheme="int8", width=64, inner=96):
    torch.manual_seed(5)
    config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = cls(config(**shape, vocab_size=67)).eval().requires_grad_(False).to(DEVICE)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
    if scheme != "none":
        quantize.apply(model, scheme=scheme, device=torch.device("cpu"), vision=torch.nn.Identity())
    return model


def prompt_of(batch, length, width=64):
    torch.manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.int64, device=DEVICE)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return Prompt(torch.randn(batch, length, width, device=DEVICE), mask, (mask.cumsum(1) - 1).clamp(min=0))


def ids(engine, prompt, decoding):
    clock = StageClock(DEVICE.type)
    if hasattr(engine, "admit"):
        engine.admit(prompt, decoding)
    with clock.total():
        return engine.run(lambda: prompt, decoding, clock).ids


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_fused_says_what_generate_says_of_the_same_packed_weights(family, scheme, batch):
    model = build(family, scheme)
    prompt = prompt_of(batch, 13)
    reference, fused = create("generate"), create("fused")
    reference.prepare(Bare(model), Decoding(20), batch)
    info = fused.prepare(Bare(model), Decoding(20, 20, (2,)), batch)
    assert "falls back" not in (info.note or "")
    fixed = Decoding(20, 20, (2,))
    want = ids(reference, prompt, fixed)
    assert ids(fused, prompt, fixed) == want
    natural = Decoding(20, 0, (want[0][7],))
    assert ids(fused, prompt, natural) == ids(reference, prompt, natural)
    assert want != ids(ready_plain(family, batch), prompt, fixed)  # the codes matter: plain weights say something else


def ready_plain(family, batch):
    engine = create("generate")
    engine.prepare(Bare(build(family, "none")), Decoding(20), batch)
    return engine


@pytest.mark.parametrize("scheme", ["none", "int8", "int4", "nf4"])
def test_joined_weights_are_the_models_own_and_counted_as_stored(scheme):
    """q, k, v under one another, without a second copy; a second engine finds them joined."""
    model = build(scheme=scheme)
    before = model(inputs_embeds=prompt_of(1, 5).embeds).logits
    plain = [p.clone() for p in model.parameters()]
    size = sum(p.nbytes for p in model.model.layers.parameters()) - sum(p.nbytes for n, p in model.named_parameters() if "layernorm" in n)
    weights = pack(model, decoder_of(model))
    again = pack(model, decoder_of(model))
    for mine, theirs, layer in zip(weights.layers, again.layers, model.model.layers, strict=True):
        for name, linear in (("qkv", layer.self_attn.q_proj), ("gate_up", layer.mlp.gate_proj), ("down", layer.mlp.down_proj)):
            first = getattr(mine, name).parts[0] if scheme != "none" else getattr(mine, name)
            second = getattr(theirs, name).parts[0] if scheme != "none" else getattr(theirs, name)
            stored = linear.codes if scheme != "none" else linear.weight
            assert first.data_ptr() == second.data_ptr() == stored.data_ptr()
            assert torch.equal(first, second)
    shared = 16 * 4 * 3 * 3 if scheme == "nf4" else 0  # the sixteen values are counted once a matrix, and there are four, not seven
    assert weights.step_bytes == size - shared + model.lm_head.weight.nbytes
    assert sum(p.nbytes for p in model.parameters()) == sum(p.nbytes for p in plain)
    torch.testing.assert_close(model(inputs_embeds=prompt_of(1, 5).embeds).logits, before)


def test_mixed_and_foreign_linears_are_refused_before_anything_changes():
    model = build(scheme="int8")
    layer = model.model.layers[1]
    layer.mlp.down_proj = torch.nn.Linear(96, 64, bias=False)
    with pytest.raises(Unsupported, match="several kinds: Int8Linear, Linear"):
        pack(model, decoder_of(model))
    model = build(scheme="none")
    model.model.layers[2].self_attn.o_proj = torch.nn.Sequential(torch.nn.Linear(64, 64))
    q = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(Unsupported, match="o_proj is a Sequential"):
        pack(model, decoder_of(model))
    assert model.model.layers[0].self_attn.q_proj.weight is q
    model = build(scheme="int4")
    model.lm_head = Int4Linear(model.lm_head)
    with pytest.raises(Unsupported, match="quantised lm_head"):
        pack(model, decoder_of(model))


def matrix(kind, n, k):
    linear = torch.nn.Linear(k, n, bias=False)
    packed: PackedLinear = kind(linear).to(DEVICE)
    return PackedMatrix(kind, packed.parts(), (n, k))


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_unpacks(kind):
    w = matrix(kind, 24, 128)
    x = torch.randn(3, 128, device=DEVICE)
    torch.testing.assert_close(multiply(x, w), x @ kind.unpack(*w.parts).T, rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(48, 128), (41, 352), (9, 64)])
@pytest.mark.parametrize("form", ["plain", "norm", "gated", "residual", "bias"])
@pytest.mark.parametrize(
    "how", [("rows", 4, 64, 4, 0), ("rows", 8, 128, 2, 0), ("persistent", 2, 0, 4, 2), ("persistent", 4, 0, 4, 1)], ids=str
)
def test_packed_gemv_equals_float64(kind, n, k, form, how):
    """Against the unpacked weights in float64; rows that do not fill a block, columns that do not, groups of 32 to 128."""
    from stagebench.engines._launch import Form, Linear, launch_linear

    torch.manual_seed(n + k)
    w = matrix(kind, 2 * n if form == "gated" else n, k)
    x, norm = torch.randn(1, k, device=DEVICE), torch.rand(k, device=DEVICE) + 0.5
    bias = torch.randn(n, device=DEVICE) if form == "bias" else None
    before, out = torch.randn(1, n, device=DEVICE), torch.full((1, n), float("nan"), device=DEVICE)
    if form == "residual":
        out.copy_(before)
    norm = norm if form in ("norm", "gated") else None
    gated, residual = form == "gated", form == "residual"
    pdl = DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    launch_linear(Linear(*how), x, w, out, Form(norm=norm, eps=1e-5, bias=bias, gated=gated, residual=residual, pdl=pdl))
    want = in_float64(x, kind.unpack(*w.parts), norm=norm, bias=bias, gated=gated, onto=before if residual else None)
    assert apart(out, want) < 2e-5


@kernels
@pytest.mark.parametrize("kind", [Int4Linear, Nf4Linear])
@pytest.mark.parametrize("columns", [2048, 352, 64, 10, 176])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_kernel_equals_torch(kind, columns, dtype):
    from stagebench.models._kernels_unpack import unpack4

    packed = kind(torch.nn.Linear(columns, 7, bias=False)).to(DEVICE)
    got = unpack4(*packed.parts(), dtype, quads=columns % 32 == 0, nf4=kind is Nf4Linear)
    torch.testing.assert_close(got, kind.unpack(*packed.parts()).to(dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-7)


@kernels
@pytest.mark.parametrize("columns", [1024, 352, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widening_kernel_is_exact(columns, dtype):
    from stagebench.models._kernels_unpack import unpack8

    packed = Int8Linear(torch.nn.Linear(columns, 7, bias=False)).to(DEVICE)
    got = unpack8(packed.codes, dtype, quads=columns % 16 == 0)
    assert torch.equal(got.float() * packed.scale[:, None], Int8Linear.unpack(*packed.parts()))


@kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_row_product_equals_unpacking(kind, bias):
    from stagebench.models._packed_launch import row_product

    packed = kind(torch.nn.Linear(352, 41, bias=bias)).to(DEVICE)
    x = torch.randn(352, device=DEVICE)
    want = torch.nn.functional.linear(x, kind.unpack(*packed.parts()), packed.bias)
    torch.testing.assert_close(row_product(kind, packed.parts(), x, packed.bias), want, rtol=1e-4, atol=1e-4)


@kernels
def test_packed_kernels_refuse_what_they_cannot_read():
    from stagebench.engines._launch import Linear, launch_linear

    x = torch.randn(1, 176, device=DEVICE)
    with pytest.raises(ValueError, match="Int4Linear of 176 columns"):
        launch_linear(Linear(), x, matrix(Int4Linear, 8, 176), torch.empty(1, 8, device=DEVICE))
    with pytest.raises(ValueError, match="'pipelined' for packed weights"):
        launch_linear(Linear("pipelined"), x[:, :64], matrix(Nf4Linear, 8, 64), torch.empty(1, 8, device=DEVICE))


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_kept_while_a_graph_is_captured(before):
    """And the collector is as it was afterwards, also when the capture failed."""
    (gc.enable if before else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="inside"), garbage_kept():
            assert not gc.isenabled()
            raise RuntimeError("inside")
        assert gc.isenabled() == before
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_dead_graph_does_not_spoil_the_capture_of_another():
    """A graph that only the collector can free, and a captured function that makes it run."""
    x = torch.zeros(64, device=DEVICE)
    cycle = [capture(lambda: x.add_(torch.rand_like(x)), DEVICE)]
    cycle.append(cycle)
    del cycle

    def function():
        for _ in range(200_000):
            knot = []
            knot.append(knot)
        x.add_(torch.rand_like(x))

    replay = capture(function, DEVICE)
    gc.collect()
    replay()
    torch.manual_seed(3)
    assert torch.rand(4, device=DEVICE).isfinite().all() and x.isfinite().all()
