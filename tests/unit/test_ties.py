"""Where two texts part, judged by logits made as a decode makes them."""

import numpy as np
import pytest
import torch

from stagebench.models import registry, ties
from stagebench.models.base import ModelSpec
from stagebench.models.ties import LOGIT_TOLERANCE, PASSES, _logits_after, first_divergence

torch.set_num_threads(1)
MODELS = (("eventgpt", "eventgpt"), ("hf", "llava"), ("hf", "video_llava"), ("hf", "qwen2_5_vl"), ("hf", "llava_onevision"))


def load(adapter, architecture, **spec):
    made = registry.create(adapter)
    made.load(ModelSpec("dummy:0", architecture, "tiny", **spec), "cpu")
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (56, 64, 3), dtype=np.uint8) for _ in range(3)]
    inputs = made.preprocess(frames, "What is there?").to("cpu", made.spec.dtype)
    with torch.inference_mode():
        return made, made.merge(inputs, made.encode(inputs))


@pytest.mark.parametrize(("adapter", "architecture"), MODELS)
def test_stepwise_logits_equal_those_of_one_pass(adapter, architecture):
    made, prompt = load(adapter, architecture, dtype=torch.float32)
    ids = [5, 7, 11, 13]
    model = made.language_model()
    with torch.inference_mode():
        tail = model.get_input_embeddings()(torch.tensor([ids]))
        positions = torch.cat([prompt.position_ids, prompt.position_ids[..., -1:] + torch.arange(1, 5)], -1)
        want = model(
            inputs_embeds=torch.cat([prompt.embeds, tail], 1),
            attention_mask=torch.cat([prompt.attention_mask, prompt.attention_mask.new_ones((1, 4))], 1),
            position_ids=positions,
            use_cache=False,
        ).logits[0, -1]
    torch.testing.assert_close(_logits_after(made, prompt, ids), want, rtol=1e-4, atol=1e-4)


def test_a_tie_below_float32_is_one_and_a_choice_is_not():
    made, prompt = load("hf", "llava", dtype=torch.bfloat16, quantization="int4")
    logits = _logits_after(made, prompt, [5, 7])
    order = logits.argsort(descending=True).tolist()
    gap = float((logits[order[0]] - logits[order[1]]) / logits.std())
    far = order[-1]
    assert first_divergence(made, prompt, (5, 7, order[0]), (5, 7, order[0])) is None
    parted = first_divergence(made, prompt, (5, 7, order[0]), (5, 7, far))
    assert (parted.step, parted.tie) == (2, False) and parted.gap > 1
    close = first_divergence(made, prompt, (5, 7, order[0]), (5, 7, order[1]))
    assert close.gap == pytest.approx(gap, rel=1e-5) and close.tie == (gap <= 2 * LOGIT_TOLERANCE[torch.bfloat16])
    assert not first_divergence(made, prompt, (5, 7), (5, 7, far)).tie  # one is a prefix of the other: nothing to read


def test_a_pass_that_finds_no_tie_is_made_again_and_their_mean_judges(monkeypatch):
    """On a GPU one pass over the same tokens moves such a gap by several steps of bfloat16."""
    made, prompt = load("hf", "llava", dtype=torch.bfloat16)

    def judged(gaps):
        seen = iter(gaps)
        monkeypatch.setattr(ties, "gap_after", lambda *_: next(seen))
        return first_divergence(made, prompt, (5, 7), (5, 8))

    near = judged([0.05])
    assert (near.tie, near.passes, near.gap) == (True, 1, 0.05)
    unlucky = judged([0.13, *[0.02, -0.04, 0.05, 0.01, 0.07, -0.02, 0.02]])
    assert (unlucky.tie, unlucky.passes) == (True, PASSES) and unlucky.gap == pytest.approx(0.03)
    assert "mean of 8 passes" in str(unlucky)
    choice = judged([0.13, *[0.125] * (PASSES - 1)])
    assert (choice.tie, choice.passes) == (False, PASSES)
    opposed = judged([-0.3] * PASSES)  # the mean's sign is no excuse
    assert not opposed.tie and opposed.gap == pytest.approx(0.3)


def test_a_port_that_answers_at_random_is_not_excused_by_the_mean():
    """Dropout left on: each pass is far off, to either side, and the mean of eight is near zero. One pass in three passes by chance."""
    made, prompt = load("hf", "llava", dtype=torch.bfloat16)
    made.language_model().train()
    for module in made.language_model().modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    torch.manual_seed(0)
    logits = torch.stack([_logits_after(made, prompt, [5, 7]) for _ in range(40)])
    middle = logits.mean(0)
    near = middle.argsort()[len(middle) // 2 :].tolist()  # neighbours in the ranking: their mean logits are next to equal
    found = [first_divergence(made, prompt, (5, 7, a), (5, 7, b)) for a, b in zip(near[0:80:2], near[1:80:2], strict=True)]
    assert all(each.passes == 1 for each in found if each.tie)
    scattered = [each for each in found if each.scattered is not None]
    assert len(scattered) > len(found) // 3 and not any(each.tie for each in scattered)
    assert "scatter by" in str(scattered[0])


def test_logits_that_are_no_numbers_are_no_tie(monkeypatch):
    made, prompt = load("hf", "llava", dtype=torch.bfloat16)
    for odd in (float("nan"), float("inf")):
        seen = iter([0.3, odd, *[0.01] * (PASSES - 2)])
        monkeypatch.setattr(ties, "gap_after", lambda *_, seen=seen: next(seen))
        assert first_divergence(made, prompt, (5, 7), (5, 8)).gap == float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_that_a_model_rules_out_do_not_make_all_others_ties(dtype):
    """Chameleon gives its image tokens the dtype's least number; in float32 their square is no number."""
    made, prompt = load("hf", "llava", dtype=dtype)
    order = _logits_after(made, prompt, [5, 7]).argsort(descending=True).tolist()
    free = first_divergence(made, prompt, (5, 7, order[0]), (5, 7, order[500]))

    def rule_out(_module, _inputs, logits):
        logits[..., order[600:700]] = torch.finfo(logits.dtype).min
        return logits

    made.language_model().get_output_embeddings().register_forward_hook(rule_out)
    bound = first_divergence(made, prompt, (5, 7, order[0]), (5, 7, order[500]))
    assert not free.tie and not bound.tie and bound.gap == pytest.approx(free.gap, rel=0.1)
