"""Where load is read from: the same frames from each source, a row of tables/load for each, and pairs of one kind of source only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clip_study
from factories import config, make_study, table
from stagebench.loading import open_loader
from stagebench.merge import merge
from stagebench.sources.video import read_frames

MODELS = {"eventgpt": {}, "video_llava": {"factor": 2.0}}


def study(results: Path, *sources: str) -> Path:
    """Both models timed from each source: load takes 2, 3, 4, … ms (and twice that for the second model)."""
    asked = [source.partition("+")[0] for source in sources]
    plan = make_study(
        results,
        plan_config=config(variants={"source": asked}),
        models=MODELS,
        variants={f"generate-{n}": {"source": source} for n, source in enumerate(sources)},
        edit=lambda row: row | {"load_ms": row["load_ms"] + sources.index(row["source"])},
        noise=0,
    )
    merge(plan, results)
    return results


@pytest.mark.parametrize("suffix", ["", "+prefetch"])
def test_the_load_table_has_a_row_for_each_model_and_source(tmp_path: Path, suffix: str) -> None:
    results = study(tmp_path, *(name + suffix for name in ("cache", "mp4", "frames", "npy", "png")))
    found = {(row["model"], row["source"]): row for row in table(results, "load")}
    assert set(found) == {(model, name + suffix) for model in MODELS for name in ("cache", "mp4", "frames", "npy", "png")}
    for number, name in enumerate(("cache", "mp4", "frames", "npy", "png")):
        assert found["eventgpt", name + suffix]["median_ms"] == pytest.approx(2 + number)
        assert found["video_llava", name + suffix]["median_ms"] == pytest.approx(4 + number)
        assert found["eventgpt", name + suffix]["n"] == 12


@pytest.mark.parametrize(
    ("sources", "pairs"),
    [
        (("cache", "mp4"), {(0, 0), (1, 1)}),
        (("cache+prefetch", "mp4+prefetch"), {(0, 0), (1, 1)}),
        (("mp4+prefetch", "cache+prefetch"), {(0, 0), (1, 1)}),
        (("cache", "cache+prefetch"), {(0, 0), (1, 1)}),
        (("mp4", "frames"), {(0, 0), (1, 0)}),  # both live: what one kind of input reads is not what the other does
    ],
)
def test_models_are_compared_from_one_kind_of_source(tmp_path: Path, sources: tuple[str, str], pairs: set[tuple[int, int]]) -> None:
    rows = table(study(tmp_path, *sources), "comparison")
    assert {(r["variant"], r["reference_variant"]) for r in rows} == {(f"generate-{a}", f"generate-{b}") for a, b in pairs}


def test_mp4_folder_and_cache_give_the_same_frames(tmp_path: Path) -> None:
    """The folder holds the MP4's frames as PNG, as datasets have it; more than nine, so that _10 comes after _9."""
    plan_of = clip_study.planner(tmp_path)
    plan_of(3)
    root = tmp_path / "data"
    entries = json.loads((root / "index.json").read_text())
    for entry in entries:
        clip = entry["mp4_data"].removesuffix(".mp4")
        folder = root / "video" / clip
        folder.mkdir(parents=True)
        for number, frame in enumerate(read_frames(root / "mp4" / entry["mp4_data"], 12).pixels):
            Image.fromarray(frame).save(folder / f"frame_{number}.png")
        entry["video_data"] = clip
    (root / "index.json").write_text(json.dumps(entries))
    plan, cache = plan_of(None, variants={"source": ["cache", "mp4", "frames", "npy"]})
    clip_study.extract(plan, cache)
    jobs = {job.variant.settings["source"]: job for job in plan.jobs if job.model == "v"}
    assert set(jobs) == {"cache", "mp4", "frames"}
    loads: dict[str, list[list[np.ndarray]]] = {}
    for source, job in jobs.items():
        with open_loader(plan, job, cache=cache, slots=3) as loader:
            loads[source] = [[frame.copy() for frame in loader.load(clip)] for clip in ("seq_0/000000", "seq_1/000001", "seq_0/000002")]
    for source in ("mp4", "frames"):
        for live, cached in zip(loads[source], loads["cache"], strict=True):
            assert len(live) == 8
            np.testing.assert_array_equal(np.stack(live), np.stack(cached))
