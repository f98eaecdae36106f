"""The timed load stage: every source gives the pixels it should, and only verified ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_study import Study, extract, planner, write_mp4
from stagebench.errors import ChecksumError, PlanError, SourceError, StoreError
from stagebench.extract import read_clip
from stagebench.loading import open_loader
from stagebench.plan import Plan, TimingJob


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return planner(tmp_path)


def prepared(study: Study, clips: int = 4, **sections: Any) -> tuple[Plan, Path]:
    plan, cache = study(clips, **sections)
    extract(plan, cache)
    return plan, cache


def job_of(plan: Plan, model: str, source: str = "cache") -> TimingJob:
    return next(job for job in plan.jobs if job.model == model and job.variant.settings["source"] == source)


@pytest.mark.parametrize(("model", "kind"), [("v", "frames"), ("e", "events")])
@pytest.mark.parametrize("representation", ["frames", "voxel", "clip"])
def test_cached_and_live_loads_give_equal_frames(study: Study, model: str, kind: str, representation: str) -> None:
    live = {"frames": "mp4", "events": "npy"}[kind]
    plan, cache = prepared(study, variants={"source": ["cache", "mp4", "npy"]}, events={"representation": representation})
    cached, direct = (open_loader(plan, job_of(plan, model, source), cache=cache) for source in ("cache", live))
    with cached, direct:
        assert cached.verify_ms > 0 and direct.verify_ms > 0
        for clip in ("seq_0/000000", "seq_1/000003"):
            assert cached.status(clip) == direct.status(clip) == ("ok", "")
            one, two = cached.load(clip), direct.load(clip)
            assert len(one) == len(two) == {"frames": 8, "events": 5}[kind]
            for a, b in zip(one, two, strict=True):
                np.testing.assert_array_equal(a, b)
                assert a.dtype == np.uint8 and a.flags.writeable and a.flags.c_contiguous


def test_loads_keep_to_their_slots(study: Study) -> None:
    plan, cache = prepared(study, variants={"batch": [2]})
    with open_loader(plan, job_of(plan, "v"), cache=cache) as loader:
        clips = [f"seq_{i % 2}/{i:06d}" for i in range(4)]
        loads = [loader.load(clip) for clip in clips]
        whole = [read_clip(plan.datasets["d"].root, plan.clip("d", c), "frames", loader.spec).frames for c in clips]
        for got, wanted in zip(loads, whole, strict=True):
            np.testing.assert_array_equal(np.stack(got), np.stack(wanted))
        assert np.shares_memory(loads[0][0], loader.load(clips[1])[0])


def test_a_flipped_bit_stops_the_job_before_any_load(study: Study) -> None:
    plan, cache = prepared(study)
    job = job_of(plan, "v")
    path = cache / f"{job.block.shards[0]}.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=rf"{path.name}: clip seq_"):
        open_loader(plan, job, cache=cache).open()


def test_failed_clips_have_a_status_and_no_pixels(study: Study) -> None:
    plan, cache = study(4, variants={"source": ["cache", "mp4", "frames"]})
    write_mp4(plan.datasets["d"].root / "mp4/seq_1/000001.mp4", 1, frames=3)
    plan, cache = prepared(study, clips=None, variants={"source": ["cache", "mp4", "frames"]})  # type: ignore[arg-type]
    with open_loader(plan, job_of(plan, "v"), cache=cache) as loader:
        status, reason = loader.status("seq_1/000001")
        assert status == "error" and "3 decodable frames, 8 asked for" in reason
        with pytest.raises(SourceError, match="3 decodable frames"):
            loader.load("seq_1/000001")
    with open_loader(plan, job_of(plan, "v", "mp4"), cache=cache) as loader, pytest.raises(SourceError, match="3 decodable frames"):
        loader.load("seq_1/000001")
    with open_loader(plan, job_of(plan, "v", "frames"), cache=cache) as loader:
        assert loader.status("seq_0/000000")[0] == "error"
        with pytest.raises(PlanError, match="not in the plan"):
            loader.status("nobody")


def test_missing_and_mistaken_shards_are_refused(study: Study) -> None:
    plan, cache = prepared(study)
    events, frames = job_of(plan, "e"), job_of(plan, "v")
    path = cache / f"{frames.block.shards[0]}.parquet"
    good = path.read_bytes()
    path.write_bytes((cache / f"{events.block.shards[0]}.parquet").read_bytes())
    with pytest.raises(StoreError, match="holds events"):
        open_loader(plan, frames, cache=cache).open()
    path.unlink()
    with pytest.raises(StoreError, match="cannot be opened"):
        open_loader(plan, frames, cache=cache).open()
    path.write_bytes(good)
    write_mp4(plan.datasets["d"].root / "mp4/seq_0/000002.mp4", 5)
    changed, _ = study()
    other = cache / f"{job_of(changed, 'v').block.shards[0]}.parquet"
    other.write_bytes(good)  # the right name, the wrong content
    with pytest.raises(StoreError, match="seq_0/000002 is made from"):
        open_loader(changed, job_of(changed, "v"), cache=cache).open()
    with pytest.raises(PlanError, match="is not open"):
        open_loader(plan, frames, cache=cache).load("seq_0/000000")


@pytest.mark.parametrize(("model", "source", "file"), [("v", "mp4", "mp4/seq_1/000001.mp4"), ("e", "npy", "event_npy/seq_1/000001.npy")])
def test_a_live_source_that_changed_since_the_planning_is_refused(study: Study, model: str, source: str, file: str) -> None:
    """Else its rows would carry the content digest of a clip that was never timed."""
    plan, cache = study(4, variants={"source": ["mp4", "npy"]})
    job = job_of(plan, model, source)
    path = plan.datasets["d"].root / file
    data = path.read_bytes()
    path.write_bytes(data)  # touched: other times, the same content
    open_loader(plan, job, cache=cache).open()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PlanError, match=rf"seq_1/000001: {file} is not what it was.*plans anew"):
        open_loader(plan, job, cache=cache).open()
    path.unlink()
    with pytest.raises(PlanError, match=r"seq_1/000001.*plans anew"):
        open_loader(plan, job, cache=cache).open()


def _folders(root: Path) -> None:
    """Beside the clips' videos and events, the same as images."""
    index = json.loads((root / "index.json").read_text())
    for entry in index:
        name = entry["mp4_data"].removesuffix(".mp4")
        entry["video_data"], entry["event_image"] = name, [f"{name}_{k}.png" for k in range(5)]
        for path in (
            *(root / f"video/{name}/{k}.png" for k in range(8)),
            *(root / "event_image" / image for image in entry["event_image"]),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((48, 64, 3), 9 * int(path.stem[-1]), np.uint8)).save(path)
    (root / "index.json").write_text(json.dumps(index))


def test_a_proof_reads_what_no_timing_job_of_the_study_does(study: Study) -> None:
    """It reads a clip's first entry, of which a study of images only has no digest."""
    plan, _ = study(2)
    _folders(plan.datasets["d"].root)
    plan, cache = study(variants={"source": ["frames", "png"]})
    for path, source in (("verify/v.json", "mp4"), ("verify/e.json", "npy")):
        job = plan.verify_job(path)
        assert job.variant.settings["source"] == source
        with open_loader(plan, job, cache=cache) as loader:
            assert loader.load("seq_0/000000")


@pytest.mark.parametrize(
    ("model", "source", "file", "named"),
    [
        ("v", "frames", "video/seq_1/000001/3.png", "video/seq_1/000001"),
        ("e", "png", "event_image/seq_1/000001_3.png", "event_image/seq_1/000001_0.png"),
    ],
)
def test_a_folder_of_images_that_changed_since_the_planning_is_refused(
    study: Study, model: str, source: str, file: str, named: str
) -> None:
    plan, _ = study(2)
    root = plan.datasets["d"].root
    _folders(root)
    plan, cache = study(variants={"source": ["frames", "png"]})
    job = job_of(plan, model, source)
    with open_loader(plan, job, cache=cache) as loader:
        assert loader.load("seq_1/000001")[3][0, 0, 0] == 27
    Image.fromarray(np.full((48, 64, 3), 28, np.uint8)).save(root / file)
    with pytest.raises(PlanError, match=f"seq_1/000001: {named} is not what it was"):
        open_loader(plan, job, cache=cache).open()
    (root / file).unlink()
    with pytest.raises(PlanError, match=f"seq_1/000001: {named} is not what it was"):
        open_loader(plan, job, cache=cache).open()


def test_a_live_source_that_was_missing_when_planned_is_a_failed_clip(study: Study) -> None:
    """As before: its sample is a row with an error, and the others go on."""
    plan, _ = study(2)
    (plan.datasets["d"].root / "mp4/seq_1/000001.mp4").unlink()
    plan, cache = study(variants={"source": ["mp4", "npy"]})
    with open_loader(plan, job_of(plan, "v", "mp4"), cache=cache) as loader:
        assert loader.load("seq_0/000000")
        with pytest.raises(SourceError, match="000001.mp4"):
            loader.load("seq_1/000001")
    write_mp4(plan.datasets["d"].root / "mp4/seq_1/000001.mp4", 1)
    with pytest.raises(PlanError, match="plans anew"):
        open_loader(plan, job_of(plan, "v", "mp4"), cache=cache).open()


def test_scratch_copies_are_read_and_removed(study: Study, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    plan, cache = prepared(study, cache={"scratch": str(scratch)})
    job = job_of(plan, "v")
    with open_loader(plan, job, cache=cache) as loader:
        copies = [p for p in scratch.rglob("*.parquet") if p.is_file()]
        assert len(copies) == 1 and loader.scratch_ms > 0
        (cache / f"{job.block.shards[0]}.parquet").unlink()
        loader.load("seq_0/000000")
    assert list(scratch.iterdir()) == []
    with pytest.raises(StoreError, match="cache.scratch"):
        open_loader(plan, job, cache=cache).open()
    assert json.loads(plan.config.model_dump_json())["cache"]["scratch"] == str(scratch)
