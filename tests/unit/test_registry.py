"""Adapters from other packages: the one of docs/adding-a-model.md is installed, found by its entry point, verified and timed."""

import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from stagebench.demo import write_demo
from stagebench.errors import ModelError
from stagebench.models import registry


def install(folder: Path, name: str, target: str) -> None:
    """What pip leaves of a package that declares an adapter."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {target}\n")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    page = (repo / "docs/adding-a-model.md").read_text()
    code = re.search(r'^```python\n("""pooled.*?)^```', page, flags=re.S | re.M)
    assert code is not None
    folder = tmp_path_factory.mktemp("site")
    (folder / "pooled.py").write_text(code[1])
    name, target = re.findall(r'^(\w+) = "(.*)"$', page, flags=re.M)[0]
    install(folder, name, target)
    return folder


def test_the_adapter_of_the_docs_is_verified_and_timed(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path) -> None:
    write_demo(tmp_path / "demo", clips=2, seconds=0.5, size=(64, 96))
    page = (repo / "docs/adding-a-model.md").read_text()
    stanza = next(yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", page, flags=re.S | re.M) if "adapter: pooled" in text)
    timing = {"warmup": 0, "repeats": 1, "lengths": [4], "plain_share": 0}
    study = {"study": "own", "datasets": {"d": {"root": str(tmp_path / "demo")}}, "frames": {"count": 3}, "timing": timing, **stanza}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    code = (
        "from pathlib import Path; from stagebench.config import load_config; from stagebench.standalone import run_study\n"
        "run_study(load_config('study.yaml'), Path('results'), Path('cache'), device='cpu')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = pl.read_parquet(tmp_path / "results/timings.parquet")
    assert set(rows["status"]) == {"ok"} and set(rows["visual_tokens"]) == {3} and set(rows["encoder_calls"]) == {1}
    assert rows["accepted"].all()


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "broken_adapter", "no_such_module:Thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="'no_such_module:Thing' cannot be imported.*install it again"):
        registry.create("broken_adapter")
    assert "broken_adapter" in registry.names()


def test_an_unknown_adapter_is_told_how_to_declare_one() -> None:
    with pytest.raises(ModelError, match=registry.GROUP):
        registry.create("nobody")
