"""tables: one rounding rule, equal numbers in all formats, text that cannot break out."""

import csv
import math
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagebench.errors import MergeError
from stagebench.tables import build_table, cell, read_table, render_latex, render_markdown, round_value, write_table


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (0.0123456, 0.01235),
        (12.3456, 12.35),
        (999.96, 1000.0),
        (83512.4, 83512.0),
        (-1.00049, -1.0),
        (0.0, 0.0),
        (1e-7, 1e-7),
        (0.99999, 1.0),
    ],
)
def test_rounding(value: float, rounded: float) -> None:
    assert round_value(value) == pytest.approx(rounded, rel=1e-12)


@given(st.floats(1e-9, 1e15) | st.floats(-1e15, -1e-9))
def test_rounding_keeps_four_digits_and_is_idempotent(value: float) -> None:
    once = round_value(value)
    assert math.isclose(once, value, rel_tol=5.1e-4)
    assert round_value(once) == once
    assert float(cell("x_ms", once)) == pytest.approx(once, rel=1e-9), "what is printed is the number itself"


def test_cells() -> None:
    assert cell("total_p99_ms", None) == "n too small"
    assert cell("p5_ms", None) == "n too small"
    assert cell("encode_ms", None) == "–"
    assert cell("n", 12) == "12"
    assert cell("samples_per_day", 83512.0) == "83512"
    assert cell("encode_ms", 8.0) == "8.000"
    assert cell("new_tokens", 45.0) == "45"


def test_all_formats_hold_equal_numbers(tmp_path: Path) -> None:
    rows = [
        {"model": "a", "x_ms": 12.345678, "total_p99_ms": None, "n": 3},
        {"model": "b", "x_ms": float("nan"), "total_p99_ms": 1234.567, "n": 4},
    ]
    table = build_table("t", "Title", rows, ("model", "n", "x_ms", "total_p99_ms"), notes=("A note.",))
    paths = write_table(table, tmp_path, ["Verdict: VALID"], "VALID")
    read = list(csv.DictReader(paths["csv"].open()))
    assert [r["x_ms"] for r in read] == ["12.35", ""]
    assert [r["study_verdict"] for r in read] == ["VALID", "VALID"]
    frame = pl.read_parquet(paths["parquet"])
    assert frame["x_ms"].to_list() == [12.35, None]
    assert "| a | 3 | 12.35 | n too small |" in paths["md"].read_text()
    assert r"a & 3 & 12.35 & n too small \\" in paths["tex"].read_text()
    assert r"\toprule" in paths["tex"].read_text()
    again = read_table(paths["parquet"])
    assert (again.title, again.notes, again.views) == (table.title, table.notes, table.views)
    assert again.frame.equals(table.frame)


def test_an_empty_table_keeps_its_columns(tmp_path: Path) -> None:
    paths = write_table(build_table("t", "T", [], ("model", "n")), tmp_path, [], "VALID")
    assert paths["csv"].read_text() == "study_verdict,model,n\n", "the columns of a full one, so that tables of several studies go together"
    assert pl.read_parquet(paths["parquet"]).shape == (0, 3)
    assert read_table(paths["parquet"]).frame.columns == ["model", "n"]
    assert "None." in paths["md"].read_text()


def test_hostile_text_stays_text() -> None:
    table = build_table("t", "T", [{"sample": "a|b<script>\nx_1 & 50% \\end{tabular}"}], ("sample",))
    markdown, latex = render_markdown(table, []), render_latex(table, [])
    assert "<script>" not in markdown
    assert r"a\|b&lt;script>" in markdown
    assert r"50\% \textbackslash{}end\{tabular\}" in latex
    assert latex.count(r"\end{tabular}") == 1


def test_reading_something_else_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(path)
    with pytest.raises(MergeError, match="not a table written by stagebench"):
        read_table(path)
