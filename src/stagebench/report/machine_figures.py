"""Figures of what the machine did: drift over the run order beside clock, temperature and power; energy; engines against the limit."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from stagebench.report.figures import STAGE_COLOURS, Figure, Study, _by_length, _data, _series_colour, _series_shape, _thin, lengths_of
from stagebench.stages import STAGES

__all__ = ["MACHINE_FIGURES"]

_READINGS = {"sm_clock_mhz": "SM clock (MHz)", "temperature_c": "temperature (°C)", "power_w": "power (W)"}
OTHER = "not told apart"
"""Energy of a sample beside that of the stages which are long enough to be counted on their own."""


def run_order(study: Study) -> Any:
    """Totals in the order of measuring and, below them on the same axis, what the device said at the samples' borders, where it does."""
    totals: dict[str, list[dict[str, Any]]] = {}
    readings: dict[str, list[dict[str, Any]]] = {}
    for group in study.groups:
        runs, name = group.runs.filter(pl.col("order").is_not_null()).sort("order", "sample", "repeat"), study.series(group)
        for order, total in runs.gather_every(_thin(len(runs), study)).select("order", "total_ms").rows():
            totals.setdefault(f"total (ms), {group.length}", []).append({"series": name, "order": order, "value": total})
        for column, title in _READINGS.items():
            if column not in runs.columns:
                continue
            read = runs.filter(pl.col(column).is_not_null())
            for order, value in read.gather_every(len(_READINGS) * _thin(len(read), study)).select("order", column).rows():
                readings.setdefault(title, []).append({"series": name, "order": order, "value": value})
    in_order = [
        title for length in lengths_of([{"length": g.length} for g in study.groups]) if (title := f"total (ms), {length}") in totals
    ]
    panels = {title: totals[title] for title in in_order} | {title: readings[title] for title in _READINGS.values() if title in readings}
    if not panels:
        return None
    everything = [row for rows in panels.values() for row in rows]
    last = max(row["order"] for row in everything)
    charts = [
        alt.Chart(_data(rows))
        .mark_point(size=12, opacity=0.7)
        .encode(
            x=alt.X(
                "order:Q",
                title="run number in its job" if title == list(panels)[-1] else None,
                axis=alt.Axis(tickMinStep=1),
                scale=alt.Scale(domain=[0, last], nice=False),
            ),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=title in totals)),
            color=_series_colour(everything),
            shape=_series_shape(everything),
        )
        .properties(width=520, height=160 if title in totals else 100)
        for title, rows in panels.items()
    ]
    return alt.vconcat(*charts)


def energy(study: Study) -> Any:
    """Energy of a sample, divided among the stages whose energy the device could count."""
    of_stages: dict[tuple[str, str], dict[str, float]] = {}
    for row in study.tables["distribution"].frame.to_dicts():
        if row.get("energy_j") is not None:
            of_stages.setdefault((study.series(row), row["length"]), {})[row["metric"]] = row["energy_j"]
    rows = []
    for row in study.tables["stages"].frame.to_dicts():
        if row["energy_j"] is None:
            continue
        name = study.series(row)
        known = {stage: of_stages.get((name, row["length"]), {}).get(stage) for stage in STAGES}
        parts = {stage: joule for stage, joule in known.items() if joule is not None}
        parts[OTHER] = row["energy_j"] - sum(parts.values())
        name = f"{name} (n = {row['energy_n']})"
        rows += [{"series": name, "length": row["length"], "part": p, "order": i, "joule": j} for i, (p, j) in enumerate(parts.items())]
    if not rows:
        return None
    named = [part for part in (*STAGES, OTHER) if any(row["part"] == part for row in rows)]
    colours = dict(zip((*STAGES, OTHER), STAGE_COLOURS, strict=True))
    chart = (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            x=alt.X("joule:Q", title="energy a sample (J, mean)", stack="zero"),
            y=alt.Y("series:N", title=None, sort=None),
            color=alt.Color("part:N", title="stage", scale=alt.Scale(domain=named, range=[colours[part] for part in named])),
            order=alt.Order("order:Q"),
        )
        .properties(width=520)
    )
    return _by_length(chart, rows)


def limit(study: Study) -> Any:
    """ms a token of each engine beside what the bytes that a step reads take at the measured bandwidth."""
    rows = [
        {"series": study.series(row), "length": row["length"], "engine": row["engine"], "ms": row["ms_per_token"], "limit": row["limit_ms"]}
        for row in study.tables["stages"].frame.to_dicts()
        if row["ms_per_token"] is not None and row["limit_ms"] is not None
    ]
    if not rows:
        return None
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    y = alt.Y("series:N", title=None, sort=None)
    colours = alt.Scale(domain=engines, range=["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00"][: len(engines)])
    chart = alt.layer(
        alt.Chart()
        .mark_bar()
        .encode(x=alt.X("ms:Q", title="ms a token; the line is the limit"), y=y, color=alt.Color("engine:N", scale=colours)),
        alt.Chart().mark_tick(thickness=3, color="#D55E00", size=22).encode(x="limit:Q", y=y),
        data=_data(rows),
    ).properties(width=520)
    return _by_length(chart, rows)


MACHINE_FIGURES = (
    Figure(
        "energy",
        "Energy",
        "Mean energy of a sample, where the device counts it. A stage has its own share where it is far longer than the counter's period; "
        "n: samples that have all such stages, over which stages and total are taken.",
        energy,
    ),
    Figure(
        "limit",
        "Engines against the limit",
        "Median time a token; the limit is the bytes that a step reads over the bandwidth measured in the same job.",
        limit,
    ),
    Figure(
        "run_order",
        "Run order",
        "Total of each accepted run in the order of measuring: a slope is drift. Below, what the device said at the same samples' borders.",
        run_order,
    ),
)
"""In the order of the report."""
