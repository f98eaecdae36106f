"""Packed linears against arithmetic done by hand, and in place of a model's own."""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stagebench.engines.quality import compare_logits
from stagebench.errors import ModelError
from stagebench.models import quantize, registry
from stagebench.models._packed import NF4_CODES, Int4Linear, Int8Linear, Nf4Linear, PackedLinear, group_size
from stagebench.models.base import ModelSpec
from stagebench.session.model import step_bytes, weights_bytes

torch.set_num_threads(1)
KINDS = (Int8Linear, Int4Linear, Nf4Linear)
MODELS = (
    ("eventgpt", "eventgpt"),
    ("hf", "llava"),
    ("hf", "video_llava"),
    ("hf", "qwen2_5_vl"),
    ("hf", "llava_onevision"),
)


def linear(out, columns, *, bias=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(columns, out, bias=bias, dtype=dtype)


def spacing(kind, weight):
    """The largest distance of a weight to what stands for it, [N, 1] or [N, G, 1], by the scheme's own definition."""
    if kind is Int8Linear:
        return weight.abs().amax(1, keepdim=True) / 127 / 2
    if kind is Int4Linear:
        groups = weight.unflatten(1, (-1, group_size(weight.shape[1], 128)))
        # the rounded low end can cost the far end another half step
        return ((groups.amax(2).clamp_min(0) - groups.amin(2).clamp_max(0)) / 15)[..., None].expand_as(groups).flatten(1)
    blocks = weight.unflatten(1, (-1, group_size(weight.shape[1], 64)))
    widest = max(b - a for a, b in pairwise(NF4_CODES)) / 2
    return (blocks.abs().amax(2, keepdim=True) * widest).expand_as(blocks).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(out=st.integers(1, 9), halves=st.integers(1, 70), seed=st.integers(0, 99), scale=st.floats(1e-4, 1e3))
def test_every_weight_is_within_half_a_step(kind, out, halves, seed, scale):
    plain = linear(out, 2 * halves, seed=seed)
    plain.weight.data *= scale
    packed = kind(plain)
    error = (packed.weight_as(torch.float32) - plain.weight.detach()).abs()
    assert (error <= spacing(kind, plain.weight.detach()) * 1.001 + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_product_with_the_unpacked_weight(kind):
    plain = linear(24, 128)
    packed = kind(plain)
    x = torch.randn(2, 5, 128)
    torch.testing.assert_close(packed(x), x @ packed.weight_as(torch.float32).T + plain.bias)
    assert packed(x).dtype == torch.float32
    assert packed(x.to(torch.bfloat16).to(torch.float32)).shape == (2, 5, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row_goes_to_the_kernel_and_many_do_not(kind):
    packed = kind(linear(12, 128))
    seen = []

    def row_product(cls, parts, x, bias):
        seen.append((cls, len(parts), x.shape))
        return cls.product(x, parts, bias)

    packed.row_product = row_product
    x = torch.randn(1, 1, 128)
    torch.testing.assert_close(packed(x), x @ packed.weight_as(torch.float32).T + packed.bias)
    assert seen == [(kind, len(kind.PARTS), torch.Size([128]))]
    assert packed(torch.randn(2, 128)).shape == (2, 12) and len(seen) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [128, 96, 176, 10])
def test_codes_lie_as_the_kernels_read_them(kind, columns):
    """The j-th code of a quad's word r is column 4j + r; where no quad fits, codes follow one another."""
    plain = linear(1, columns, bias=False)
    packed = kind(plain)
    stored = packed.codes[0].view(torch.uint8).tolist()
    codes = stored if kind is Int8Linear else [half for byte in stored for half in (byte & 15, byte >> 4)]
    want = kind.unpack(*packed.parts())[0]
    quad = 16 if kind is Int8Linear else 32
    for column in range(columns):
        at = column
        if columns % quad == 0:
            j, r = divmod(column % quad, 4)
            at = column - column % quad + r * quad // 4 + j
        moved = [part.clone() for part in packed.parts()]
        flat = moved[0].view(torch.uint8)[0]
        byte = at if kind is Int8Linear else at // 2
        flat[byte] ^= 1 if kind is Int8Linear else 1 << 4 * (at % 2)
        changed = (kind.unpack(*moved)[0] != want).nonzero().flatten().tolist()
        assert changed == [column], (codes[at], column)


@pytest.mark.parametrize(("kind", "share"), [(Int8Linear, 0.27), (Int4Linear, 0.15), (Nf4Linear, 0.16)])
def test_packed_weights_are_small(kind, share):
    plain = linear(512, 512, bias=False)
    packed = kind(plain)
    assert sum(p.numel() * p.element_size() for p in packed.parameters()) < share * plain.weight.nbytes


def test_zero_stays_zero_and_extremes_are_kept():
    plain = linear(3, 128, bias=False)
    plain.weight.data[:, 5] = 0
    plain.weight.data[1] = 0
    for kind in KINDS:
        weight = kind(plain).weight_as(torch.float32)
        assert (weight[:, 5] == 0).all() and (weight[1] == 0).all()
    top = plain.weight.detach()[0].abs().argmax()
    for kind in (Int8Linear, Nf4Linear):  # both scale by the largest magnitude
        expected = plain.weight[0, top]
        if kind is Nf4Linear:
            top = plain.weight.detach()[0, :64].abs().argmax()
            expected = plain.weight[0, top]
        torch.testing.assert_close(kind(plain).weight_as(torch.float32)[0, top], expected.detach(), rtol=1e-6, atol=0)


def test_nf4_is_what_bitsandbytes_stores():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    plain = linear(32, 128, bias=False)
    stored, state = functional.quantize_4bit(plain.weight.data, blocksize=64, quant_type="nf4", compress_statistics=False)
    theirs = functional.dequantize_4bit(stored, state)
    torch.testing.assert_close(Nf4Linear(plain).weight_as(torch.float32), theirs, rtol=1e-6, atol=1e-7)


@lru_cache(maxsize=2)
def plain_model(adapter, architecture):
    return load(adapter, architecture)


def load(adapter, architecture, scheme="none", dtype=torch.float32):
    made = registry.create(adapter)
    made.load(ModelSpec("dummy:0", architecture, "tiny", dtype=dtype, quantization=scheme), "cpu")
    return made


def frames(count=3):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (56, 64, 3), dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize(
    ("adapter", "architecture", "scheme"), [(*m, s) for m, s in zip(MODELS, ("int8", "int4", "nf4", "int8", "nf4"), strict=True)]
)
def test_only_the_text_layers_change(adapter, architecture, scheme):
    plain, packed = plain_model(adapter, architecture), load(adapter, architecture, scheme)
    changed = {name for name, module in packed.language_model().named_modules() if isinstance(module, PackedLinear)}
    assert changed
    assert all(".layers." in name and not any(part in name for part in ("vision", "visual", "tower", "projector")) for name in changed)
    kept = dict(packed.language_model().named_parameters())
    for name, parameter in plain.language_model().named_parameters():
        if not any(name.startswith(f"{prefix}.") for prefix in changed):
            assert torch.equal(kept[name], parameter), name
    # all linears of a layer, seven of them in LLaMA's family
    assert len(changed) == 7 * len(quantize.text_layers(packed.language_model()))
    assert weights_bytes(packed) < weights_bytes(plain)
    assert step_bytes(packed) < step_bytes(plain)
    given = frames()
    inputs = plain.preprocess(given, "What is it?")
    assert packed.encode(inputs).content_hash() == plain.encode(inputs).content_hash()
    quality = compare_logits(plain.monolithic_logits(inputs), packed.monolithic_logits(inputs))
    assert 0 < quality.relative_error < 0.3


def test_finer_schemes_are_closer():
    plain = plain_model("hf", "llava")
    inputs = plain.preprocess(frames(), "What is it?")
    reference = plain.monolithic_logits(inputs)
    error = {s: compare_logits(reference, load("hf", "llava", s).monolithic_logits(inputs)).relative_error for s in quantize.SCHEMES}
    assert error["int8"] < error["nf4"] < error["int4"]


def test_half_precision_and_half_the_memory():
    plain, packed = (load("hf", "llava", scheme, torch.bfloat16) for scheme in ("none", "int8"))
    inputs = plain.preprocess(frames(), "What is it?").to("cpu", torch.bfloat16)
    assert packed.monolithic_logits(inputs).isfinite().all()
    info = quantize.apply(load("hf", "llava", dtype=torch.bfloat16).model, scheme="nf4", device=torch.device("cpu"), vision=nn.Identity())
    assert info.kernel == "torch" and info.linears == 14
    assert info.bytes_after < 0.35 * info.bytes_before


def test_refusals_name_the_remedy():
    adapter = load("hf", "llava")
    device = torch.device("cpu")
    with pytest.raises(ModelError, match="int8, int4, nf4"):
        quantize.apply(adapter.model, scheme="int3", device=device, vision=adapter.vision_module())
    with pytest.raises(ModelError, match="vision module lies inside"):
        quantize.apply(adapter.model, scheme="int8", device=device, vision=adapter.model)
    with pytest.raises(ModelError, match="0 text decoders"):
        quantize.apply(nn.Sequential(nn.Linear(4, 4)), scheme="int8", device=device, vision=nn.Identity())
    quantize.apply(adapter.model, scheme="int8", device=device, vision=adapter.vision_module())
    with pytest.raises(ModelError, match="quantised already"):
        quantize.apply(adapter.model, scheme="int8", device=device, vision=adapter.vision_module())
