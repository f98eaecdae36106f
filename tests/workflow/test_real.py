"""The pipeline on real event clips and real MP4s."""

import csv
from pathlib import Path

import yaml

from .conftest import MODELS, REPO, Study, settings


def test_real_clips_go_through_with_none_failed(real_data: Path, tmp_path: Path) -> None:
    config = settings("real")
    config["datasets"] = {"real": {"root": str(real_data / "real"), "sensor": [480, 640]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    study = Study(tmp_path)
    study.run()
    with (study.results / "tables/stages.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert {row["model"] for row in rows} == set(MODELS)
    for row in rows:
        assert (row["samples"], row["failed"]) == ("4", "0")
        if row["length"] != "natural":  # random weights seldom stop by themselves: capped runs have no mean
            assert row["n"] == "4" and float(row["encode_ms"]) > 0
    assert all((study.results / name).stat().st_size for name in ("report.html", "summary.json", "legacy_results.json", "timings.parquet"))
    assert all((study.results / "tables" / f"{t}.md").stat().st_size for t in ("stages", "comparison", "failures"))


def test_the_workflow_is_lint_clean(tmp_path: Path, real_data: Path) -> None:
    config = settings("real")
    config["datasets"] = {"real": {"root": str(real_data / "real"), "sensor": [480, 640]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = Study(tmp_path).run("--lint")
    assert "good condition" in run.text


def test_every_rule_logs_and_every_output_has_a_pathvar() -> None:
    import re

    for path in sorted((REPO / "rules").glob("*.smk")):
        for name, body in re.findall(r"^rule (\w+):\n((?:    .*\n|\n)*)", path.read_text(), re.M):
            assert "    log:\n" in body and "    script:\n" in body, f"{path.name}: rule {name}"
