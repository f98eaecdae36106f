"""console: the study's own numbers, readable at 120 columns, verdict first."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from factories import make_study
from stagebench import console as module
from stagebench.merge import merge


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=text, width=module.WIDTH, soft_wrap=True, highlight=False))
    return text


def show(folder: Path, printed: io.StringIO, **study: Any) -> list[str]:
    merge(make_study(folder, **study), folder)
    module.print_results(folder)
    return printed.getvalue().splitlines()


def test_the_verdict_comes_first(tmp_path: Path, printed: io.StringIO) -> None:
    lines = show(tmp_path, printed)
    assert lines[0].startswith("VALID  fake: 48 accepted, 0 failed")
    assert "Random weights: eventgpt, video_llava" in lines[0]


def test_reasons_of_an_invalid_study_stand_above_its_numbers(tmp_path: Path, printed: io.StringIO) -> None:
    lines = show(tmp_path, printed, verified=False)
    assert lines[0].startswith("INVALID")
    assert any("invalid_not_verified" in line for line in lines[: lines.index(next(x for x in lines if x.startswith("Stages")))])


@pytest.mark.parametrize("variants", [None, {"generate-00000000": {}, "nf4-11111111": {"quantization": "nf4"}}])
def test_tables_fit_and_no_number_is_cut(tmp_path: Path, printed: io.StringIO, variants: Any) -> None:
    lines = show(tmp_path, printed, variants=variants)
    tables = lines[next(i for i, line in enumerate(lines) if line.startswith("Stages")) :]
    assert max(map(len, tables)) <= 120
    with (tmp_path / "tables/comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "total"]
    text = "\n".join(tables)
    for row in rows:
        for column in ("median", "reference_median", "ratio", "low", "high", "verdict"):
            assert row[column] in text, f"{column} {row[column]}"


def test_every_number_is_in_the_files(tmp_path: Path, printed: io.StringIO) -> None:
    lines = show(tmp_path, printed)
    known = set()
    for name in ("stages", "comparison"):
        with (tmp_path / f"tables/{name}.csv").open() as file:
            known |= {cell for row in csv.DictReader(file) for cell in row.values()}
    body = lines[next(i for i, line in enumerate(lines) if line.startswith("Stages")) :]
    numbers = {word for line in body for word in line.split() if re.fullmatch(r"\d[\d.]*", word) and "(" not in line}
    assert len(numbers) > 40
    assert numbers <= known


def test_groups_without_a_sample_are_counted_not_printed(tmp_path: Path, printed: io.StringIO) -> None:
    def capped(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "status": "capped"} if row["length"] == "natural" else row

    text = "\n".join(show(tmp_path, printed, edit=capped))
    assert "2 rows with no accepted sample are left out (length natural)." in text
    assert "1 row with no pair is left out (length natural)." in text


@pytest.mark.parametrize("waits", [0.0, 0.4])
def test_a_word_that_is_withheld_is_explained(tmp_path: Path, printed: io.StringIO, waits: float) -> None:
    text = "\n".join(show(tmp_path, printed, edit=lambda row: {**row, "cpu_wait_ms": waits * row["total_ms"]}))
    assert ("a side waited for a CPU" in text) == (waits > 0)


def test_answers_are_printed_as_said(tmp_path: Path, printed: io.StringIO) -> None:
    merge(make_study(tmp_path, edit=lambda row: {**row, "text": " [bold]not markup[/] \n"}), tmp_path)
    module.print_samples(tmp_path / "timings.parquet", 1)
    text = printed.getvalue()
    assert text.count('"[bold]not markup[/]"') == 4
    assert text.count("What is there?") == 1


def test_progress_without_a_terminal_is_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(module, "errors", Console(file=text, width=120))
    with module.steps() as tell:
        for done in range(1, 1001):
            tell("time samples", done, 1000)
    lines = text.getvalue().splitlines()
    assert len(lines) <= 12
    assert lines[-1] == "time samples 1000/1000"


def test_lines_say_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(module, "errors", Console(file=text, width=120))
    with module.steps() as tell:
        tell("time samples", 1, 2, "18.6 ± 0.2 ms/token")
        tell("time samples", 2, 2, "")
    assert text.getvalue().splitlines() == ["time samples 1/2, 18.6 ± 0.2 ms/token", "time samples 2/2"]


def test_a_terminal_keeps_the_last_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(module, "errors", Console(file=text, width=120, force_terminal=True))
    with module.steps() as tell:
        tell("extract clips", 1, 2, "26 frames/s")
        tell("extract clips", 2, 2)
    last = [line for line in text.getvalue().splitlines() if "2/2" in line][-1]
    assert "26 frames/s" in last and "left" in last


def test_the_pace_is_of_the_rows_and_of_the_frames() -> None:
    from stagebench.standalone import _Pace

    pace = _Pace()
    assert pace.of_tokens() == ""
    row = {"status": "ok", "decode_ms": 40.0, "new_tokens": 3, "steps": 4}
    pace.watch([row, {**row, "decode_ms": 44.0}, {**row, "decode_ms": 36.0}, {**row, "status": "error"}, {**row, "steps": 0}])
    assert pace.of_tokens() == "10 ± 1.1 ms/token"  # 9, 10, 11: 1.96 * 1 / sqrt(3)
