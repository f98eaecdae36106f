"""The report: one HTML file that needs nothing else, and the figures beside it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import polars as pl
import vl_convert

from stagebench.config import Config
from stagebench.errors import MergeError, StagebenchError
from stagebench.files import bounded_text, whole_file
from stagebench.merge.groups import CAPPED_POOL, groups
from stagebench.merge.order import in_order
from stagebench.report.answers import answers
from stagebench.report.axis_figure import AXIS_FIGURE
from stagebench.report.figures import FIGURES, Study
from stagebench.report.machine_figures import MACHINE_FIGURES
from stagebench.stats import withheld
from stagebench.tables import Table, cell, read_table

__all__ = ["write_report"]

MAX_SUMMARY_BYTES = 256 << 20

log = logging.getLogger(__name__)

TABLES = ("stages", "comparison", "axis", "decomposition", "load", "optimisations", "acceptance", "views", "distribution", "failures")
SHOWN_ROWS = 200
"""Rows of a table that the page prints; the files hold all."""
_HERE = Path(__file__).parent


def write_report(results: Path, *, title: str | None = None) -> Path:
    """Write `<results>/report.html` and `<results>/figures/*.{svg,pdf}` from the merged files below `results`, and from nothing else.

    title: the page's heading; None takes the study's name.

    Raises MergeError when the study was not merged.
    """
    results = Path(results)
    study = _read(results)
    (results / "figures").mkdir(exist_ok=True)
    drawn = []
    for figure in (*FIGURES, AXIS_FIGURE, *MACHINE_FIGURES):
        chart = figure.draw(study)
        if chart is not None:
            drawn.append({"name": figure.name, "title": figure.title, "caption": figure.caption, "svg": _draw(chart, figure.name, results)})
        else:  # an earlier report may have had data for it
            for suffix in (".svg", ".pdf"):
                (results / "figures" / f"{figure.name}{suffix}").unlink(missing_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    html = environment.get_template("template.html").render(
        s=study.summary,
        title=title or f"{study.summary['study']}: stage-by-stage latency",
        style=markupsafe.Markup((_HERE / "style.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        headline=_headline(study),
        bottlenecks=_bottlenecks(study) + _engine_notes(study),
        tables=[_printed(study.tables[name], study.summary) for name in TABLES],
        figures=drawn,
        method=_method(study.summary),
        answers=answers(study.groups, results),
        warnings=_warnings(study.summary),
        machines=[(name, json.dumps(found, indent=2, sort_keys=True)) for name, found in sorted(study.summary["machines"].items())],
    )
    path = results / "report.html"
    with whole_file(path, MergeError) as temporary:
        temporary.write_text(html, encoding="utf-8")
    log.info("report: %s", path)
    return path


def _read(results: Path) -> Study:
    try:
        summary = json.loads(bounded_text(results / "summary.json", MAX_SUMMARY_BYTES))
        if not isinstance(summary, dict):
            raise ValueError(f"a JSON {type(summary).__name__}, expected an object")
        config = Config.model_validate(summary["config"])
    except (OSError, ValueError, KeyError, RecursionError, StagebenchError) as error:
        raise MergeError(f"{results / 'summary.json'}: cannot be read ({error}). Merge the study first.") from error
    found = in_order(groups(results / "timings.parquet"), config)
    tables = {name: read_table(results / "tables" / f"{name}.parquet") for name in TABLES}
    study = Study(tables, found, pl.DataFrame(), summary)
    return Study(tables, found, _token_gaps(study, results / "timings.parquet"), summary)


def _token_gaps(study: Study, timings: Path) -> pl.DataFrame:
    """Median time between neighbouring tokens by position, over accepted runs. token_ms counts from the first token, at position 1."""
    keys = ["machine", "dataset", "model", "variant", "length"]
    accepted = pl.scan_parquet(timings).filter(pl.col("accepted"), pl.col("token_ms").list.len() > 1)
    # the first gap is the one since the end of prefill
    gap = pl.concat_list(pl.col("token_ms").list.head(1), pl.col("token_ms").list.diff().list.slice(1)).alias("gap")
    rows = []
    places = {group.key: number for number, group in enumerate(study.groups)}
    there = sorted(accepted.select(keys).unique().collect().rows(), key=lambda key: (places.get(key, len(places)), key))
    for group in (dict(zip(keys, key, strict=True)) for key in there):  # a group at a time: every token becomes a row
        gaps = (
            accepted.filter(*(pl.col(key).eq_missing(pl.lit(value)) for key, value in group.items()))
            .select(gap, pl.int_ranges(2, pl.col("token_ms").list.len() + 2).alias("position"))
            .explode("gap", "position")
            .filter(pl.col("gap").is_not_null())
            .group_by("position")
            .agg(pl.col("gap").cast(pl.Float64).median().alias("p50_ms"))
            .sort("position")
            .collect()
        )
        named = {"series": study.series(group), "length": group["length"]}
        rows += [named | row for row in gaps.to_dicts()]
    return pl.DataFrame(rows) if rows else pl.DataFrame(schema={"series": pl.String, "length": pl.String})


_CONFIG = {
    "background": None,
    "aria": False,
    "font": "Arial, Liberation Sans, Helvetica, sans-serif",
    "axis": {"gridOpacity": 0.35, "labelLimit": 260, "labelOverlap": True, "labelSeparation": 8},
    "legend": {"orient": "bottom", "labelLimit": 260},
    "view": {"stroke": None},
}

_PADDING = {"left": 44, "right": 36, "top": 8, "bottom": 8}
"""Room for labels where a reader's font is wider than the one that the chart was laid out with."""


def _draw(chart: Any, name: str, results: Path) -> markupsafe.Markup:
    """Save a chart as SVG and PDF; the SVG with ids of its own, for several stand in one page."""
    svg = vl_convert.vegalite_to_svg({**chart.to_dict(), "padding": _PADDING, "config": _CONFIG})
    folder = results / "figures"
    with whole_file(folder / f"{name}.svg", MergeError) as temporary:
        temporary.write_text(svg, encoding="utf-8")
    with whole_file(folder / f"{name}.pdf", MergeError) as temporary:
        temporary.write_bytes(vl_convert.svg_to_pdf(svg))
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'((?:xlink:)?href)="#([^"]+)"', rf'\1="#{name}-\2"', svg)
    return markupsafe.Markup(svg)  # noqa: S704 - Vega escapes the text that it draws


def _bottlenecks(study: Study) -> list[str]:
    """The summary's sentences; where a model has several variants each says of which it is, as a legend does."""
    return [study.series(b) + b["sentence"].removeprefix(b["model"]) for b in study.summary.get("bottlenecks", ())]


def _engine_notes(study: Study) -> list[str]:
    """What engines said of themselves: a variant called `fused` that fell back to `generate` has that one's time."""
    said: list[str] = []
    for job in study.summary.get("jobs", ()):
        engine = job["metadata"].get("engine") or {}
        notes = dict.fromkeys(note for note in (engine.get("note"), (engine.get("admission") or {}).get("note")) if note)
        said += [f"{study.series(job)}, engine {engine.get('name')}: {note.rstrip('.')}." for note in notes]
    return list(dict.fromkeys(said))


def _headline(study: Study) -> list[dict[str, Any]]:
    """The total's ratio of each pair, natural and equal length side by side."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    cap = study.summary["config"]["timing"]["max_new_tokens"]
    for row in study.tables["comparison"].frame.to_dicts():
        if row["metric"] != "total":
            continue
        key = tuple(str(row[k]) for k in ("machine", "dataset", "model", "variant", "reference"))
        card = found.setdefault(key, {"model": study.series(row), "reference": row["reference"], "dataset": row["dataset"], "ratios": []})
        printed = {k: cell(k, row[k]) for k in ("n", "ratio", "low", "high", "speedup", "median", "reference_median")}
        if row["length"].isdigit():
            length = f"equal length, {row['length']} tokens"
        else:
            length = f"natural length, capped at {cap} tokens" if row["length"] == CAPPED_POOL else f"{row['length']} length"
        bounded = row["low"] is not None and row["high"] is not None
        unclear = withheld(row["verdict"], row["low"], row["high"], study.summary["config"]["compare"]["same_within"])
        waited = f"{row['cpu_wait_share']:.0%}" if unclear else None
        alone = bounded and row["clusters"] == 1
        told = {"verdict": row["verdict"], "length": length, "bounded": bounded, "waited": waited, "alone": alone}
        card["ratios"].append({"none": not row["n"]} | printed | told)
    for card in found.values():
        # where every answer met the cap, its own entry says so, and an empty one beside it only takes its place
        capped = any("capped" in r["length"] and not r["none"] for r in card["ratios"])
        card["ratios"] = [r for r in card["ratios"] if not (capped and r["none"])]
    return list(found.values())


def _warnings(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Warnings by code: where they were found, and their words."""
    found: dict[str, dict[str, Any]] = {}
    for warning in summary["warnings"]:
        entry = found.setdefault(warning["code"], {"code": warning["code"], "details": []})
        entry["details"].append(f"{warning['where']}: {warning['detail']}")
    return list(found.values())


FOLDED = ("views", "distribution")
"""Tables that a reader opens when he wants them."""
OPEN_ROWS = 60
"""So are longer ones, but for the stages: a study of twelve variants had a page of 47,000 pixels."""
_EMPTY_COUNTS = ("failed", "discarded", "capped")


def _printed(table: Table, summary: dict[str, Any]) -> dict[str, Any]:
    views = []
    for number, (caption, columns) in enumerate(table.views):
        # groups without a sample stand in the first view, with what became of their samples
        frame = table.frame if not number or "n" not in table.frame.columns else table.frame.filter(pl.col("n") > 0)
        shown = [c for c in columns if _says_something(frame[c])]
        frame = frame.select(shown).head(SHOWN_ROWS)
        rows = [[(cell(c, v), _class(c, v, frame.schema[c])) for c, v in zip(shown, row, strict=True)] for row in frame.iter_rows()]
        blocks = _blocks(frame)
        views.append(
            {
                "caption": caption,
                "columns": [(c, "n" if frame.schema[c].is_numeric() else "") for c in shown],
                "rows": list(zip(blocks, rows, strict=True)),
                "left_out": [c for c in columns if c not in shown],
            }
        )
    files = [
        (f"tables/{table.name}.{suffix}", summary["files"].get(f"tables/{table.name}.{suffix}", {}))
        for suffix in ("csv", "md", "tex", "parquet")
    ]
    more = max(0, len(table.frame) - SHOWN_ROWS)
    return {
        "name": table.name,
        "title": table.title,
        "views": views,
        "notes": table.notes,
        "files": files,
        "rows": len(table.frame),
        "more": more,
        "folded": table.name in FOLDED or (len(table.frame) > OPEN_ROWS and table.name != "stages"),
        "left_out": list(dict.fromkeys(c for view in views for c in view["left_out"])),
    }


def _says_something(column: pl.Series) -> bool:
    """A column of nulls, or a count of what went wrong that is 0 in each row, only pushes the others out of sight."""
    if column.name in _EMPTY_COUNTS:
        return bool(column.fill_null(0).sum())
    return len(column) == 0 or column.null_count() < len(column)


def _class(name: str, value: Any, kind: pl.DataType) -> str:
    if name == "verdict" and value:
        return f"word {str(value).lower()}"
    return "n" if kind.is_numeric() else ""


def _blocks(frame: pl.DataFrame) -> list[bool]:
    """True where a row begins another model or length than the row above: a line is drawn there."""
    keys = [c for c in ("machine", "dataset", "length", "model", "variant") if c in frame.columns]
    rows = frame.select(keys).rows() if keys else []
    repeated = len(set(rows)) < len(rows)
    return [repeated and i > 0 and row != rows[i - 1] for i, row in enumerate(rows)] if rows else [False] * len(frame)


def _method(summary: dict[str, Any]) -> str:
    """A paragraph for a paper, from the study's own settings."""
    c, t = summary["config"], summary["config"]["timing"]
    low, high = t["repeats"]["min"], t["repeats"]["max"]
    repeats = f"{low} to {high} times" if low != high else f"{low} times" if low > 1 else "once"
    warmup = f"{t['warmup']} warm-up sample{'s' * (t['warmup'] != 1)} first, which {'are' if t['warmup'] != 1 else 'is'} excluded"
    lengths = ["with natural length (stop at end of sequence, at most " + str(t["max_new_tokens"]) + " tokens)"] * (
        "natural" in t["lengths"]
    )
    lengths += [f"with exactly {n} new tokens" for n in t["lengths"] if n != "natural"]
    decoding = "greedily" if not c["variants"]["temperature"] else f"by sampling at temperature {c['variants']['temperature']}"
    confidence = f"{100 * c['compare']['confidence']:g} %"
    text = (
        f"We timed {', '.join(c['models'])} stage by stage (load, preprocess, host-to-device copy, encode, prefill, decode) with a "
        "monotonic clock, the device synchronised at both ends of each stage. Vision was encoded once, and decoding used those features. "
        f"Each process ran {warmup}; its first call is reported apart. "
        f"Samples ran in a seeded random order, each {repeats}, decoded {decoding} {' and '.join(lengths)}. "
        "A sample's figure is that of its run with the median total. Models were compared by the geometric mean of per-sample ratios "
        f"with a {confidence} interval clustered by recording (bootstrap from 20 recordings on, Student's t on cluster-robust errors "
        "below). "
    )
    if max(c["variants"]["batch"], default=1) > 1:
        text += "Above batch 1 intervals are clustered by recording and by batch (Student's t). "
    if any(row["clusters"] == 1 and row["low"] is not None for row in summary["comparison"]):
        text += "Where a comparison rests on one recording, samples stand for recordings, and the interval speaks for that recording only. "
    n = summary["samples"]
    text += f"Over all groups {n['accepted']} samples were accepted, {n['failed']} failed, {n['discarded']} were discarded and "
    text += f"{n['capped']} met the cap."
    if summary["dummy_weights"]:
        text += f" {', '.join(summary['dummy_weights'])} had random weights of the stated shape: latencies hold, answers mean nothing."
    return text
