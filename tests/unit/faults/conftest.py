"""A real timing job on the demo dataset, to put a fault into; and how the job says so. docs/methodology.md names these tests."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from clip_study import extracted
from stagebench.config import load_config
from stagebench.demo import write_demo
from stagebench.plan import Plan
from stagebench.rows import Code
from stagebench.session import job as job_module
from stagebench.session import run_job
from stagebench.session.output import read_metadata

torch.set_num_threads(1)
CLIPS = 9


@pytest.fixture
def runs() -> int:
    """Measured runs of a job: one of each clip."""
    return CLIPS


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    write_demo(root / "demo", clips=CLIPS, seconds=0.2, size=(64, 96))
    for name, timing in {
        "one": {"lengths": [4], "warmup": 1, "repeats": 1, "plain_share": 0},
        "plain": {"lengths": [4], "warmup": 1, "repeats": 1, "plain_share": 1},
        "natural": {"lengths": ["natural"], "max_new_tokens": 6, "warmup": 0, "repeats": 1, "plain_share": 0},
    }.items():
        config = load_config(
            {
                "study": "faults",
                "datasets": {"demo": {"root": str(root / "demo"), "sensor": [64, 96]}},
                "models": {"llava": {"adapter": "hf", "input": "frames", "frames_as": "grid", "weights": "dummy:0", "preset": "tiny"}},
                "frames": {"count": 4},
                "timing": timing,
            }
        )
        extracted(config, root / "cache").write(root / f"{name}.json")
    return root


class Timed:
    """A job's report, its rows and its metadata."""

    def __init__(self, root: Path, output: Path, kind: str = "one", **arguments: Any) -> None:
        plan = Plan.read(root / f"{kind}.json")
        self.report = run_job(plan, next(iter(plan.jobs)), output, cache=root / "cache", device="cpu", threads=1, **arguments)
        self.rows = pl.read_parquet(output).sort("order").to_dicts()
        self.job = read_metadata(output)["job"]

    def text(self, code: Code) -> str:
        return "\n".join(f.text for f in self.report.findings if f.code is code)

    def marked(self, code: Code) -> list[bool]:
        return [code.value in row["codes"] for row in self.rows]


@pytest.fixture
def timed(root: Path, tmp_path: Path) -> Any:
    return lambda kind="one", **arguments: Timed(root, tmp_path / "a.parquet", kind, **arguments)


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace methods of the model that jobs load: `adapted(encode=lambda adapter, inputs: ...)`."""
    load = job_module.load_adapter

    def change(**methods: Any) -> None:
        def changed(*arguments: Any, **keywords: Any) -> Any:
            adapter = load(*arguments, **keywords)
            for name, method in methods.items():
                own = getattr(adapter, name)
                setattr(adapter, name, lambda *a, _method=method, _own=own: _method(_own, *a))
            return adapter

        monkeypatch.setattr(job_module, "load_adapter", changed)

    return change
