"""What a person types wrong on the command line ends in a message, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stagebench.cli import app
from stagebench.demo import write_demo
from stagebench.errors import ConfigError, DatasetError, ModelError
from stagebench.standalone import config_from_flags, run_study

runner = CliRunner()


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:x", "mps", "cuda:-1"])
@pytest.mark.parametrize("command", [["run", "--dataset-dir", "nowhere"], ["verify", "--configfile", "nowhere.yaml"]])
def test_what_is_no_device_is_a_wrong_flag(command: list[str], device: str) -> None:
    done = runner.invoke(app, [*command, "--device", device])
    assert done.exit_code == 2, done.output
    assert "expected cpu, cuda or cuda:N" in " ".join(done.output.split())


@pytest.mark.parametrize(("devices", "device", "says"), [(0, "cuda", "sees no CUDA device"), (2, "cuda:2", "sees 2 CUDA devices")])
def test_a_device_that_is_not_there_is_a_wrong_flag(monkeypatch: pytest.MonkeyPatch, devices: int, device: str, says: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    done = runner.invoke(app, ["run", "--dataset-dir", "nowhere", "--device", device])
    assert done.exit_code == 2, done.output
    assert says in " ".join(done.output.split())


def test_names_may_have_spaces_between_them(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        'study: a\ndatasets: {d: {root: nowhere}}\nmodels: {llava: {adapter: hf, input: frames, weights: "dummy:0", preset: tiny}}\n'
    )
    done = runner.invoke(app, ["verify", "--configfile", str(study), "--models", "llava, other"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith("--models other: the study has llava")


def test_a_threshold_below_nothing_is_a_wrong_flag(tmp_path: Path) -> None:
    assert runner.invoke(app, ["compare", str(tmp_path), str(tmp_path), "--threshold", "-0.1"]).exit_code == 2


def test_a_demo_is_not_written_to_a_file(tmp_path: Path) -> None:
    (file := tmp_path / "report.html").write_text("kept")
    done = runner.invoke(app, ["demo-data", str(file)])
    assert isinstance(done.exception, DatasetError), done.output
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("folder", "study", "named"),
    [("my clips", "run 2", ("my_clips", "run_2")), (".hidden", "_x", ("hidden", "x")), ("éé", "--", ("data", "run"))],
)
def test_folders_may_have_any_name(tmp_path: Path, folder: str, study: str, named: tuple[str, str]) -> None:
    config = config_from_flags(tmp_path / folder, study=study)
    assert (*config.datasets, config.study) == named


def test_a_hub_id_without_a_name_is_told_how(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="as in llava=hub/llava-7b"):
        config_from_flags(tmp_path, models=["hub/llava-7b"])
    assert config_from_flags(tmp_path, models=["llava=hub/llava-7b"]).models["llava"].weights == "hub/llava-7b"


def test_an_unknown_engine_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="engine 'fast': expected one of .*generate"):
        run_study(config_from_flags(tmp_path / "nowhere", engine="fast"), tmp_path / "results", tmp_path / "cache")


def test_a_model_that_is_not_there_is_said_before_clips_are_extracted(tmp_path: Path) -> None:
    write_demo(tmp_path / "data", clips=1, seconds=0.5, size=(48, 64))
    config = config_from_flags(tmp_path / "data", models=["llava=/no/such/folder"], max_samples=1)
    with pytest.raises(ModelError, match="/no/such/folder"):
        run_study(config, tmp_path / "results", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*-*.parquet"))
