"""Faults that change what the model does or says: hooks that cost time, other tokens, an encoder called again."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from stagebench.models.base import Decoding, Tokens
from stagebench.models.hooks import EncoderCounter
from stagebench.rows import Code
from stagebench.session import job as job_module
from stagebench.session import validity
from stagebench.stages import StageClock
from timing_jobs import Edited, Killed, killed_after


def test_a_hook_that_costs_time_is_invalid(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = EncoderCounter._called

    def slow(self: EncoderCounter, *_: Any) -> None:
        time.sleep(0.05)
        called(self)

    monkeypatch.setattr(EncoderCounter, "_called", slow)
    result = timed("plain")
    assert "instrumentation moves totals by +" in result.text(Code.INVALID_PLAIN_DIFFERS)
    assert all(result.marked(Code.INVALID_PLAIN_DIFFERS)) and not result.report.valid


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make one token of each plain run another one, for a model of that dtype.

    In bfloat16 nine pairs are too few for statistics: the model's own logits tell.
    """

    def other(tokens: Tokens, decoding: Decoding, clock: StageClock) -> Tokens:
        ids = tuple((*ids[:-1], 7 if ids[-1] != 7 else 8) for ids in tokens.ids)
        return tokens if clock.sync else replace(tokens, ids=ids)

    def install(dtype: str) -> None:
        if dtype == "bfloat16":
            load = job_module.load_adapter

            def half(config: Any, job: Any, **keywords: Any) -> Any:
                settings = {**job.variant.settings, "dtype": "bfloat16"}
                return load(config, replace(job, variant=replace(job.variant, settings=settings)), **keywords)

            monkeypatch.setattr(job_module, "load_adapter", half)
            monkeypatch.setattr(validity, "_fisher", lambda *_: 1.0)
        engine = Edited(other)  # before `create` is replaced: it makes its inner engine by that
        monkeypatch.setattr(job_module.engines, "create", lambda name: engine)

    return install


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plain_run_that_says_something_else_is_invalid(timed: Any, forked: Any, dtype: str) -> None:
    forked(dtype)
    result = timed("plain")
    assert result.rows[0]["dtype"] == dtype
    said = result.text(Code.INVALID_PLAIN_DIFFERS)
    assert ("rounding does not explain it" in said) if dtype == "bfloat16" else ("tokens differ in" in said)


def test_a_divergence_from_before_a_kill_is_judged(timed: Any, runs: int, forked: Any) -> None:
    """All that parted lies in the journal: the process that writes the file measures nothing."""
    forked("bfloat16")
    with pytest.raises(Killed):
        timed("plain", progress=killed_after(runs))
    result = timed("plain")
    assert result.report.resumed == runs
    assert "rounding does not explain it" in result.text(Code.INVALID_PLAIN_DIFFERS) and all(result.marked(Code.INVALID_PLAIN_DIFFERS))


def test_a_divergence_that_cannot_be_judged_is_said(timed: Any, runs: int, forked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward that judges runs out of memory after all is measured: no row is lost, and the first call already says so."""
    forked("bfloat16")

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sys.modules["stagebench.session.divergence"], "first_divergence", full)
    result = timed("plain")
    said = result.text(Code.WARN_UNJUDGED)
    assert len(result.rows) == runs and "tokens of 8 samples differ" in said and "OutOfMemoryError: CUDA out of memory" in said
    assert not result.text(Code.INVALID_PLAIN_DIFFERS)


def test_an_encoder_called_again_is_invalid(timed: Any, adapted: Any) -> None:
    adapted(encode=lambda encode, inputs: (encode(inputs), encode(inputs))[1])
    result = timed()
    assert all(result.marked(Code.INVALID_ENCODER_CALLS)) and all(row["encoder_calls"] == 2 for row in result.rows)
    assert result.text(Code.INVALID_NO_ACCEPTED)


def test_ids_past_eos_are_invalid(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def early(tokens: Tokens, decoding: Decoding, clock: StageClock) -> Tokens:
        return replace(tokens, ids=tuple((decoding.eos_token_ids[0], *ids[1:]) for ids in tokens.ids))

    engine = Edited(early)
    monkeypatch.setattr(job_module.engines, "create", lambda name: engine)
    result = timed("natural")
    assert all(result.marked(Code.INVALID_TOKEN_COUNT)) and "EOS stands before the end" in result.rows[0]["reason"]
