"""Along an axis of the config: one model at 1 and at 8 frames, at 200 ms and at 20 s of clip, at batch 1 and at 32.

An axis is a setting of the variants whose values are numbers, or the datasets. Everything else is equal along it. Each place is held
against the axis's first one (the config's order), and a line over all samples says what one more frame, or second, costs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from stagebench.config import Config
from stagebench.merge.comparison import NO_PAIRS, paired, ratio_row, word
from stagebench.merge.conditions import longest_wait
from stagebench.merge.groups import METRICS, SETTINGS, Group
from stagebench.stats import MIN_BATCHES, cluster_interval, fit_line, sequence_ratio, unpaired_ratio

__all__ = ["AXES", "axis_rows", "seconds_of"]

AXES = ("frames", "batch", "keep_visual")
"""Settings whose values are numbers: what they cost has a slope."""
DATASET = "dataset"
PER_SAMPLE = "sample_ms"
"""Total / batch: compared along `batch` too, where more samples in more time is no slowness."""

_DURATION = re.compile(r"(?:^|[^a-z0-9.])(\d+(?:\.\d+)?)(ms|s)$")
_MIN_SEQUENCES = 2
"""Sequences that two datasets must share for their ratio to be taken sequence by sequence."""

PAIRED, BY_SEQUENCE, UNPAIRED = "paired by sample", "paired by sequence", "unpaired"

Floats = npt.NDArray[np.float64]


def seconds_of(dataset: str) -> float | None:
    """Length of a clip as the dataset's name in the config says it at its end (`dsec_200ms`, `dsec_1s`, `dsec-2.5s`), in seconds."""
    found = _DURATION.search(dataset.lower())
    return None if found is None else float(found[1]) * (1e-3 if found[2] == "ms" else 1.0)


@dataclass(frozen=True)
class _Place:
    """One group on an axis."""

    group: Group
    label: str
    x: float | None
    """Where it stands, where that is a number: frames, samples a batch, share of tokens, seconds."""


def axis_rows(found: Sequence[Group], config: Config) -> list[dict[str, Any]]:
    """A row for each axis, model, place and metric, in the config's order along the axis. An axis of one place is none."""
    rows: list[dict[str, Any]] = []
    for axis, series, places in _series(found, config):
        for metric in (*METRICS[:1], PER_SAMPLE, *METRICS[1:]) if axis == "batch" else METRICS:
            line = {"series": series} | _slope(places, metric, config)
            rows += [_row(axis, place, places[0], metric, config) | line for place in places]
    return rows


def _series(found: Sequence[Group], config: Config) -> Iterator[tuple[str, str | None, list[_Place]]]:
    """(axis, what tells them from the model's other series, groups that differ in that axis only and stand in its order).

    Groups without a sample are left out.
    """
    for axis in (DATASET, *AXES):
        alike: dict[tuple[Any, ...], list[Group]] = {}
        for group in found:
            if group.n:
                alike.setdefault(_rest(group, axis), []).append(group)
        values = list(config.datasets) if axis == DATASET else list(getattr(config.variants, axis))
        several = {rest: members for rest, members in alike.items() if len({_place(group, axis).label for group in members}) > 1}
        for members in several.values():
            places = [_place(group, axis) for group in members]
            places.sort(key=lambda place: _rank(values, place))
            yield axis, _telling(axis, members[0], [others[0] for others in several.values()]), places


def _telling(axis: str, one: Group, all_series: Sequence[Group]) -> str | None:
    """The settings, beside the axis, in which this series of a model differs from another of the same model; None where it has but one."""
    of_model = [other for other in all_series if other.model == one.model]
    names = [n for n in SETTINGS if n != axis and len({other.settings[n] for other in of_model}) > 1]
    return " · ".join(f"{name}: {one.settings[name]}" for name in names) or None


def _rest(group: Group, axis: str) -> tuple[Any, ...]:
    return (
        group.machine,
        group.model,
        group.length,
        None if axis == DATASET else group.dataset,
        *(None if name == axis else group.settings[name] for name in SETTINGS),
    )


def _place(group: Group, axis: str) -> _Place:
    if axis == DATASET:
        return _Place(group, group.dataset, seconds_of(group.dataset))
    value = group.settings[axis]
    return _Place(group, str(value), None if value is None else float(value))


def _rank(values: Sequence[Any], place: _Place) -> tuple[int, str]:
    names = [str(value) for value in values]
    return (names.index(place.label) if place.label in names else len(names), place.label)


def _row(axis: str, place: _Place, first: _Place, metric: str, config: Config) -> dict[str, Any]:
    group, c = place.group, config.compare
    values, clusters, batches = _values(group, metric)
    row: dict[str, Any] = {"machine": group.machine, "dataset": group.dataset, "model": group.model}
    row |= {"variant": group.variant, "length": group.length, "axis": axis, "value": place.label, "x": place.x}
    row |= {"unit": "s" if axis == DATASET else axis, "metric": metric.removesuffix("_ms"), "n": len(values)}
    row |= {"failed": group.failed, "discarded": group.discarded, "capped": group.capped, "against": first.label}
    row |= dict.fromkeys(("median", "gmean", "gmean_low", "gmean_high"))
    if len(values):
        whole = cluster_interval(np.log(values), clusters, batches=batches, confidence=c.confidence, resamples=c.resamples)
        limits = (None if limit is None else float(np.exp(limit)) for limit in (whole.low, whole.high))
        row |= {"median": float(np.median(values)), "gmean": float(np.exp(whole.mean))}
        row |= dict(zip(("gmean_low", "gmean_high"), limits, strict=True))
    return row | _ratio(place, first, metric, config)


def _ratio(place: _Place, first: _Place, metric: str, config: Config) -> dict[str, Any]:
    """This place over the axis's first: paired where both have the samples, else by the sequences that both have, else unpaired."""
    if place is first:
        return dict.fromkeys(("pairs", "ratio", "low", "high", "verdict", "how"))
    if place.group.dataset == first.group.dataset:
        row = ratio_row(paired(place.group, first.group), metric, config)
        return {"pairs": row["n"], "how": PAIRED} | {name: row[name] for name in ("ratio", "low", "high", "verdict")}
    (values, clusters, batches), (others, other_clusters, other_batches) = _values(place.group, metric), _values(first.group, metric)
    if not len(values) or not len(others):
        return {"pairs": 0, "how": UNPAIRED, "ratio": None, "low": None, "high": None, "verdict": NO_PAIRS}
    c = config.compare
    settings: dict[str, Any] = {"batches": batches, "reference_batches": other_batches}
    settings |= {"confidence": c.confidence, "same_within": c.same_within}
    if len(set(clusters) & set(other_clusters)) >= _MIN_SEQUENCES:
        ratio = sequence_ratio(values, clusters, others, other_clusters, resamples=c.resamples, **settings)
        how, pairs = BY_SEQUENCE, ratio.n
    else:
        ratio = unpaired_ratio(values, clusters, others, other_clusters, **settings)
        how, pairs = UNPAIRED, 0
    said = word(ratio.verdict, metric, longest_wait(place.group.typical, first.group.typical))
    return {"pairs": pairs, "how": how, "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "verdict": said}


def _slope(places: Sequence[_Place], metric: str, config: Config) -> dict[str, Any]:
    """The metric a unit of the axis, over all samples of all places: the same in each row of the series."""
    names = ("slope", "slope_low", "slope_high", "intercept")
    if any(place.x is None for place in places):
        return dict.fromkeys(names)
    x: list[float] = []
    y: list[float] = []
    clusters: list[str] = []
    units: list[str] = []
    known = True
    for number, place in enumerate(places):
        values, sequences, batches = _values(place.group, metric)
        # a place of too few batches does not say how they differ, however many other places have
        known &= all(len(set(names)) >= MIN_BATCHES for names in batches)
        units += [f"{number}/{name}" for name in (batches[0] if batches else range(len(values)))]
        x += [float(place.x or 0.0)] * len(values)
        y += values.tolist()
        clusters += sequences
    together = [units] if len(set(units)) < len(units) else []
    fit = fit_line(np.array(x), np.array(y), clusters, batches=together, confidence=config.compare.confidence) if y else None
    if fit is None:
        return dict.fromkeys(names)
    if not known:
        return dict(zip(names, (fit.slope, None, None, fit.intercept), strict=True))
    return dict(zip(names, (fit.slope, fit.slope_low, fit.slope_high, fit.intercept), strict=True))


def _values(group: Group, metric: str) -> tuple[Floats, list[str], list[list[str]]]:
    """[n] of the typical runs, above 0 and finite, with their sequences, and the batches that they were measured in together."""
    values = group.typical[metric].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    keep = np.isfinite(values) & (values > 0)
    own = group.batches if metric != "new_tokens" else []
    batches = [[b for b, k in zip(names, keep, strict=True) if k] for names in own]
    return values[keep], [s for s, k in zip(group.sequences, keep, strict=True) if k], batches
