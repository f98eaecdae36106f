"""The order in which groups stand in every table, figure and list of a study: that of its configuration, not that of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stagebench.config import Config
from stagebench.merge.groups import Group

__all__ = ["in_order", "variants_in_order"]

_AXES = ("engine", "quantization", "batch", "attention", "keep_visual", "preprocess", "frames", "source")
"""As the plan multiplies them, the first changing slowest (`plan.specs.expand_variants`)."""


def in_order(found: Sequence[Group], config: Config) -> list[Group]:
    """The groups by machine, dataset, length, model and variant."""
    places = _places(found, config)
    datasets = {name: number for number, name in enumerate(config.datasets)}

    def place(group: Group) -> tuple[Any, ...]:
        dataset = (datasets.get(group.dataset, len(datasets)), group.dataset)
        return (group.machine, dataset, _length_rank(group.length), places[group.key[2:4]])

    return sorted(found, key=place)


def variants_in_order(found: Sequence[Group], config: Config) -> list[tuple[str, str]]:
    """Every (model, variant) of the groups, on whatever machine and dataset."""
    places = _places(found, config)
    return [(model, variant) for model, variant in sorted(places, key=lambda key: places[key])]


def _places(found: Sequence[Group], config: Config) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """(model, variant) -> where it stands."""
    return {group.key[2:4]: _rank(config, group.model, group.variant, group.settings) for group in found}


def _rank(config: Config, model: str, variant: str, settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where a model's variant stands: its model, then the place of its settings on the config's axes, whose first values are the base.

    settings: those of its rows. What the config does not name comes last, by name.
    """
    models = list(config.models)
    places = []
    for axis in _AXES:
        values, value = list(getattr(config.variants, axis)), settings.get(axis)
        if axis == "source" and isinstance(value, str):
            value = value.partition("+")[0]  # how it was read is no part of the axis
        places.append(values.index(value) if value in values else len(values))
    return (models.index(model) if model in models else len(models), model, *places, variant)


def _length_rank(length: str) -> tuple[int, int, str]:
    """Natural lengths first, then fixed ones by their number."""
    digits = "".join(c for c in length if c.isdigit())
    return (0, 0, length) if length.startswith("natural") else (1, int(digits or 0), length)
