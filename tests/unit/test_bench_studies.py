"""Several studies in one process (benchmarks/studies.py)."""

import runpy
from pathlib import Path

import pytest
import torch

from clip_study import planner
from stagebench.session import job as jobs
from stagebench.session.model import study_fingerprint

torch.set_num_threads(1)
STUDIES = Path(__file__).resolve().parents[2] / "benchmarks/studies.py"


def test_a_kept_model_is_the_job_s_own_and_no_draft_stays_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a job would be told apart from its like by a draft that it never asks, which fills the device's memory beside it."""
    monkeypatch.setattr(jobs, "load_adapter", jobs.load_adapter)  # put back afterwards
    runpy.run_path(str(STUDIES))["keep_models"]()
    model = {"adapter": "hf", "architecture": "llava", "input": "frames", "frames_as": "grid", "weights": "dummy:0", "preset": "tiny"}
    model["draft"] = {"weights": "dummy:1", "preset": "tiny"}
    plan, _ = planner(tmp_path)(1, models={"v": model}, variants={"engine": ["generate", "speculative"]})
    by_engine = {job.variant.settings["engine"]: job for job in plan.jobs}
    drafts, loaded = [], []
    for engine in ("generate", "generate", "speculative", "generate"):
        job = by_engine[engine]
        adapter = jobs.load_adapter(plan.config, job, device="cpu")
        loaded.append(adapter)
        drafts.append(study_fingerprint(plan.config, job, adapter.spec, adapter, {})["draft"])
    assert loaded[0] is loaded[1]
    assert drafts == [None, None, "llava dummy:1/tiny", None]
