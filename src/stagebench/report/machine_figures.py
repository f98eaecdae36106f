"""Figures of what the machine did: clock, temperature and power over the run order, energy a sample, engines against the limit."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from stagebench.report.figures import Figure, Study, _by_length, _data, _series_colour, _thin

__all__ = ["MACHINE_FIGURES"]

_READINGS = {"sm_clock_mhz": "SM clock (MHz)", "temperature_c": "temperature (°C)", "power_w": "power (W)"}


def machine_series(study: Study) -> Any:
    """What the device said at the samples' borders; None where no device says anything."""
    rows = []
    for group in study.groups:
        runs = group.runs
        if "order" not in runs.columns:
            continue
        for column, name in _READINGS.items():
            if column not in runs.columns:
                continue
            read = runs.filter(pl.col("order").is_not_null() & pl.col(column).is_not_null()).sort("order")
            for order, value in read.gather_every(3 * _thin(len(read), study)).select("order", column).rows():
                rows.append({"series": study.series(group), "order": order, "value": value, "reading": name})
    if not rows:
        return None
    readings = [name for name in _READINGS.values() if any(row["reading"] == name for row in rows)]
    charts = [
        alt.Chart(_data([row for row in rows if row["reading"] == name]))
        .mark_point(size=12, opacity=0.7)
        .encode(
            x=alt.X("order:Q", title="run number in its job" if name == readings[-1] else None),
            y=alt.Y("value:Q", title=name, scale=alt.Scale(zero=False)),
            color=_series_colour(rows),
        )
        .properties(width=520, height=100)
        for name in readings
    ]
    return alt.vconcat(*charts)


def energy(study: Study) -> Any:
    rows = [
        {"series": study.series(row), "length": row["length"], "joule": row["energy_j"]}
        for row in study.tables["stages"].frame.to_dicts()
        if row["energy_j"] is not None
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            x=alt.X("joule:Q", title="energy a sample (J, median)"), y=alt.Y("series:N", title=None, sort=None), color=_series_colour(rows)
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
    Figure("energy", "Energy", "Energy of a sample, where the device counts it.", energy),
    Figure(
        "limit",
        "Engines against the limit",
        "Median time a token; the limit is the bytes that a step reads over the bandwidth measured in the same job.",
        limit,
    ),
    Figure("machine", "Clock, temperature, power", "What the device said at the borders of each accepted sample.", machine_series),
)
"""In the order of the report."""
