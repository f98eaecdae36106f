"""The clock itself."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagebench.errors import SampleTimeoutError
from stagebench.stages import STAGES, TTFT_STAGES, VIEWS, StageClock, closure_bound_ms


def test_stages_and_residual_sum_to_the_total():
    clock = StageClock()
    with clock.total():
        for stage in STAGES:
            with clock.stage(stage):
                time.sleep(0.001)
        time.sleep(0.005)
    times = clock.times()
    assert list(times.host_ms) == list(STAGES)
    assert times.total_ms == pytest.approx(sum(times.host_ms.values()) + times.residual_ms)
    assert times.residual_ms >= 5 > 0
    assert times.ttft_ms == pytest.approx(sum(times.host_ms[s] for s in TTFT_STAGES))
    assert times.gpu_ms == {} and times.total_gpu_ms is None


def test_a_switch_leaves_nothing_between():
    clock = StageClock()
    with clock.total():
        clock.begin("prefill")
        clock.switch("decode")
        assert clock.current == "decode"
        clock.token()
        clock.end()
    spans = clock._spans
    assert 0 <= spans["decode"].begin_ns - spans["prefill"].end_ns < 1_000_000
    assert len(clock.times().token_ms) == 1


def test_misuse_is_refused():
    clock = StageClock()
    with pytest.raises(ValueError, match="expected one of"):
        clock.begin("vision")
    with pytest.raises(ValueError, match="still open"):
        clock.times()
    with clock.total():
        clock.begin("load")
        with pytest.raises(ValueError, match="inside load"):
            clock.begin("encode")
        clock.end()
        with pytest.raises(ValueError, match="twice"):
            clock.begin("load")
        with pytest.raises(ValueError, match="no stage is open"):
            clock.end()
        with pytest.raises(ValueError, match="no stage is open"):
            clock.switch("decode")


def test_a_deadline_ends_a_stage_and_a_token():
    clock = StageClock(timeout_s=0.01)
    with pytest.raises(SampleTimeoutError, match=r"prefill.*0\.01 s allowed.*sample_timeout_s"), clock.total():
        with clock.stage("load"):
            time.sleep(0.02)
        clock.begin("prefill")
    clock = StageClock(timeout_s=0.01)
    with pytest.raises(SampleTimeoutError, match="token 2"), clock.total(), clock.stage("decode"):
        time.sleep(0.02)
        clock.token()


def test_the_wall_clock_does_not_matter(monkeypatch):
    clock = StageClock()
    with clock.total(), clock.stage("load"):
        monkeypatch.setattr(time, "time", lambda: 0.0)  # an hour back, a year: no duration looks at it
    assert 0 < clock.times().total_ms < 1000


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_holds_every_stage_once(view):
    assert sorted(s for stages in VIEWS[view].values() for s in stages) == sorted(STAGES)


@given(st.floats(0, 1e6))
def test_the_closure_bound(total):
    assert closure_bound_ms(total) == pytest.approx(0.2 + total / 100)
