"""What the models were shown and what they said, for a few samples."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.merge.groups import CAPPED_POOL, Group
from stagebench.thumbnails import FILE

__all__ = ["answers"]

log = logging.getLogger(__name__)

SHOWN_SAMPLES = 4
_KINDS = {"frames": "video frame", "events": "event frame"}


def answers(found: Sequence[Group], results: Path) -> list[dict[str, Any]]:
    """Samples with their pictures (where the study kept some) and each model's answer, as the template takes them."""
    pictures = _pictures(results / FILE)
    best: dict[tuple[str, str, str], Group] = {}
    for group in found:
        key = (group.dataset, group.model, group.variant)
        natural = group.length in ("natural", CAPPED_POOL)
        if group.n and (key not in best or (natural and best[key].length != "natural")):
            best[key] = group
    samples = _choose(list(best.values()), pictures)
    said: dict[str, dict[str, Any]] = {
        s: {"sample": s, "query": "", "said": [], "pictures": [p for (sample, _), p in pictures.items() if sample == s]} for s in samples
    }
    several = {m for _, m, v in best if sum(1 for _, other, _ in best if other == m) > 1}
    for group in best.values():
        wanted = group.typical.filter(pl.col("sample").is_in(samples)).select("sample", "repeat").lazy()
        rows = group.rows(results / "timings.parquet").select("sample", "repeat", "query", "text", "new_tokens")
        for row in wanted.join(rows, on=["sample", "repeat"], how="inner").sort("sample").collect().to_dicts():
            said[row["sample"]]["query"] = row["query"]
            answer = {"model": group.model, "text": (row["text"] or "").strip(), "tokens": row["new_tokens"]}
            _add(said[row["sample"]]["said"], answer, group.variant if group.model in several else "")
    return [entry for entry in said.values() if entry["said"]]


def _add(said: list[dict[str, Any]], answer: dict[str, Any], variant: str) -> None:
    """Variants of a model that say the same stand together."""
    for known in said:
        if answer.items() <= known.items():
            known["variants"].append(variant)
            return
    said.append({**answer, "variants": [variant] if variant else []})


def _choose(found: Sequence[Group], pictures: dict[tuple[str, str], Any]) -> list[str]:
    """Those with pictures first, then the first ones."""
    known = {s for group in found for s in group.typical["sample"]}
    shown = [s for s in dict.fromkeys(sample for sample, _ in pictures) if s in known]
    others = sorted({s for group in found for s in group.typical["sample"].head(SHOWN_SAMPLES)})
    return list(dict.fromkeys([*shown, *others]))[:SHOWN_SAMPLES]


def _pictures(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(sample, kind) -> its strip of pictures, as data: URIs."""
    if not path.is_file():
        return {}
    try:
        rows = pq.read_table(path, partitioning=None).to_pylist()
    except (OSError, pa.ArrowException) as error:
        log.warning("%s: not readable, the report has no pictures (%s)", path, error)
        return {}
    strips: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: (r["sample"], r["kind"] != "frames", r["position"])):
        name = _KINDS.get(row["kind"], row["kind"])
        strip = strips.setdefault((row["sample"], row["kind"]), {"kind": name, "images": []})
        image = {"src": f"data:image/{row['format']};base64,{base64.b64encode(row['image']).decode()}"}
        image |= {"width": row["width"], "height": row["height"], "alt": f"{name} {row['position'] + 1} of {row['frames']}"}
        strip["images"].append(image)
    return strips
