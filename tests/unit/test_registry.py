"""Adapters from other packages: the one of docs/adding-a-model.md is installed, found by its entry point, verified and timed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from stagebench.config import load_config
from stagebench.demo import write_demo
from stagebench.errors import ModelError
from stagebench.models import registry
from stagebench.plan import Plan, build_plan
from stagebench.plan.adapters import adapter_package


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
    studies = json.loads((tmp_path / "results/summary.json").read_text())["studies"]
    assert {(study["model"]["package"], study["applied"]["adapter"]) for study in studies.values()} == {("pooled 1", "pooled 1")}


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "broken_adapter", "no_such_module:Thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="'no_such_module:Thing' cannot be imported.*install it again"):
        registry.create("broken_adapter")
    assert "broken_adapter" in registry.names()


def test_an_unknown_adapter_is_told_how_to_declare_one() -> None:
    with pytest.raises(ModelError, match=registry.GROUP):
        registry.create("nobody")


def planned(folder: Path, models: dict[str, dict[str, object]], **over: object) -> Plan:
    study = load_config({"study": "s", "datasets": {"d": {"root": str(folder / "demo")}}, "models": models, **over})
    return build_plan(study, folder / "cache")


def test_another_version_of_an_adapters_package_is_timed_and_verified_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths stay, as for other weights; what Snakemake and the merge compare changes, and for built-in adapters it does not."""
    write_demo(tmp_path / "demo", clips=1, seconds=0.5, size=(64, 96))
    install(tmp_path / "site", "theirs", "no_such_module:Thing")
    monkeypatch.syspath_prepend(tmp_path / "site")
    one = {"input": "frames", "weights": "dummy:0", "preset": "tiny"}
    models: dict[str, dict[str, object]] = {"a": {"adapter": "theirs", **one}, "b": {"adapter": "hf", **one}}

    def params() -> dict[str, tuple[str, str]]:
        plan = planned(tmp_path, models)
        return {j.model: (plan.timing_params(j), plan.verify_params(plan.verify_path(j))) for j in plan.jobs}

    before = params()
    assert [json.loads(text)["adapter"] for text in before["a"]] == ["theirs 1", "theirs 1"]
    assert not any("adapter" in json.loads(text) for text in before["b"]), "jobs of built-in adapters are what they were"
    info = tmp_path / "site/theirs-1.dist-info/METADATA"
    info.write_text(info.read_text().replace("Version: 1", "Version: 2"))
    after = params()
    assert after["b"] == before["b"]
    assert [json.loads(text)["adapter"] for text in after["a"]] == ["theirs 2", "theirs 2"]


def test_the_package_of_a_drafts_adapter_counts_where_it_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo(tmp_path / "demo", clips=1, seconds=0.5, size=(64, 96))
    install(tmp_path / "site", "theirs", "no_such_module:Thing")
    monkeypatch.syspath_prepend(tmp_path / "site")
    one = {"input": "frames", "weights": "dummy:0", "preset": "tiny"}
    model = {"adapter": "hf", **one, "draft": {"adapter": "theirs", "weights": "dummy:1", "preset": "tiny"}}
    plan = planned(tmp_path, {"a": model}, variants={"engine": ["generate", "speculative"]})
    found = {job.variant.settings["engine"]: plan.timing_fingerprint(job) for job in plan.jobs}
    assert "adapter" not in found["speculative"] and found["speculative"]["draft_adapter"] == "theirs 1"
    assert "draft_adapter" not in found["generate"]


def test_a_package_of_a_built_in_name_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "hf", "no_such_module:Thing")
    monkeypatch.syspath_prepend(tmp_path)
    assert adapter_package("hf") is None and registry.create("hf").name == "hf"
