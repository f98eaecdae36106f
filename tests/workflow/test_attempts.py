"""What a second attempt gets, and what the profiles for several machines set."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from .conftest import REPO, Study

SHARED = ("slurm", "generic", "kubernetes")


def test_a_second_attempt_gets_twice_the_time_and_memory(study: Study) -> None:
    """A proof that can never succeed (no GPU to hand out) is tried three times."""
    shutil.rmtree(study.results / "verify")
    run = study.run("results/demo/verify/llava.json", "--resources", "gpu=0", "--retries", "2", check=False)
    assert run.status
    first = int(re.findall(r"runtime=(\d+)", run.text)[0])
    asked = [tuple(int(re.search(rf"\b{name}=(\d+)", line)[1]) for name in ("runtime", "mem_mb")) for line in _resources(run.text)]
    memory = asked[0][1]
    assert asked == [(n * first, n * memory) for n in (1, 2, 3)]


def _resources(text: str) -> list[str]:
    return re.findall(r"^    resources: (.*runtime=.*)$", text, re.M)


@pytest.mark.parametrize("name", SHARED)
def test_profiles_for_several_machines_wait_for_late_files_and_try_again(name: str) -> None:
    profile = yaml.safe_load((REPO / "profiles" / name / "profile.yaml").read_text())
    assert profile["latency-wait"] >= 60, "attribute caches of NFS hold for up to a minute"
    assert profile["retries"] >= 1 and profile["rerun-incomplete"] and profile["keep-going"]
    assert "resources" not in profile, "a limit on gpu is global: one job of the whole cluster would run at a time"


@pytest.mark.parametrize("path", sorted((REPO / "profiles").glob("*/profile.yaml")), ids=lambda path: path.parent.name)
def test_every_profile_has_the_triggers_that_names_by_content_need(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["rerun-triggers"] == ["mtime", "params", "input", "software-env"]
