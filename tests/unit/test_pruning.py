"""Leaving out visual tokens: which ones, in which order, and that nothing else changes."""

import numpy as np
import pytest
import torch

from stagebench.errors import ModelError
from stagebench.models import registry
from stagebench.models.base import Decoding, ModelSpec
from stagebench.models.pruning import kept_tokens

torch.set_num_threads(1)
CASES = {"eventgpt": ("eventgpt", None), "llava": ("hf", "images"), "llava-grid": ("hf", "grid"), "video_llava": ("hf", None)}


def load(case, keep):
    adapter, frames_as = CASES[case]
    made = registry.create(adapter)
    made.load(ModelSpec("dummy:0", case.removesuffix("-grid"), "tiny", frames_as=frames_as, keep_visual=keep, attention="eager"), "cpu")
    return made


def frames(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, (56, 64, 3), dtype=np.uint8) for _ in range(count)]


def test_the_best_stay_in_order():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]])
    assert kept_tokens(scores, 4, 0.5).tolist() == [[1, 3], [0, 1]]
    assert kept_tokens(scores, 5, 0.6).tolist() == [[0, 2, 4], [0, 1, 2]]  # CLS first, then patches one further on
    assert kept_tokens(scores, 4, 0.01).tolist() == [[1], [0]]
    assert kept_tokens(scores, 5, 0.01).tolist() == [[0], [0]]
    with pytest.raises(ModelError, match="one a patch"):
        kept_tokens(scores, 3, 0.5)


@pytest.mark.parametrize("case", CASES)
def test_kept_features_are_the_models_own(case):
    whole, half = load(case, 1.0), load(case, 0.5)
    inputs = half.preprocess(frames(), "What?")
    reference, features = whole.encode(inputs), half.encode(inputs)
    every, kept = reference.embeds[0], features.embeds[0]
    assert len(kept) < 0.6 * len(every) + 3
    where = [int((every - row).abs().amax(1).argmin()) for row in kept]
    assert where == sorted(set(where))  # each is one of the model's own, none twice, in order
    torch.testing.assert_close(kept, every[where], rtol=0, atol=0)
    prompt, full = half.merge(inputs, features), whole.merge(inputs, reference)
    dropped = len(every) - len(kept)
    assert prompt.length == full.length - dropped == int(prompt.attention_mask.sum())
    assert prompt.position_ids[0].tolist() == list(range(prompt.length))
    # the text around it is the same text
    assert torch.equal(prompt.embeds[0, -5:], full.embeds[0, -5:]) and torch.equal(prompt.embeds[0, :3], full.embeds[0, :3])


@pytest.mark.parametrize("case", ["llava", "video_llava"])
def test_scores_are_the_towers_own_attention(case):
    half = load(case, 0.5)
    inputs = half.preprocess(frames(), "What?")
    kept = half.encode(inputs).extra["kept"][0]
    tower = half.vision_module()
    with torch.inference_mode():
        pixels = next(iter(inputs.pixels.values())).reshape(-1, 3, 56, 56)
        attention = tower(pixels, output_attentions=True).attentions[-2]  # [images, heads, 17, 17]
    tokens = 17 if case == "video_llava" else 16
    expected = kept_tokens(attention.mean(1)[:, 0, 1:], tokens, 0.5) + torch.arange(3)[:, None] * tokens
    assert kept.tolist() == expected.flatten().tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_batch_equals_singles(case):
    half = load(case, 0.5)
    samples = [half.preprocess(frames(seed=n), query) for n, query in enumerate(("What?", "Is there a pedestrian near the crossing?"))]
    batch = half.collate(samples)
    together = half.merge(batch, half.encode(batch))
    model = half.language_model()
    for row, inputs in enumerate(samples):
        alone = half.merge(inputs, half.encode(inputs))
        assert torch.equal(together.attention_mask[row, -alone.length :], alone.attention_mask[0])
        torch.testing.assert_close(together.embeds[row, -alone.length :], alone.embeds[0], rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            a, b = (
                model(inputs_embeds=p.embeds, attention_mask=p.attention_mask, position_ids=p.position_ids).logits[i, -1]
                for p, i in ((together, row), (alone, 0))
            )
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_an_engine_may_replace_the_feature_function(case):
    """As engines do that capture it in a graph: the tower's Python, hooks too, does not run again at a replay."""
    half = load(case, 0.5)
    inputs = half.preprocess(frames(), "What?")
    owner, name = (half.model, "get_event_features") if case == "eventgpt" else (half, "_encode")
    expected = half.encode(inputs).content_hash()
    recorded = []
    function = getattr(owner, name)

    def replayed(*args, **kwargs):
        if not recorded:
            recorded.append(function(*args, **kwargs))
        return recorded[0]

    setattr(owner, name, replayed)
    for _ in range(2):
        features = half.encode(inputs)
        assert features.content_hash() == expected
        assert half.merge(inputs, features).length < load(case, 1.0).merge(inputs, load(case, 1.0).encode(inputs)).length


def test_models_without_cls_are_refused():
    for architecture in ("qwen2_5_vl", "llava_onevision"):
        with pytest.raises(ModelError, match=r"variants.keep_visual: \[1.0\]"):
            registry.create("hf").load(ModelSpec("dummy:0", architecture, "tiny", keep_visual=0.5), "cpu")


def test_all_tokens_is_the_model_itself():
    whole = load("llava", 1.0)
    inputs = whole.preprocess(frames(), "What?")
    assert "kept" not in whole.encode(inputs).extra
    assert whole.monolithic(inputs, Decoding(3, 3)).ids
