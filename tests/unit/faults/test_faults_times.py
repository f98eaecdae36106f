"""Faults of clocks, of the harness, and of times that change during a job."""

import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest

from stagebench import machine, stages
from stagebench.models.hooks import EncoderCounter
from stagebench.rows import Code
from stagebench.stages import StageClock
from timing_jobs import Killed, killed_after


def test_a_sound_job_has_no_finding_of_its_own(timed: Any, runs: int) -> None:
    """What the other tests see is their fault's doing. Neighbours and noise of the test machine apart."""
    result = timed("plain")
    theirs = {Code.WARN_NEIGHBOURS, Code.WARN_LOAD_AVERAGE, Code.WARN_ANCHOR_DRIFT, Code.WARN_DRIFT, Code.WARN_FIRST_SLOW}
    assert not {f.code for f in result.report.findings} - theirs
    assert len(result.rows) == runs and not any(result.marked(Code.SUSPECT_CLOCKS))


class Cuda:
    """As much of torch.cuda as the clock calls; its events keep time by a clock of their own, `rate` times as fast."""

    def __init__(self, rate: float = 1.0) -> None:
        self.now = time.perf_counter  # the true one, whatever becomes of the host's
        self.memory = SimpleNamespace(memory_stats_as_nested_dict=lambda index: {"allocated_bytes": {"all": {"peak": 1}}})
        cuda = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing
                self.at = 0.0

            def record(self) -> None:
                self.at = cuda.now()

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3 * rate

        self.Event = Event

    def current_device(self) -> int:
        return 0

    def synchronize(self, index: int) -> None: ...

    def reset_peak_memory_stats(self, index: int) -> None: ...


@pytest.mark.parametrize("fault", ["none", "device runs fast", "host jumps"])
def test_clocks_that_disagree_are_suspect(timed: Any, runs: int, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(stages, "_cuda_api", lambda: Cuda(2.0 if fault == "device runs fast" else 1.0))
    monkeypatch.setattr(stages, "_SPARE", {})
    init = StageClock.__init__
    monkeypatch.setattr(StageClock, "__init__", lambda self, device="cpu", **k: init(self, "cuda:0", **k))
    if fault == "host jumps":  # by 80 ms in one sample's decode stage: every reading after it is later, so no stage misses it
        tick, jumped = time.perf_counter_ns, []
        monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter_ns=lambda: tick() + 80_000_000 * len(jumped)))
        switch = StageClock.switch

        def jumping(self: StageClock, name: str) -> None:
            switch(self, name)
            if next(count) == 37:  # the null workload's runs, the first call and the warm-up went before
                jumped.append(1)

        count = itertools.count()
        monkeypatch.setattr(StageClock, "switch", jumping)
    result = timed()
    marked = result.marked(Code.SUSPECT_CLOCKS)
    # 5 ms: a busy test machine can stand between the readings of the two clocks, by less
    faulty = [abs(row["total_ms"] - row["total_gpu_ms"]) > 5 for row in result.rows]
    assert sum(faulty) == {"none": 0, "device runs fast": runs, "host jumps": 1}[fault]
    for row, bad, said in zip(result.rows, faulty, marked, strict=True):
        if bad:
            assert said and "by the host's clock" in row["reason"] and Code.SUSPECT_CLOCKS.discards


def test_events_are_made_once(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first record of an event creates it on the device: later samples take the events of earlier ones."""
    made = []

    class Counting(Cuda):
        def __init__(self) -> None:
            super().__init__()
            event = self.Event
            self.Event = lambda *, enable_timing: made.append(1) or event(enable_timing=enable_timing)  # type: ignore[misc,assignment]

    cuda = Counting()
    monkeypatch.setattr(stages, "_cuda_api", lambda: cuda)
    monkeypatch.setattr(stages, "_SPARE", {})
    for _ in range(3):
        clock = StageClock("cuda:0")
        with clock.total():
            for stage in stages.STAGES:
                clock.begin(stage)
                if stage == "decode":
                    clock.token()
                clock.end()
        times = clock.times()
        assert clock.times() is times and set(times.gpu_ms) == set(stages.STAGES) and len(times.token_ms) == 1
    assert len(made) == 2 * len(stages.STAGES) + 2 + 1


def test_a_dear_harness_is_said(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = EncoderCounter.enter

    def enter(self: EncoderCounter, stage: str) -> None:
        time.sleep(0.01)
        slow(self, stage)

    monkeypatch.setattr(EncoderCounter, "enter", enter)
    result = timed()
    assert result.job["harness_ms"]["total"] > 20 and all(row["harness_ms"] > 20 for row in result.rows)
    assert "the harness costs" in result.text(Code.WARN_HARNESS)


@pytest.fixture
def cold(adapted: Any) -> None:
    """The first measured sample takes 0.4 s longer to encode."""
    calls = itertools.count()

    def encode(own: Any, inputs: Any) -> Any:
        if next(calls) == 2:  # the first call and one warm-up run went before
            time.sleep(0.4)
        return own(inputs)

    adapted(encode=encode)


def test_a_cold_first_sample_names_the_key(timed: Any, runs: int, cold: None) -> None:
    result = timed()
    assert "Raise timing.warmup" in result.text(Code.WARN_FIRST_SLOW)
    assert result.marked(Code.WARN_FIRST_SLOW) == [True] + [False] * (runs - 1)


def test_a_cold_first_sample_from_before_a_kill_is_said(timed: Any, runs: int, cold: None) -> None:
    with pytest.raises(Killed):
        timed(progress=killed_after(runs))
    result = timed()
    assert result.report.resumed == runs and result.marked(Code.WARN_FIRST_SLOW) == [True] + [False] * (runs - 1)


def test_a_machine_that_slows_down_is_a_drift(timed: Any, adapted: Any) -> None:
    calls = itertools.count()

    def encode(own: Any, inputs: Any) -> Any:
        time.sleep(0.02 * next(calls))
        return own(inputs)

    adapted(encode=encode)
    result = timed()
    assert "encode + prefill changes by +" in result.text(Code.WARN_DRIFT) and all(result.marked(Code.WARN_DRIFT))


def test_an_anchor_that_drifts_marks_the_job(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = itertools.count()
    monkeypatch.setattr(machine, "anchor", lambda device: {"matmul_ms": 1.0 + 0.2 * next(slower)})
    result = timed()
    assert "anchor workloads moved by 20.0%" in result.text(Code.WARN_ANCHOR_DRIFT) and all(result.marked(Code.WARN_ANCHOR_DRIFT))
