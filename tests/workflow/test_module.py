"""Another workflow uses this one: two studies in one run, each with a config and folders of its own, and a rule that reads results."""

import json
from pathlib import Path

import yaml

from stagebench.plan import Plan

from .conftest import MODELS, REPO, Study

OUTER = """
import yaml

module night:
    snakefile: {workflow!r}
    config: yaml.safe_load(open("night.yaml"))
    pathvars:
        results="mine/night",
        cache="mine/cache",

use rule * from night as night_*

module day:
    snakefile: {workflow!r}
    config: yaml.safe_load(open("day.yaml"))
    prefix: "theirs"

use rule * from day as day_*

rule all:
    default_target: True
    input: "verdicts.json"

rule verdicts:
    input: "mine/night/summary.json", "theirs/results/day/summary.json", "theirs/results/day/report.html"
    output: "verdicts.json"
    run:
        import json
        with open(output[0], "w") as file:
            json.dump([json.load(open(path))["study"] for path in input[:2]], file)
"""


def test_two_studies_as_modules_run_for_real(finished: tuple[Study, object], tmp_path: Path) -> None:
    """By pathvars, and by a prefix. What they make lies there and nowhere else, and a second run makes nothing."""
    study = finished[0].copy(tmp_path / "outer")
    config = study.config
    for path in ("cache", "results", ".snakemake"):
        (study.folder / path).rename(tmp_path / f"before-{path}")
    for name, model in (("night", "llava"), ("day", "eventgpt")):
        own = {**config, "study": name, "models": {model: MODELS[model]}, "compare": {"resamples": 200}}
        (study.folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    before = {path.name for path in study.folder.iterdir()}
    snakefile = study.folder / "Snakefile"
    snakefile.write_text(OUTER.format(workflow=str(REPO / "Snakefile")))
    options = ("--workflow-profile", "none", "--retries", "3")
    run = study.run(*options, snakefile=snakefile)

    rules = run.rules
    leaves = rules["night_extract"]
    assert leaves >= 3
    of_each = {"extract": leaves, "timing": 1, "verify": 1, "merge": 1}
    both = {f"{name}_{rule}": n for name in ("night", "day") for rule, n in of_each.items()}
    assert rules == both | {"day_report": 1, "verdicts": 1}
    assert json.loads((study.folder / "verdicts.json").read_text()) == ["night", "day"]
    assert {path.name for path in study.folder.iterdir()} - before == {"Snakefile", ".snakemake", "mine", "theirs", "verdicts.json"}
    for folder, model in (("mine/night", "llava"), ("theirs/results/day", "eventgpt")):
        plan = Plan.read(study.folder / folder / "plan.json")
        assert {job.model for job in plan.jobs} == {model}
        assert all((study.folder / folder / job.path).exists() for job in plan.jobs)
    assert len(list((study.folder / "theirs/cache/events").rglob("*.parquet"))) == leaves
    assert study.run(*options, snakefile=snakefile).jobs == []
