"""compare: two results folders, and the exit code for CI."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from factories import config, make_rows, make_study, write_rows
from stagebench import cli
from stagebench.compare import compare_results, exit_code
from stagebench.errors import MergeError
from stagebench.merge import merge


def study(folder: Path, **arguments: Any) -> Path:
    merge(make_study(folder, **arguments), folder)
    return folder


def test_a_slower_model_is_found_and_exits_with_one(tmp_path: Path) -> None:
    a = study(tmp_path / "a", models={"eventgpt": {}, "video_llava": {"factor": 2.0}})
    b = study(
        tmp_path / "b",
        models={"eventgpt": {"pace": 24.0, "seed": 1}, "video_llava": {"factor": 2.0, "seed": 1}},
        machine={"cpu": {"model": "Other"}},
    )
    outcome = compare_results(a, b, threshold=0.05)
    rows = {(r["model"], r["length"], r["metric"]): r for r in outcome.rows}
    assert rows["eventgpt", "16", "ms_per_token"]["ratio"] == pytest.approx(1.2, rel=0.02)
    assert rows["eventgpt", "16", "total"]["verdict"] == "SLOWER"
    assert rows["video_llava", "16", "total"]["verdict"] == "SAME"
    assert outcome.exit_code == 1
    assert any(line.startswith("machine.cpu") for line in outcome.differences)
    assert "SLOWER" in outcome.text
    assert compare_results(a, b, threshold=0.5).exit_code == 0
    assert compare_results(b, a).exit_code == 0, "faster never fails a build"


def test_a_study_against_itself(tmp_path: Path) -> None:
    a = study(tmp_path / "a")
    outcome = compare_results(a, a)
    assert {r["verdict"] for r in outcome.rows} == {"SAME"}
    assert (outcome.differences, outcome.notes, outcome.exit_code) == ([], [], 0)
    assert "Fingerprints agree." in outcome.text


def test_what_only_one_has_is_said(tmp_path: Path) -> None:
    one = {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"}
    a = study(tmp_path / "a")
    b = study(tmp_path / "b", plan_config=config(models={"eventgpt": one}, compare={}), models={"eventgpt": {}})
    outcome = compare_results(a, b)
    assert {r["model"] for r in outcome.rows} == {"eventgpt"}
    assert any("only in" in note and "video_llava" in note for note in outcome.notes)
    assert any(line.startswith("config.models.video_llava") for line in outcome.differences)


def test_variants_are_told_apart_and_stand_in_the_order_of_the_config(tmp_path: Path) -> None:
    batches = {"variants": {"b2": {"batch": 2}, "b16": {"batch": 16}}, "plan_config": config(variants={"batch": [2, 16]})}
    a = study(tmp_path / "a", samples=6, blocks=1, lengths=("16",), **batches)
    outcome = compare_results(a, a)
    assert list(dict.fromkeys(r["variant"] for r in outcome.rows)) == ["b2", "b16"]
    header, *lines = [line.split() for line in outcome.text.splitlines()[3:]]
    assert header[:2] == ["variant", "dataset"] and {line[0] for line in lines if line[1:2] == ["set"]} == {"b2", "b16"}


def test_each_machine_is_held_against_itself(tmp_path: Path) -> None:
    """A folder that was timed on two machines: each is compared with its own times, never with those of whichever was read last."""

    def two(folder: Path, slow: str) -> Path:
        folder.mkdir()
        whole = make_study(folder, plan_config=config(), blocks=2, models={"eventgpt": {}}, lengths=("16",))
        for number, name in enumerate(("one", "two")):
            pace = {"one": 20.0, "two": 200.0}[name] * (1.5 if name == slow else 1.0)
            block = whole.jobs[number].block
            rows = make_rows(samples=block.samples, block=block.name, pace=pace, lengths=("16",))
            write_rows(folder / whole.jobs[number].path, rows, machine={"cpu": {"name": name}})
        merge(whole, folder)
        return folder

    a, b = two(tmp_path / "a", "none"), two(tmp_path / "b", "two")
    ratios = {r["machine"].split("-")[0]: r["ratio"] for r in compare_results(a, b).rows if r["metric"] == "ms_per_token"}
    assert ratios == {"one": pytest.approx(1, rel=0.02), "two": pytest.approx(1.5, rel=0.02)}
    alone = study(tmp_path / "c", models={"eventgpt": {}}, lengths=("16",), machine={"cpu": {"name": "third"}})
    with pytest.raises(MergeError, match="not compared: .* of one-.*, two-"):
        compare_results(a, alone)
    same = study(tmp_path / "d", models={"eventgpt": {}}, lengths=("16",), machine={"cpu": {"name": "one"}})
    assert [note.rpartition(" ")[2].split("-")[0] for note in compare_results(a, same).notes if note.startswith("only in")] == ["two"]


def test_an_invalid_side_is_said(tmp_path: Path) -> None:
    a = study(tmp_path / "a")
    b = study(tmp_path / "b", verified=False)
    assert any("INVALID (invalid_not_verified)" in note for note in compare_results(a, b).notes)


def test_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    a = study(tmp_path / "a")
    with pytest.raises(MergeError, match=r"summary\.json: no such file\. Give the folder of a merged study"):
        compare_results(a, tmp_path)
    b = study(tmp_path / "b", variants={"int8-0": {"quantization": "int8"}})
    with pytest.raises(MergeError, match="share no accepted sample"):
        compare_results(a, b)
    (a / "summary.json").write_text('{"config": {"study": "x"}}')
    with pytest.raises(MergeError, match="not a merged study"):
        compare_results(a, b)


def test_a_withheld_word_is_said(tmp_path: Path) -> None:
    """Twice as slow, but it waited for a CPU: no word, no failed build, and a line that says why."""

    def waited(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "cpu_wait_ms": row["total_ms"] * (0.3 if row["model"] == "eventgpt" else 0.0)}

    a = study(tmp_path / "a")
    b = study(tmp_path / "b", models={"eventgpt": {"factor": 2.0, "pace": 40.0}, "video_llava": {"factor": 2.0, "pace": 25.0}}, edit=waited)
    outcome = compare_results(a, b)
    said = [note for note in outcome.notes if note.startswith("word withheld")]
    assert len(said) == 2 and all("eventgpt" in note and "30%" in note and "total" in note for note in said)
    assert outcome.exit_code == 0 and said[0] in outcome.text


def test_the_command_exits_as_it_says(tmp_path: Path) -> None:
    """As CI calls it: 0 for the same, 1 for slower beyond the threshold, 2 where there is nothing to compare."""
    a = study(tmp_path / "a", models={"eventgpt": {}, "video_llava": {"factor": 2.0}})
    b = study(tmp_path / "b", models={"eventgpt": {"pace": 24.0, "seed": 1}, "video_llava": {"factor": 2.0, "seed": 1}})

    def run(*arguments: object) -> tuple[int, str]:
        found = CliRunner().invoke(cli.app, ["compare", *map(str, arguments)])
        return found.exit_code, found.output

    assert run(a, a)[0] == 0
    code, text = run(a, b)
    assert code == 1 and "SLOWER by more than 5% with its whole interval: exit code 1." in " ".join(text.split())
    assert run(a, b, "--threshold", "0.5")[0] == 0 and run(b, a)[0] == 0
    code, text = run(a, tmp_path)
    assert code == 2 and "Give the folder of a merged study" in " ".join(text.split())


def test_exit_code_needs_the_whole_interval() -> None:
    row = {"metric": "total", "verdict": "SLOWER", "low": 1.04}
    assert exit_code([row], 0.05) == 0
    assert exit_code([{**row, "low": 1.06}], 0.05) == 1
    assert exit_code([{**row, "low": 1.06, "metric": "load"}], 0.05) == 0
    assert exit_code([{**row, "low": None, "verdict": "AMBIGUOUS"}], 0.05) == 0
