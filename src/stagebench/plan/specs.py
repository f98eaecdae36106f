"""What is asked of each clip and each model: extraction specs, and the variants that the settings' axes multiply to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from stagebench.config import Config, VariantsConfig, canonical

if TYPE_CHECKING:
    from stagebench.dataset import Clip

__all__ = [
    "ORIGINS",
    "SHARD_FORMAT",
    "Kind",
    "Variant",
    "digest_of",
    "expand_variants",
    "extraction_spec",
    "origin",
    "shard_spec",
    "spec_name",
    "told",
]

Kind = Literal["frames", "events"]

SHARD_FORMAT = 1
"""Version of what extraction writes. Raise it when the same clip and the same settings would give other bytes: every shard is then new."""

ORIGINS: Mapping[str, tuple[str, ...]] = {"frames": ("mp4", "frames"), "events": ("events", "images")}
"""Entries of Clip.files that a kind is extracted from, the first that a clip has."""

LIVE = {"mp4": "mp4", "frames": "frames", "npy": "events", "png": "images"}
"""Entry of Clip.files that a live source reads."""


FIRST = ("engine", "quantization", "batch", "attention", "dtype", "temperature", "top_p", "input", "source", "frames")


@dataclass(frozen=True)
class Variant:
    """One combination of settings that a model is timed with."""

    name: str
    """Readable slug and 8 digits over all settings: no two settings share a path."""
    settings: Mapping[str, Any]
    """engine, quantization, batch, attention, dtype, temperature, top_p, input, source, frames (of the clip, or event parts).

    Other keys of the config's `variants` stand here only where they are not the default: they came later and rename no variant.
    """


def digest_of(*parts: Any, size: int = 16) -> str:
    """`size` hex digits of blake2b over the parts' canonical JSON."""
    return hashlib.blake2b(canonical(parts).encode(), digest_size=size // 2).hexdigest()


def origin(clip: Clip, kind: str, source: str = "cache") -> str | None:
    """Which entry of `clip.files` a kind is read from: the live source's own, or the first of ORIGINS. None when the clip has none."""
    files = clip.files
    for name in ORIGINS[kind] if source == "cache" else (LIVE[source],):  # a loop: asked several times for each of a million clips
        if files.get(name):
            return name
    return None


def extraction_spec(config: Config, kind: str, count: int | None = None, sensor: tuple[int, int] | None = None) -> dict[str, Any]:
    """All settings that decide which pixels a model is given, JSON-able.

    Shards are named by it: a key that a later version adds goes in only where it differs from its default.
    count: frames of a clip or event parts, in place of the config's. sensor: (height, width) in pixels of the dataset's event camera.
    """
    if kind == "frames":
        frames = config.frames
        return {
            "kind": "frames",
            "format": SHARD_FORMAT,
            "count": count or frames.count,
            "sampling": frames.sampling,
            "short_clips": frames.short_clips,
            "rotation": frames.rotation,
            "codec": config.cache.codec,
            "resize": config.cache.resize,
        }
    events = config.events
    return {
        "kind": "events",
        "format": SHARD_FORMAT,
        "representation": events.representation,
        "parts": count or events.parts,
        "split": events.split,
        "policy": events.policy,
        "size": events.size,
        "sensor": list(sensor) if sensor else None,
    }


def shard_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a spec that decides a shard's bytes: packed events are rendered when they are loaded, so rendering does not count."""
    if spec.get("representation") == "clip":
        return {key: spec[key] for key in ("kind", "format", "representation")}
    return dict(spec)


def spec_name(spec: Mapping[str, Any]) -> str:
    """A readable word and 8 digits over the spec: the folder of its shards."""
    if spec["kind"] == "frames":
        word = f"{spec['count']}-{spec['sampling']}"
    elif "parts" in spec:
        word = f"{spec['representation']}-{spec['parts']}"
    else:
        word = str(spec["representation"])
    return f"{word}-{digest_of(spec, size=8)}"


def expand_variants(config: Config, kind: str) -> tuple[Variant, ...]:
    """The variants of a model with that input, in the order of the config's axes, without repeats.

    Every list in the `variants` section is an axis; `frames` and `source` take what the input has, all else goes into the settings as is.
    """
    axes = config.variants
    names = [name for name, value in axes if isinstance(value, tuple) and name not in ("frames", "source")]
    fixed = {name: value for name, value in axes if not isinstance(value, tuple)}
    takes = ("cache", "mp4", "frames") if kind == "frames" else ("cache", "npy", "png")
    section: Any = config.frames if kind == "frames" else config.events
    sources = tuple(s for s in axes.source if s in takes) or (section.source,)
    counts = axes.frames or (config.frames.count if kind == "frames" else config.events.parts,)
    variants: dict[str, Variant] = {}
    for *values, count, source in product(*(getattr(axes, name) for name in names), counts, sources):
        settings = {**dict(zip(names, values, strict=True)), **fixed, "input": kind, "source": source, "frames": count}
        unusual = told(settings)
        settings = {key: value for key, value in settings.items() if key in FIRST or key in unusual}
        words = [settings["engine"], *(_word(n, settings[n]) for n in names if n in unusual and n != "engine"), f"{kind}{count}", source]
        name = f"{'-'.join(words)}-{digest_of(unusual, size=8)}"
        variants.setdefault(name, Variant(name, settings))
    return tuple(variants.values())


def told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's settings without defaults: an axis that a later version adds renames no variant and makes no job run again."""
    usual = {name: value[0] if isinstance(value, tuple) and value else value for name, value in VariantsConfig()}
    return {name: value for name, value in settings.items() if name in ("input", "source", "frames") or value != usual.get(name)}


def _word(name: str, value: Any) -> str:
    """One setting in a variant's slug: `int8`, `b4`, `keep0.5`."""
    if isinstance(value, str):
        return value
    return f"b{value}" if name == "batch" else f"{name.partition('_')[0]}{value}"
