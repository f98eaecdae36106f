"""A model along an axis: total, time to first token and load, by frames, by seconds of clip, by batch."""

from __future__ import annotations

from typing import Any

import altair as alt

from stagebench.report.figures import Figure, Study, _data, _series_colour, _series_dash, _series_shape

__all__ = ["AXIS_FIGURE"]

METRICS = {"total": "total", "sample": "total / batch", "ttft": "to first token", "load": "load"}
_UNITS = {"dataset": "dataset", "frames": "frames", "batch": "samples a batch", "keep_visual": "share of visual tokens"}


def along_axis(study: Study) -> Any:
    """A panel an axis and metric: geometric mean with its interval at each place. Places that are numbers stand in their order, whatever
    the config's: a line through batches of 2, 16 and 4 would show a turn that is none."""
    table = study.tables.get("axis")
    several = [name for name in ("dataset", "machine") if len({getattr(group, name) for group in study.groups}) > 1]
    rows = [
        {
            "series": _label(row, several),
            "axis": row["axis"],
            "metric": METRICS[row["metric"]],
            "place": row["value"],
            "x": row["x"],
            **{name: row[name] for name in ("gmean", "gmean_low", "gmean_high")},
        }
        for row in (table.frame.to_dicts() if table is not None else ())
        if row["metric"] in METRICS and row["gmean"] is not None
    ]
    if not rows:
        return None
    panels = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        for metric in METRICS.values():
            shown = [row for row in rows if row["axis"] == axis and row["metric"] == metric]
            if not shown:
                continue
            shown = sorted(shown, key=lambda row: row["x"]) if all(row["x"] is not None for row in shown) else shown
            places = list(dict.fromkeys(row["place"] for row in shown))
            x = alt.X("place:N", title=_UNITS[axis], sort=places, axis=alt.Axis(labelAngle=0))
            title = "total of a batch (ms)" if (axis, metric) == ("batch", "total") else f"{metric} (ms)"
            y = alt.Y("gmean:Q", title=title)
            base = alt.Chart(_data(shown))
            colour, dash = _series_colour(rows), _series_dash(rows)
            line = base.mark_line().encode(x=x, y=y, color=colour, strokeDash=dash)
            points = base.mark_point(filled=True, opacity=1).encode(x=x, y=y, color=colour, shape=_series_shape(rows))
            bars = base.mark_rule().encode(x=x, y=alt.Y("gmean_low:Q", title=title), y2="gmean_high:Q", color=colour, strokeDash=dash)
            panels.append(alt.layer(line, points, bars).properties(width=520, height=110))
    return alt.vconcat(*panels)


def _label(row: dict[str, Any], several: list[str]) -> str:
    """One line of the figure: groups that differ along the axis only. Models and lengths are told apart, and whatever else there is of."""
    others = [str(row[name]) for name in several if name != row["axis"]]
    return " · ".join([row["model"], row["length"], *others, *([row["series"]] if row.get("series") else [])])


AXIS_FIGURE = Figure(
    "axis",
    "Along an axis",
    "Geometric mean and its interval at each place of an axis of the config, all else equal. Ratios and slopes are in the table.",
    along_axis,
)
