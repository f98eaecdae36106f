"""timing.prefetch: the same outputs in less wall time, marked, refused where latencies are meant."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from stagebench import engines
from stagebench.config import RepeatsConfig, TimingConfig
from stagebench.session import Settings, Subject, time_samples
from timing_jobs import Frames, tasks, tiny_llava

torch.set_num_threads(1)
OFF = Settings(lengths=("4",), repeats=RepeatsConfig(min=2, max=2), warmup=1)
ON = replace(OFF, prefetch=True)


@pytest.fixture(scope="module")
def adapter():
    return tiny_llava()


def run(adapter, settings, count=3, **loader):
    frames = Frames(**loader)
    outcome = time_samples(
        Subject(adapter, engines.create("generate"), frames, "cpu"), tasks(count), settings, constant={"source": "cache"}
    )
    return outcome, frames


def outputs(outcome):
    return [(r["sample"], r["repeat"], r["length"], r["status"], r["token_ids"], r["feature_hash"]) for r in outcome.rows]


@pytest.mark.parametrize("changes", [{"batch": 2}, {"lengths": ("natural", "3"), "max_new_tokens": 4, "warmup": 0}])
def test_outputs_are_those_of_runs_without_it(adapter, changes):
    off, _ = run(adapter, replace(OFF, **changes))
    on, frames = run(adapter, replace(ON, **changes))
    assert outputs(on) == outputs(off)
    assert {r["source"] for r in on.rows} == {"cache+prefetch"} and {r["source"] for r in off.rows} == {"cache"}
    assert all(name.startswith("prefetch") for name in frames.threads)
    assert all(r["residual_ms"] is not None and r["load_ms"] >= 0 for r in on.rows)


def test_a_load_as_long_as_the_rest_is_hidden(adapter):
    """Fastest runs: what else runs on the test machine can only lengthen them."""
    off, _ = run(adapter, replace(OFF, lengths=("24",)), seconds=0.01)
    on, _ = run(adapter, replace(ON, lengths=("24",)), seconds=0.01)
    assert min(r["load_ms"] for r in off.rows) >= 10
    assert min(r["load_ms"] for r in on.rows) < 5


def test_a_clip_that_cannot_be_read_is_one_row_and_the_next_goes_on(adapter):
    outcome, _ = run(adapter, ON, bad=["seq/1"])
    statuses = {r["sample"]: r["status"] for r in outcome.rows}
    assert statuses == {"seq/0#q": "ok", "seq/1#q": "error", "seq/2#q": "ok"}
    assert any("no such clip" in (r["reason"] or "") for r in outcome.rows)


def test_the_last_sample_is_not_followed_by_a_load_for_nothing(adapter):
    _, frames = run(adapter, replace(ON, warmup=0), count=3)
    assert len(frames.loaded) == 1 + 3 * 2  # the first call, and two repeats each


def test_no_thread_is_left(adapter):
    run(adapter, ON)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_a_latency_study_cannot_have_it():
    assert TimingConfig.model_validate({"prefetch": True, "plain_share": 0}).prefetch
    with pytest.raises(ValueError, match="plain_share: 0"):
        TimingConfig.model_validate({"prefetch": True})
    assert TimingConfig().prefetch is False
