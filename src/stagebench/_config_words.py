"""What is wrong with a configuration, in words: what pydantic found, what was expected, what may have been meant."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

__all__ = ["explain"]

_BRANCHES = ("literal[", "constrained-")


def explain(root: type[BaseModel], found: Sequence[Any]) -> list[str]:
    """A line for each wrong place of what was to be a `root`. found: as `ValidationError.errors` gives them.

    Pydantic tells of each branch of a union apart, and calls a list whose items are wrong empty.
    """
    places = [tuple(part for part in error["loc"] if not str(part).startswith(_BRANCHES)) for error in found]
    wanted: dict[tuple[int | str, ...], list[str]] = {}
    for error, place in zip(found, places, strict=True):
        within = any(other[: len(place)] == place != other for other in places)
        if not (error["type"] == "too_short" and within):
            wanted.setdefault(place, []).append(_expected(root, error))
    inputs = dict(zip(places, (error["input"] for error in found), strict=True))
    return [_line(place, " Or: ".join(texts), inputs[place]) for place, texts in wanted.items()]


def _expected(root: type[BaseModel], error: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key. {_remedy(root, error['loc'])}"
        case "missing":
            return "missing, and it has no default."
        case "string_pattern_mismatch":
            return "A name has letters, digits, '_', '.' and '-', and begins with a letter or digit."
        case "too_short":
            return "Expected at least one."
        case "tuple_type":
            return "Expected a list, as in [a, b]."
        case "model_type" | "dict_type":
            return "Expected keys below it, each with its value; to have the defaults, leave the section out."
        case _:  # what our own validators say stands behind pydantic's word for them
            return f"{error['msg'].removeprefix('Value error, ')}."


def _line(place: Sequence[int | str], text: str, found: Any) -> str:
    key = ".".join(str(part) for part in place if part != "[key]") or "(whole)"
    shown = f" Found {reprlib.repr(found)}." if not isinstance(found, Mapping) and not text.startswith("unknown key") else ""
    return f"{key}: {text}{shown}"


def _remedy(root: type[BaseModel], place: Sequence[int | str]) -> str:
    """What may have been meant by an unknown key: one of the same section that looks like it, or the section that has it."""
    name = str(place[-1])
    if near := difflib.get_close_matches(name, _keys(root, place[:-1]), n=1):
        return f"Did you mean {near[0]}? All keys: docs/config.md."
    if homes := [section for section in root.model_fields if name in _keys(root, (section,))]:
        return f"It is a key of {' and '.join(homes)}: move it there."
    if homes := [section for section in ("datasets", "models") if name in _keys(root, (section, "any"))]:
        return f"It is a key of {homes[0]}.<name>: move it there."
    return "Remove it, or check its spelling against docs/config.md."


def _keys(root: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """Keys of the section at a place, such as ("models", "llava"); none where there is no section."""
    at: Any = root
    for part in place:
        if get_origin(at) is dict:
            at = get_args(at)[1]
        else:
            field = getattr(at, "model_fields", {}).get(part)
            at = field.annotation if field else None
        if get_origin(at) is not dict:
            at = next((a for a in get_args(at) if isinstance(a, type) and issubclass(a, BaseModel)), at)
    return list(getattr(at, "model_fields", ()))
