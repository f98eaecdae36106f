"""What a person sees in a terminal: tables, messages, progress. Plain lines where there is no terminal."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["console", "errors", "print_csv", "setup_logging", "steps"]

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def setup_logging(verbose: bool) -> None:
    """The library's log lines, on stderr."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(
        level=level, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False, show_time=verbose, level=level)]
    )


def print_csv(path: Path, *, title: str, columns: list[str] | None = None) -> None:
    """Print a CSV file as a table, as it stands: nothing is computed here. Lines that begin with # go above it."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in file if line.strip()]
    notes = [line[1:].strip() for line in lines if line.startswith("#")]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    shown = [c for c in (columns or (list(rows[0]) if rows else [])) if not rows or c in rows[0]]
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for name in shown:
        numeric = all(_is_number(row[name]) for row in rows if row[name])
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    for note in notes:
        console.print(note)
    console.print(table)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """A callable (what, done, of) that draws progress on a terminal and prints plain lines elsewhere."""
    if not errors.is_terminal:
        yield lambda what, done, of: errors.print(f"{what} {done}/{of}")
        return
    bars: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=errors
    ) as progress:

        def tell(what: str, done: int, of: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=of)
            progress.update(bars[what], completed=done, total=of)

        yield tell
