"""Models that have nothing of their own here but a stanza in the config: timed, verified, and caught when a grid or a position is lost."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from clip_study import extracted
from stagebench.config import load_config
from stagebench.demo import write_demo
from stagebench.models import registry
from stagebench.models.base import ModelSpec
from stagebench.session import run_job
from stagebench.verify import run_verify, verify_model

torch.set_num_threads(1)
STANZAS = {
    "qwen2_5_vl": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
    "onevision": {"adapter": "hf", "architecture": "llava_onevision", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
}


@pytest.mark.parametrize("name", STANZAS)
def test_a_stanza_is_all_it_takes(name, tmp_path):
    write_demo(tmp_path / "demo", clips=2, seconds=0.5, size=(64, 96))
    config = load_config(
        {
            "study": "any",
            "datasets": {"demo": {"root": str(tmp_path / "demo")}},
            "frames": {"count": 2},
            "models": {name: STANZAS[name]},
            "variants": {"attention": ["sdpa", "eager"]},
            "timing": {"lengths": [4], "max_new_tokens": 4, "repeats": 1, "warmup": 0},
        }
    )
    plan = extracted(config, tmp_path / "cache")
    for path in plan.verify_paths:
        assert run_verify(plan, plan.verify_job(path), tmp_path / path, cache=tmp_path / "cache", device="cpu").passed
    ids = []
    for job in plan.jobs:
        run_job(plan, job, tmp_path / job.path, cache=tmp_path / "cache", device="cpu", threads=1)
        rows = pl.read_parquet(tmp_path / job.path).sort("sample")
        assert set(rows["status"]) == {"ok"} and set(rows["encoder_calls"]) == {1} and rows["visual_tokens"].min() > 0
        ids.append(rows["token_ids"].to_list())
    assert len(ids) == 2 and ids[0] == ids[1]  # two implementations of the same attention


def checks(adapter):
    # neither square nor all alike, so that a grid tells something that the number of tokens does not
    frames = [np.random.default_rng(i).integers(0, 256, (56, 112, 3), dtype=np.uint8) for i in range(2)]
    return {check.name: check for check in verify_model(adapter, frames, "What is it?", tokens=6).checks}


def loaded(architecture):
    adapter = registry.create("hf")
    adapter.load(ModelSpec("dummy:0", architecture, "tiny"), "cpu")
    return adapter


@pytest.mark.parametrize(
    ("architecture", "key"), [("qwen2_5_vl", "image_grid_thw"), ("qwen2_5_vl", "mm_token_type_ids"), ("llava_onevision", "image_sizes")]
)
def test_an_input_lost_on_the_way_to_the_stages_is_caught(architecture, key):
    adapter = loaded(architecture)
    assert all(check.passed for check in checks(adapter).values())
    for stage in ("encode", "merge"):
        whole = getattr(adapter, stage)

        def without(inputs, *rest, whole=whole):
            return whole(replace(inputs, extra={k: v for k, v in inputs.extra.items() if k != key}), *rest)

        setattr(adapter, stage, without)
    found = checks(adapter)
    assert not found["logits equal"].passed and not found["greedy tokens equal"].passed


def test_lost_mrope_positions_are_caught():
    """Text positions in place of (time, height, width): the same prompt, length and tokens, and another model."""
    adapter = loaded("qwen2_5_vl")
    merge = adapter.merge

    def flat(inputs, features):
        prompt = merge(inputs, features)
        return replace(prompt, position_ids=torch.arange(prompt.length).expand_as(prompt.position_ids))

    adapter.merge = flat
    assert not checks(adapter)["logits equal"].passed


def test_a_lost_type_id_is_caught():
    """One image's tokens marked as text: their positions are then text positions."""
    adapter = loaded("qwen2_5_vl")
    merge = adapter.merge

    def untyped(inputs, features):
        return merge(replace(inputs, extra={**inputs.extra, "mm_token_type_ids": torch.zeros_like(inputs.input_ids)}), features)

    adapter.merge = untyped
    assert not checks(adapter)["logits equal"].passed
