"""Real Snakemake runs in folders of their own. One demo dataset and one finished study are made once; cases work on copies."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]

MODELS = {
    "eventgpt": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"},
    "video_llava": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
    "llava": {"adapter": "hf", "input": "frames", "frames_as": "grid", "weights": "dummy:0", "preset": "tiny"},
}


@dataclass(frozen=True)
class Run:
    """What one call of Snakemake said."""

    status: int
    text: str

    @property
    def jobs(self) -> list[tuple[str, str]]:
        """(rule, first output) of each job that ran, or would, but for rule all. Sorted."""
        blocks = re.findall(r"^(?:local)?rule (\w+):\n((?:    .*\n)*)", self.text, re.M)
        found = {(rule, _first_output(body)) for rule, body in blocks if rule != "all"}
        return sorted(found)

    @property
    def rules(self) -> dict[str, int]:
        """Number of jobs by rule."""
        names = [rule for rule, _ in self.jobs]
        return {name: names.count(name) for name in dict.fromkeys(names)}


def _first_output(body: str) -> str:
    line = re.search(r"^    output: (.*)$", body, re.M)
    return line.group(1).split(", ")[0] if line else ""


@dataclass
class Study:
    """A folder with a dataset, a config and what a run leaves there."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    def configure(self, change: Callable[[dict[str, Any]], object]) -> None:
        config = self.config
        change(config)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def results(self) -> Path:
        return self.folder / "results" / self.config["study"]

    def run(self, *options: str, snakefile: Path = REPO / "Snakefile", prelude: str = "", check: bool = True, **more: str) -> Run:
        """Run Snakemake here. prelude: Python that runs before it, in its process. more: environment variables."""
        command, env = self._call(options, snakefile, prelude)
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env={**env, **more})
        text = done.stdout + done.stderr
        if check and done.returncode:
            raise AssertionError(text[-6000:])
        return Run(done.returncode, text)

    def start(self, *options: str) -> "subprocess.Popen[bytes]":
        """The same in the background, as the leader of a session, so that all of it can be killed."""
        command, env = self._call(options, REPO / "Snakefile", "")
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def _call(self, options: tuple[str, ...], snakefile: Path, prelude: str) -> tuple[list[str], dict[str, str]]:
        code = f"{prelude}\nimport sys\nfrom snakemake.cli import main\nmain(sys.argv[1:])"
        command = [
            *(sys.executable, "-c", code, "--snakefile", str(snakefile), "--directory", str(self.folder), "--nocolor"),
            *options,
            *("--configfile", str(self.folder / "config.yaml")),
            *(() if "--cores" in options else ("--cores", "2")),
            *(() if "--resources" in options else ("--resources", "gpu=1")),
        ]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return command, {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path}

    def plan(self) -> Run:
        """What a run would do."""
        return self.run("--dry-run")

    def copy(self, folder: Path) -> "Study":
        """The same study elsewhere, times kept: Snakemake finds its records in .snakemake, by paths relative to the folder."""
        shutil.copytree(self.folder, folder, copy_function=shutil.copy2)
        return Study(folder)


def settings(study: str = "demo") -> dict[str, Any]:
    """A study that runs in seconds."""
    return {
        "study": study,
        "datasets": {"demo": {"root": "data", "sensor": [64, 96]}},
        "frames": {"count": 8},
        "shards": {"max_clips": 2},
        "models": MODELS,
        "timing": {"warmup": 1, "repeats": 1, "lengths": ["natural", 4], "max_new_tokens": 4, "plain_share": 0},
        "compare": {"reference": "video_llava", "resamples": 200},
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Run]:
    """A study of six demo clips, run once, and what that run said. Not to be changed: copy it."""
    from stagebench.demo import write_demo

    folder = tmp_path_factory.mktemp("workflow") / "study"
    write_demo(folder / "data", clips=6, seconds=0.5, size=(64, 96))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(), sort_keys=False))
    study = Study(folder)
    # one check of verify compares times, which a host busy with other tests may disturb
    return study, study.run("--retries", "3")


@pytest.fixture
def study(finished: tuple[Study, Run], tmp_path: Path) -> Study:
    """A copy of the finished study."""
    return finished[0].copy(tmp_path / "study")
