"""Tables of a study, each as CSV, Markdown, LaTeX (booktabs) and Parquet with the same rounded numbers.

One rounding rule: a float keeps four significant digits, and never loses a digit in front of the point. It is applied once, to the
table itself, so all four files hold equal numbers. What is null prints as "–", and as "n too small" where it is a quantile.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.errors import MergeError
from stagebench.files import whole_file

__all__ = ["Table", "build_table", "cell", "read_table", "render_latex", "render_markdown", "round_value", "write_table"]

_QUANTILE = re.compile(r"(^|_)p(5|90|95|99)(_|$)")


@dataclass(frozen=True)
class Table:
    """A table and how it is laid out for people: `views` are (caption, columns) that Markdown and LaTeX print one after the other."""

    name: str
    title: str
    frame: pl.DataFrame
    """Rounded."""
    views: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...] = ()


def round_value(value: float) -> float:
    """Four significant digits, whole numbers kept: 0.0123456 -> 0.01235, 12.3456 -> 12.35, 83512.4 -> 83512."""
    if value == 0 or not math.isfinite(value):
        return value
    return float(round(value, max(0, 3 - math.floor(math.log10(abs(value))))))


def build_table(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    views: Sequence[tuple[str, Sequence[str]]] = (),
    notes: Sequence[str] = (),
) -> Table:
    """Round `rows` into a table of `columns`, in the order given. NaN and infinity become null. Without rows it still has columns."""
    data: dict[str, list[Any]] = {column: [_rounded(row.get(column)) for row in rows] for column in columns}
    frame = pl.DataFrame([pl.Series(column, values, strict=False) for column, values in data.items()])
    # a column of nulls has no type of its own: written as text it would clash with numbers of another study
    frame = frame.with_columns(pl.col(c).cast(pl.Float64) for c, t in frame.schema.items() if t == pl.Null)
    return Table(name, title, frame, tuple((caption, tuple(shown)) for caption, shown in views) or (("", tuple(columns)),), tuple(notes))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round_value(value) if math.isfinite(value) else None
    return value


def cell(column: str, value: Any) -> str:
    """How a value is printed for people."""
    if value is None:
        return "n too small" if _QUANTILE.search(column) else "–"
    if isinstance(value, float):
        if value.is_integer() and (abs(value) >= 1000 or value == 0 or "tokens" in column):
            return str(int(value))
        return _significant(value)
    return str(value)


def _significant(value: float) -> str:
    """Four significant digits in plain notation, trailing zeros kept so that columns show their precision."""
    if abs(value) < 1e-6:
        return f"{value:.3e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def render_markdown(table: Table, header: Sequence[str]) -> str:
    """Verdict lines, title, and each view as a pipe table."""
    lines = [f"# {table.title}", "", *(f"{line}  " for line in header), ""]
    for caption, columns in table.views:
        if caption:
            lines += [f"## {caption}", ""]
        frame = table.frame.select(columns)
        numeric = [frame.schema[c].is_numeric() for c in columns]
        lines.append("| " + " | ".join(_pipe(c) for c in columns) + " |")
        lines.append("|" + "|".join("---:" if n else "---" for n in numeric) + "|")
        lines += ["| " + " | ".join(_pipe(cell(c, v)) for c, v in zip(columns, row, strict=True)) + " |" for row in frame.iter_rows()]
        if not len(frame):
            lines += ["", "None."]
        lines.append("")
    lines += [f"{note}  " for note in table.notes]
    return "\n".join(lines).rstrip() + "\n"


def _pipe(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").replace("\r", " ")


_TEX = {
    "\\": r"\textbackslash{}",
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "÷": r"$\div$",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
_TEX |= {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " ", "\r": " "}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def render_latex(table: Table, header: Sequence[str]) -> str:
    """Each view as a booktabs table; the verdict is a comment and part of the first caption."""
    lines = [f"% {line}" for line in header]
    for number, (caption, columns) in enumerate(table.views):
        frame = table.frame.select(columns)
        alignment = "".join("r" if frame.schema[c].is_numeric() else "l" for c in columns)
        title = f"{table.title}: {caption}" if caption else table.title
        if number == 0 and header:
            title = f"{title}. {header[0]}"
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{_tex(title)}}}", rf"\begin{{tabular}}{{{alignment}}}", r"\toprule"]
        lines += [" & ".join(_tex(c) for c in columns) + r" \\", r"\midrule"]
        lines += [" & ".join(_tex(cell(c, v)) for c, v in zip(columns, row, strict=True)) + r" \\" for row in frame.iter_rows()]
        lines += [r"\bottomrule", r"\end{tabular}", *(rf"% {note}" for note in table.notes), r"\end{table}", ""]
    return "\n".join(lines).rstrip() + "\n"


def write_table(table: Table, folder: Path, header: Sequence[str], verdict: str) -> dict[str, Path]:
    """Write the four files into `folder`, each atomically; suffix -> path.

    header: the verdict and its reasons, on top of Markdown and LaTeX and in Parquet's metadata. verdict: its word, the first column of CSV
    and Parquet, so that a row which is copied elsewhere still says it.
    """
    paths = {suffix: folder / f"{table.name}.{suffix}" for suffix in ("csv", "md", "tex", "parquet")}
    frame = table.frame.select(pl.lit(verdict).alias("study_verdict"), pl.all())
    texts = {"csv": frame.write_csv(), "md": render_markdown(table, header), "tex": render_latex(table, header)}
    for suffix, text in texts.items():
        with whole_file(paths[suffix], MergeError) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    arrow: pa.Table = frame.to_arrow()
    metadata = {"stagebench.verdict": "\n".join(header), "stagebench.notes": json.dumps(table.notes)}
    metadata |= {"stagebench.title": table.title, "stagebench.views": json.dumps(table.views)}
    with whole_file(paths["parquet"], MergeError) as temporary:
        pq.write_table(arrow.replace_schema_metadata(metadata), temporary, compression="zstd")
    return paths


def read_table(path: Path) -> Table:
    """A table from its Parquet file, with the layout that it was written with. Raises MergeError when the file is not such a table."""
    try:
        arrow = pq.read_table(path, partitioning=None)
        metadata = {key.decode(): value.decode() for key, value in (arrow.schema.metadata or {}).items()}
        views = tuple((str(caption), tuple(columns)) for caption, columns in json.loads(metadata["stagebench.views"]))
        notes = tuple(json.loads(metadata["stagebench.notes"]))
        frame = pl.DataFrame(arrow)
        frame = frame.drop("study_verdict") if "study_verdict" in frame.columns else frame
        return Table(path.stem, metadata["stagebench.title"], frame, views, notes)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, RecursionError) as error:
        raise MergeError(f"{path}: not a table written by stagebench ({type(error).__name__}: {error}). Merge the study again.") from error
