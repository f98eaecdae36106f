"""Figures of a merged study as Vega-Lite charts. Each takes merged data and gives a chart, or None where there is nothing to draw.

Colours are Okabe and Ito's, which colour-blind readers tell apart; every axis names its unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from stagebench.merge.groups import Group
from stagebench.stages import STAGES
from stagebench.tables import Table

__all__ = ["FIGURES", "Figure", "Study", "lengths_of"]

STAGE_COLOURS = ("#009E73", "#56B4E9", "#F0E442", "#E69F00", "#CC79A7", "#0072B2", "#999999")
MODEL_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
SHAPES = ("circle", "square", "triangle-up", "cross")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
LOG_AXIS = alt.Axis(format="~g", labelOverlap=True, tickCount=6)
MOST_POINTS = 1800
"""Marks drawn in a figure, over all its groups; above, every k-th is: the page stays small, the files hold all."""


@dataclass(frozen=True)
class Study:
    """What figures draw from."""

    tables: dict[str, Table]
    groups: Sequence[Group]
    token_gaps: pl.DataFrame
    """series, length, position, p50_ms: time between neighbouring tokens."""
    summary: dict[str, Any]

    def series(self, row: dict[str, Any] | Group) -> str:
        """How a group is called in a legend: its model, and what else tells it from others."""
        part = (
            {"model": row.model, "variant": row.variant, "dataset": row.dataset, "machine": row.machine} if isinstance(row, Group) else row
        )
        several = (
            key
            for key in ("variant", "dataset", "machine")
            if len({getattr(g, key) for g in self.groups if key != "variant" or g.model == part["model"]}) > 1
        )
        return " · ".join([str(part["model"]), *(str(part[key]) for key in several)])


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    caption: str
    draw: Callable[[Study], Any]


def _data(rows: list[dict[str, Any]]) -> alt.Data:
    return alt.Data(values=rows)


def lengths_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Length modes in the order of the page: natural first, then numbers of tokens."""
    return sorted({row["length"] for row in rows}, key=lambda length: (str(length).isdigit(), int(length) if str(length).isdigit() else 0))


def _by_length(chart: Any, rows: list[dict[str, Any]]) -> Any:
    """One panel a length mode, below each other."""
    lengths = lengths_of(rows)
    if len(lengths) < 2:
        return chart
    return chart.facet(
        row=alt.Row("length:N", title=None, sort=lengths, header=alt.Header(labelOrient="top", labelAnchor="start", labelFontWeight="bold"))
    ).resolve_scale(x="independent")


def _curves(rows: list[dict[str, Any]], x: alt.X, y: alt.Y, **line: Any) -> Any:
    """A line a series."""
    chart = alt.Chart(_data(rows)).mark_line(**line).encode(x=x, y=y, color=_series_colour(rows), strokeDash=_series_dash(rows))
    return _by_length(chart.properties(width=520, height=160), rows)


def _series_colour(rows: list[dict[str, Any]]) -> alt.Color:
    """A colour a series; beyond seven they begin again, and `_series_shape` or `_series_dash` tells those apart."""
    names = list(dict.fromkeys(row["series"] for row in rows))
    return alt.Color("series:N", title="model", scale=_scale(names, MODEL_COLOURS), legend=_legend(names))


def _series_shape(rows: list[dict[str, Any]]) -> alt.Shape:
    """A shape for each round of colours."""
    names = list(dict.fromkeys(row["series"] for row in rows))
    return alt.Shape("series:N", title="model", scale=_scale(names, SHAPES, len(MODEL_COLOURS)), legend=_legend(names))


def _series_dash(rows: list[dict[str, Any]]) -> alt.StrokeDash:
    """A dash for each round of colours."""
    names = list(dict.fromkeys(row["series"] for row in rows))
    return alt.StrokeDash("series:N", title="model", scale=_scale(names, DASHES, len(MODEL_COLOURS)), legend=_legend(names))


def _scale(names: Sequence[str], values: Sequence[Any], every: int = 1) -> alt.Scale:
    return alt.Scale(domain=list(names), range=[values[i // every % len(values)] for i in range(len(names))])


def _legend(names: Sequence[str]) -> alt.Legend:
    """As many columns as fit under a chart: one long line would shrink the whole figure."""
    longest = max(map(len, names), default=1)
    return alt.Legend(columns=max(1, min(len(names), 560 // (24 + 6 * min(longest, 40)))), symbolOpacity=1)


def _thin(count: int, study: Study) -> int:
    return max(1, -(-count * max(1, len(study.groups)) // MOST_POINTS))


def stages(study: Study) -> Any:
    """Stacked mean stage times with the residual."""
    parts = (*STAGES, "residual")
    rows = [
        {
            "series": study.series(row),
            "length": row["length"],
            "stage": row["metric"],
            "order": parts.index(row["metric"]),
            "ms": max(row["mean_ms"], 0.0),
        }
        for row in study.tables["distribution"].frame.to_dicts()
        if row["metric"] in parts and row["mean_ms"] is not None
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            x=alt.X("ms:Q", title="mean time (ms)", stack="zero"),
            y=alt.Y("series:N", title=None, sort=None),
            color=alt.Color("stage:N", scale=alt.Scale(domain=list(parts), range=list(STAGE_COLOURS)), title="stage"),
            order=alt.Order("order:Q"),
        )
        .properties(width=520)
    )
    return _by_length(chart, rows)


def ecdf(study: Study) -> Any:
    rows = []
    for group in study.groups:
        values = np.sort(group.column("total_ms"))
        step = _thin(len(values), study)
        shown = sorted({*range(0, len(values), step), len(values) - 1}) if len(values) else []
        name, n = study.series(group), len(values)
        rows += [{"series": name, "length": group.length, "ms": float(values[i]), "share": (i + 1) / n} for i in shown]
    if not rows:
        return None
    x = alt.X("ms:Q", title="total (ms)", scale=alt.Scale(zero=False))
    y = alt.Y("share:Q", title="share of samples", scale=alt.Scale(domain=[0, 1]))
    return _curves(rows, x, y, interpolate="step-after")


def forest(study: Study) -> Any:
    rows = [
        {"series": study.series(row), "length": row["length"]} | {k: row[k] for k in ("metric", "ratio", "low", "high", "verdict")}
        for row in study.tables["comparison"].frame.to_dicts()
        if row["ratio"] is not None and row["metric"] != "new_tokens"
    ]
    if not rows:
        return None
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    # the layers have no data of their own: facets divide what the whole chart holds
    beside = alt.YOffset("series:N", sort=list(dict.fromkeys(row["series"] for row in rows)))
    base = alt.Chart().encode(y=alt.Y("metric:N", sort=metrics, title=None), yOffset=beside, color=_series_colour(rows))
    scale = alt.Scale(type="log", nice=False)
    chart = alt.layer(
        base.mark_rule(strokeWidth=2).encode(
            x=alt.X("low:Q", scale=scale, axis=LOG_AXIS, title="ratio to the reference (log; below 1 is faster)"), x2="high:Q"
        ),
        base.mark_point(filled=True, size=45, opacity=1).encode(x=alt.X("ratio:Q", scale=scale), shape=_series_shape(rows)),
        alt.Chart().mark_rule(strokeDash=[4, 3], color="#888").encode(x=alt.datum(1)),
        data=_data(rows),
    ).properties(width=460, height=alt.Step(max(7, 18 / max(1, len({r["series"] for r in rows}))), **{"for": "offset"}))
    return _by_length(chart, rows)


def waterfall(study: Study) -> Any:
    rows = [
        {"series": study.series(row), "length": row["length"], "part": row["part"], "log": row["log_ratio"]}
        for row in study.tables["decomposition"].frame.to_dicts()
        if row["log_ratio"] is not None
    ]
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1]["part"] == "total"
        row["begin"] = 0.0 if first or row["part"] == "total" else rows[i - 1]["end"]
        row["end"] = row["begin"] + row["log"]
    if not rows:
        return None
    for row in rows:
        row |= {
            "from": float(np.exp(row["begin"])),
            "to": float(np.exp(row["end"])),
            "kind": "total" if row["part"] == "total" else "faster" if row["log"] < 0 else "slower",
        }
    parts = list(dict.fromkeys(row["part"] for row in rows))
    kinds = alt.Scale(domain=["faster", "slower", "total"], range=["#009E73", "#D55E00", "#999999"])
    return (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            x=alt.X(
                "from:Q",
                scale=alt.Scale(type="log", nice=False),
                axis=LOG_AXIS,
                title="ratio, part by part (log)",
            ),
            x2="to:Q",
            y=alt.Y("part:N", sort=parts, title=None, axis=alt.Axis(labelOverlap=False)),
            color=alt.Color("kind:N", scale=kinds, title=None),
            column=alt.Column("length:N", title=None, sort=lengths_of(rows)),
            row=alt.Row(
                "series:N",
                title=None,
                sort=list(dict.fromkeys(r["series"] for r in rows)),
                header=alt.Header(labelOrient="top", labelAnchor="start", labelFontWeight="bold"),
            ),
        )
        .properties(width=230, height=alt.Step(15))
        .resolve_scale(x="independent")
    )


def tokens(study: Study) -> Any:
    rows, lines = [], []
    fits = {
        tuple(row[k] for k in ("machine", "dataset", "model", "variant", "length")): row for row in study.tables["stages"].frame.to_dicts()
    }
    for group in study.groups:
        name = study.series(group)
        runs = group.runs.filter(pl.col("decode_ms").is_not_null() & pl.col("steps").is_not_null())
        runs = runs.gather_every(_thin(len(runs), study))
        rows += [{"series": name, "steps": s, "ms": ms} for s, ms in runs.select("steps", "decode_ms").rows()]
        fit = fits.get(group.key, {})
        if fit.get("slope_ms_per_token") is not None and len(runs):
            ends = sorted(set(runs["steps"]))
            level, slope = fit["intercept_ms"], fit["slope_ms_per_token"]
            lines += [{"series": name, "fit": f"{name} {group.length}", "steps": s, "ms": level + slope * s} for s in (ends[0], ends[-1])]
    if not rows:
        return None
    x, y = alt.X("steps:Q", title="tokens after the first"), alt.Y("ms:Q", title="decode (ms)")
    points = alt.Chart(_data(rows)).mark_point(size=14, opacity=0.6).encode(x=x, y=y, color=_series_colour(rows), shape=_series_shape(rows))
    drawn = alt.Chart(_data(lines)).mark_line().encode(x=x, y=y, color=_series_colour(rows), detail="fit:N")
    return (alt.layer(points, drawn) if lines else points).properties(width=520, height=260)


def first_call(study: Study) -> Any:
    rows = []
    seen = set()
    for row in study.tables["stages"].frame.to_dicts():
        if row["first_call_encode_ms"] is None or row["encode_ms"] is None or (name := study.series(row)) in seen:
            continue
        seen.add(name)
        rows.append({"series": name, "when": "first call of the process", "ms": row["first_call_encode_ms"]})
        rows.append({"series": name, "when": "steady (median)", "ms": row["encode_ms"]})
    if not rows:
        return None
    return (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            x=alt.X("ms:Q", title="encode (ms)"),
            y=alt.Y("series:N", title=None, sort=list(dict.fromkeys(row["series"] for row in rows))),
            yOffset=alt.YOffset("when:N"),
            color=alt.Color("when:N", title=None, scale=alt.Scale(range=["#E69F00", "#0072B2"])),
        )
        .properties(width=520)
    )


def inter_token(study: Study) -> Any:
    rows = study.token_gaps.to_dicts()
    if not rows:
        return None
    y = alt.Y("p50_ms:Q", title="ms between tokens", scale=alt.Scale(zero=False))
    return _curves(rows, alt.X("position:Q", title="token", axis=alt.Axis(tickMinStep=1, format="d")), y)


def load(study: Study) -> Any:
    rows = [
        {"series": f"{study.series(row)} from {row['source']}", "ms": row["median_ms"], "source": row["source"]}
        for row in study.tables["load"].frame.to_dicts()
        if row["median_ms"] is not None
    ]
    if not rows:
        return None
    return (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            x=alt.X("ms:Q", title="load (ms, median)"),
            y=alt.Y("series:N", title=None, sort=None),
            color=alt.Color("source:N", scale=alt.Scale(range=list(MODEL_COLOURS)), title="source"),
        )
        .properties(width=520)
    )


def memory(study: Study) -> Any:
    rows = [
        {"series": study.series(row), "length": row["length"], "stage": row["metric"], "gib": row["peak_bytes"] / 2**30}
        for row in study.tables["distribution"].frame.to_dicts()
        if row["peak_bytes"] is not None
    ]
    if not rows:
        return None
    stages = [stage for stage in STAGES if any(row["stage"] == stage for row in rows)]
    chart = (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            x=alt.X("gib:Q", title="peak device memory (GiB)"),
            y=alt.Y("series:N", sort=None, title=None),
            yOffset=alt.YOffset("stage:N", sort=stages),
            color=alt.Color("stage:N", title="stage", scale=alt.Scale(domain=stages, range=list(STAGE_COLOURS[: len(stages)]))),
        )
        .properties(width=520, height=alt.Step(7, **{"for": "offset"}))
    )
    return _by_length(chart, rows)


FIGURES = (
    Figure("stages", "Stages", "Mean time of each stage; residual is what the total holds beside them.", stages),
    Figure(
        "forest",
        "Ratios",
        "Geometric-mean ratio to the reference model, paired by sample, with its interval clustered by sequence.",
        forest,
    ),
    Figure(
        "waterfall",
        "Where the ratio comes from",
        "Factors that multiply to the whole ratio; decode divides into tokens and ms a token.",
        waterfall,
    ),
    Figure("ecdf", "Distribution of the total", "Share of samples at or below a total.", ecdf),
    Figure("tokens", "Decode against tokens", "Each run, and the fitted line where lengths vary.", tokens),
    Figure("inter_token", "Time between tokens", "Median over samples, by position in the answer.", inter_token),
    Figure("first_call", "First call", "The first call of a process is never part of a figure above.", first_call),
    Figure("load", "Load by source", "Median time from sample key to frames in host memory.", load),
    Figure("memory", "Peak memory", "Highest allocation in each stage.", memory),
)
"""In the order of the report."""
