"""A few samples' pixels, small, for the report: `<results>/samples.parquet`, from the shards that the models were timed on.

Not part of any number: a study without them has a report without pictures.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.errors import MergeError, StagebenchError
from stagebench.files import whole_file

if TYPE_CHECKING:
    from stagebench.plan import Plan

__all__ = ["FILE", "write_samples"]

log = logging.getLogger(__name__)

FILE = "samples.parquet"
SAMPLES = 4
FRAMES = 4
"""Of each kind, evenly over a clip."""
WIDTH = 168
"""Pixels: 4 samples with 8 pictures stay near 150 kB."""

_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("dataset", "sample", "clip", "kind")),
        *((name, pa.int32()) for name in ("position", "frames", "width", "height")),
        ("format", pa.string()),
        ("image", pa.binary()),
    ]
)
"""A row a picture. position: of the clip's `frames` frames, from 0. image: the bytes of a PNG or JPEG."""


def write_samples(plan: Plan, results: Path, cache: Path) -> Path | None:
    """Write the pictures of up to `SAMPLES` accepted samples of each dataset, of different sequences where there are several.

    None, and no file, when no shard can be read; what could not be read is logged.
    """
    rows: list[dict[str, Any]] = []
    for dataset, samples in _choose(results / "timings.parquet").items():
        wanted = {sample.rpartition("#")[0]: sample for sample in samples}
        for shard in plan.shards:
            if shard.dataset != dataset or not (mine := wanted.keys() & set(shard.clips)):
                continue
            try:
                rows += _pictures(shard.path(cache), shard.kind, dataset, {clip: wanted[clip] for clip in mine})
            except StagebenchError as error:
                log.warning("no pictures from %s: %s", shard.name, error)
    path = results / FILE
    if not rows:
        path.unlink(missing_ok=True)
        return None
    rows.sort(key=lambda r: (r["dataset"], r["sample"], r["kind"], r["position"]))
    # two specs of one kind (another number of frames) show the same clip: the first is enough
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        seen.setdefault(tuple(row[k] for k in ("dataset", "sample", "kind", "position")), row)
    with whole_file(path, MergeError) as temporary:
        pq.write_table(pa.Table.from_pylist(list(seen.values()), schema=_SCHEMA), temporary, compression="none")
    return path


def _choose(timings: Path) -> dict[str, list[str]]:
    """Dataset -> the first accepted sample of each of its first sequences, then further ones until there are enough."""
    rows = (
        pl.scan_parquet(timings)
        .filter(pl.col("status").is_in(["ok", "capped"]))
        .select("dataset", "sequence", "sample")
        .unique()
        .sort("dataset", "sequence", "sample")
        .collect()
    )
    found: dict[str, list[str]] = {}
    for (dataset,), mine in rows.group_by("dataset", maintain_order=True):
        firsts = mine.group_by("sequence", maintain_order=True).agg(pl.col("sample").first())["sample"]
        found[str(dataset)] = list(dict.fromkeys([*firsts, *mine["sample"]]))[:SAMPLES]
    return found


def _pictures(path: Path, kind: str, dataset: str, clips: dict[str, str]) -> Iterator[dict[str, Any]]:
    from stagebench.store import Shard

    with Shard.open(path, verify=False) as shard:
        for clip, sample in sorted(clips.items()):
            if shard.row(clip).status != "ok":
                continue
            frames = shard.frames(clip)
            for position in _spread(len(frames)):
                picture = {"dataset": dataset, "sample": sample, "clip": clip, "kind": kind, "position": position, "frames": len(frames)}
                yield picture | _small(frames[position], kind)


def _spread(count: int) -> Sequence[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, FRAMES))})


def _small(pixels: np.ndarray, kind: str) -> dict[str, Any]:
    """uint8 [H, W, 3] at WIDTH: event frames as PNG (few colours), video as JPEG."""
    from PIL import Image

    height, width = pixels.shape[:2]
    size = (min(WIDTH, width), max(1, round(height * min(WIDTH, width) / width)))
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BOX)
    buffer = io.BytesIO()
    if kind == "events":
        image.quantize(16).save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=72)
    return {"width": size[0], "height": size[1], "format": "png" if kind == "events" else "jpeg", "image": buffer.getvalue()}
