"""A model whose stages do nothing: what it still costs is the harness itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from stagebench.engines.base import EngineInfo
from stagebench.models.base import Adapter, Decoding, Features, Inputs, ModelSpec, Prompt, Tokens
from stagebench.session.order import Task
from stagebench.session.run import Subject, run_once
from stagebench.stages import STAGES, StageClock

__all__ = ["harness_ms", "null_subject"]

RUNS = 30


class _NullInputs(Inputs):
    """Already there, wherever that is."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Inputs:
        return self


class _NullAdapter:
    """Every stage hands on what is there already. Runs on the measured device, so that synchronisation costs what it costs."""

    name = "null"

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.spec = ModelSpec(weights="dummy:0", architecture="null")
        self._vision = nn.Identity()
        one = torch.ones(1, 1, dtype=torch.int64, device=device)
        self._inputs = _NullInputs(one, one, {})
        self._features = Features((torch.zeros(1, 1, device=device),))
        self._prompt = Prompt(torch.zeros(1, 1, 1, device=device), self._inputs.attention_mask, self._inputs.input_ids)

    def load(self, spec: ModelSpec, device: torch.device | str) -> None:
        """There is nothing to load."""

    def preprocess(self, frames: Sequence[np.ndarray], query: str) -> Inputs:
        return self._inputs

    def collate(self, batch: Sequence[Inputs]) -> Inputs:
        return batch[0]

    def encode(self, inputs: Inputs) -> Features:
        self._vision(self._features.embeds[0])
        return self._features

    def merge(self, inputs: Inputs, features: Features) -> Prompt:
        return self._prompt

    def monolithic(self, inputs: Inputs, decoding: Decoding) -> Tokens:
        return _TOKENS

    def monolithic_logits(self, inputs: Inputs) -> torch.Tensor:
        return torch.zeros(1, 1)

    def language_model(self) -> nn.Module:
        return self._vision

    def vision_module(self) -> nn.Module:
        return self._vision

    def eos_token_ids(self) -> tuple[int, ...]:
        return (0,)

    def detokenize(self, ids: Sequence[int]) -> str:
        return ""

    def revision(self) -> str:
        return "null"

    def tokenizer_digest(self) -> str:
        return "null"


_TOKENS = Tokens(ids=((1,),), finish_reasons=("length",))


class _NullEngine:
    name = "null"

    def prepare(self, adapter: Adapter, decoding: Decoding, batch: int) -> EngineInfo:
        return EngineInfo(self.name)

    def run(self, merge: Callable[[], Prompt], decoding: Decoding, clock: StageClock) -> Tokens:
        clock.begin("prefill")
        merge()
        clock.switch("decode")
        clock.end()
        return _TOKENS


class _NullLoader:
    def load(self, clip: str) -> Sequence[np.ndarray]:
        return ()


def null_subject(device: str) -> Subject:
    """A subject to be run like any other."""
    return Subject(_NullAdapter(device), _NullEngine(), _NullLoader(), device)


def harness_ms(device: str, runs: int = RUNS) -> dict[str, float]:
    """Median milliseconds of each stage of the null workload, and `total`: the clock's, hooks' and loop's own cost of one sample."""
    subject = null_subject(device)
    task = Task("null#0", "null", "", "null", "")
    times = []
    for number in range(runs + 3):
        run = run_once(subject, [task], Decoding(1, 1))
        if number >= 3 and run.times is not None:
            times.append(run.times)
    found = {stage: statistics.median(t.host_ms[stage] for t in times) for stage in STAGES}
    return {**found, "total": statistics.median(t.total_ms for t in times)}
