"""What a person sees in a terminal: verdict, tables, messages, progress. Plain lines where there is no terminal."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["console", "errors", "print_results", "print_samples", "setup_logging", "steps"]

WIDTH = 120
"""Columns of a line where no terminal says how wide it is."""

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
errors = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else WIDTH)

STAGES_SHOWN = ("n", "load_ms", "preprocess_ms", "h2d_ms", "encode_ms", "prefill_ms", "decode_ms", "total_ms", "ms_per_token")
RATIO_SHOWN = ("metric", "n", "median", "reference_median", "ratio", "low", "high", "verdict")
METRICS_SHOWN = ("total", "no_load", "ttft", "load", "encode", "prefill", "decode", "ms_per_token", "new_tokens")
_STYLES = {"FASTER": "green", "SLOWER": "red", "VALID": "bold green", "INVALID": "bold red"}


def setup_logging(verbose: bool) -> None:
    """The library's log lines, on stderr."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(
        level=level, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False, show_time=verbose, level=level)]
    )


def print_results(results: Path) -> None:
    """Verdict, stages and comparison of a merged study, as its files have them: nothing is computed here."""
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    _print_verdict(summary)
    stages, comparison = (_rows(results / "tables" / f"{name}.csv") for name in ("stages", "comparison"))
    where = _telling(stages)
    timed = [row for row in stages if row["n"] not in ("", "0")]
    _print_table("Stages: median ms", (*where, "length", *STAGES_SHOWN), timed, stages, "no accepted sample")
    pairs = [row for row in comparison if row["metric"] in METRICS_SHOWN]
    paired = [row for row in pairs if row["n"] not in ("", "0")]
    columns = (*where, "reference", "length", *RATIO_SHOWN)
    _print_table("Comparison, paired by sample: ms, and ratio to the reference (below 1 is faster)", columns, paired, pairs, "no pair")
    waited = [r for r in paired if r["verdict"] == "AMBIGUOUS" and r["low"] and r["high"] and (float(r["high"]) < 1 or float(r["low"]) > 1)]
    if waited:
        text = "AMBIGUOUS beside an interval that does not hold 1: a side waited for a CPU for over 10 % of its time (cpu_wait_share)."
        console.print(f"{text} Time it again on a quiet machine.", style="dim")


def _print_verdict(summary: Mapping[str, Any]) -> None:
    n = summary["samples"]
    counts = ", ".join(f"{n[name]} {name}" for name in ("accepted", "failed", "discarded", "capped"))
    machines = ", ".join(sorted(summary["machines"]))
    banner = Text.assemble((summary["verdict"], _STYLES[summary["verdict"]]), f"  {summary['study']}: {counts}. Machine: {machines}.")
    if summary["dummy_weights"]:
        banner.append(f" Random weights: {', '.join(summary['dummy_weights'])}.")
    console.print(banner)
    for reason in summary["reasons"]:
        console.print(Text.assemble(("  " + reason["code"], "red"), f" {reason['where']}: {reason['detail']}"))
    warned: dict[str, list[str]] = {}
    for warning in summary["warnings"]:
        warned.setdefault(warning["code"], []).append(warning["where"])
    for code, places in warned.items():
        shown = list(dict.fromkeys(places))
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        console.print(Text.assemble(("  " + code, "yellow"), f" {', '.join(shown[:3])}{more}"))


def _telling(rows: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Columns that tell the groups apart: the model, and what else there is more than one of."""
    several = [key for key in ("machine", "dataset") if len({row[key] for row in rows}) > 1]
    variants = {(row["model"], row["variant"]) for row in rows}
    return (*several, "model", *(["variant"] if len(variants) > len({row["model"] for row in rows}) else []))


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _print_table(
    title: str, columns: Iterable[str], rows: Sequence[Mapping[str, str]], all_rows: Sequence[Mapping[str, str]], lacking: str
) -> None:
    """Rows that have a figure; how many have none is said below."""
    if not all_rows:
        return
    columns = [c for c in columns if c in all_rows[0]]
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    numeric = {c for c in columns if any(row[c] for row in rows) and all(_is_number(row[c]) for row in rows if row[c]) and c != "length"}
    for name in columns:
        heading = name.removesuffix("_ms").replace("reference_median", "ref. median")
        table.add_column(heading, justify="right" if name in numeric else "left", no_wrap=name in numeric, overflow="fold")
    before: tuple[str, ...] | None = None
    for row in rows:
        group = tuple(row[c] for c in ("model", "length") if c in columns)
        if "metric" in columns and before not in (None, group):
            table.add_section()
        before = group
        table.add_row(*(Text(row[c] or "–", style=_STYLES.get(row[c], "")) for c in columns))
    console.print()
    console.print(table, soft_wrap=False)
    left = len(all_rows) - len(rows)
    if left:
        lengths = ", ".join(dict.fromkeys(row["length"] for row in all_rows if row["n"] in ("", "0")))
        rows_are = ("1 row", "is") if left == 1 else (f"{left} rows", "are")
        console.print(f"{rows_are[0]} with {lacking} {rows_are[1]} left out (length {lengths}).", style="dim")


def print_samples(timings: Path, count: int) -> None:
    """What the models said about the first `count` samples, from the merged rows."""
    import pyarrow.parquet as pq

    table: Any = pq.read_table(timings, columns=["sample", "model", "variant", "length", "repeat", "text", "query", "new_tokens"])
    rows = [row for row in table.to_pylist() if row["repeat"] == 0 and row["text"] is not None]
    for sample in sorted({row["sample"] for row in rows})[:count]:
        of_sample = [row for row in rows if row["sample"] == sample]
        console.print()
        console.print(Text.assemble((sample, "bold"), f"  {of_sample[0]['query']}"))
        for row in of_sample:
            text = json.dumps(row["text"].strip(), ensure_ascii=False)
            console.print(Text(f"  {row['model']} ({row['length']}, {row['new_tokens']} tokens): {text}"))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextmanager
def steps() -> Iterator[Callable[..., None]]:
    """A callable (what, done, of, note="") that draws progress on a terminal, and elsewhere prints a line at every tenth of the way."""
    if not errors.is_terminal:
        said: dict[str, int] = {}

        def line(what: str, done: int, of: int, note: str = "") -> None:
            tenth = 10 * done // max(of, 1)
            if said.get(what) != tenth:
                errors.print(f"{what} {done}/{of}{f', {note}' if note else ''}", markup=False)
            said[what] = tenth

        yield line
        return
    bars: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description:>14}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
    ) as progress:

        def tell(what: str, done: int, of: int, note: str = "") -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=of, note="")
            kept: str = note or progress.tasks[bars[what]].fields["note"]
            progress.update(bars[what], completed=done, total=of, note=kept)

        yield tell
