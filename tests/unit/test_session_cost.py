"""Where a job's wall time goes."""

import pytest

from stagebench.session.cost import JobCost


def test_parts_have_no_gaps_and_sum_to_the_wall_time() -> None:
    clock = iter([100.0, 103.0, 104.0, 124.0, 125.5])
    job = JobCost(now=lambda: next(clock))
    job.mark("model load")
    job.mark("anchors")
    job.mark("between samples", {"warm-up": 2.0, "samples": 17.0})
    job.mark("anchors")
    assert job.parts == {"model load": 3.0, "anchors": 2.5, "warm-up": 2.0, "samples": 17.0, "between samples": 1.0}
    found = job.summary(17.0)
    assert found["wall_s"] == 25.5 == sum(found["parts"].values())
    assert found["share"] == pytest.approx(17.0 / 25.5)
    assert str(job) == "model load 3.0, anchors 2.5, warm-up 2.0, samples 17.0, between samples 1.0"


def test_the_job_that_a_process_was_started_for_pays_for_the_start() -> None:
    assert JobCost(own_process=True).parts["start"] > 0.05  # imports of this test run, at the least
    assert "start" not in JobCost().parts


def test_a_job_without_time_has_no_share() -> None:
    assert JobCost(now=lambda: 0.0).summary(0.0)["share"] == 0.0
