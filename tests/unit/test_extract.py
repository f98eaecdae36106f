"""Extraction: rows as the live reader gives them, failed clips as rows, unchanged clips taken over."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_study import Study, planner, write_events, write_mp4
from stagebench import _reading
from stagebench import extract as module
from stagebench.config import load_config
from stagebench.errors import PlanError, StoreError
from stagebench.extract import extract_shard, failures_allowed, read_clip
from stagebench.plan import Plan, build_plan
from stagebench.sources.events import read_events, to_source_dict
from stagebench.store import Shard


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return planner(tmp_path)


def extract(plan: Plan, cache: Path, kind: str, **how: Any) -> list[module.ExtractReport]:
    return [extract_shard(plan, s, s.path(cache), cache=cache, **how) for s in plan.shards if s.kind == kind and not s.path(cache).exists()]


def shard_of(plan: Plan, cache: Path, kind: str) -> Shard:
    (shard,) = [s for s in plan.shards if s.kind == kind]
    return Shard.open(shard.path(cache))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("representation", ["frames", "voxel"])
def test_what_a_shard_gives_is_what_the_live_reader_gives(study: Study, threads: int, representation: str) -> None:
    plan, cache = study(5, events={"representation": representation})
    for kind in ("frames", "events"):
        (report,) = extract(plan, cache, kind, threads=threads)
        assert (report.decoded, report.carried, report.failed) == (5, 0, {})
        (planned,) = [s for s in plan.shards if s.kind == kind]
        with shard_of(plan, cache, kind) as shard:
            assert shard.clips == tuple(planned.clips)
            for key in shard.clips:
                live = read_clip(plan.datasets["d"].root, plan.clip("d", key), kind, plan.specs[planned.spec_id])
                np.testing.assert_array_equal(np.stack(shard.frames(key)), np.stack(live.frames))
                assert shard.row(key).indices == tuple(live.indices)
                assert shard.row(key).pts == tuple(live.pts)
                assert shard.digests[key] == plan.source_digest("d", key, kind)


def test_the_events_themselves_are_kept_exactly(study: Study) -> None:
    plan, cache = study(2, events={"representation": "clip"})
    extract(plan, cache, "events")
    with shard_of(plan, cache, "events") as shard:
        for key in shard.clips:
            wanted = np.load(plan.datasets["d"].root / f"event_npy/{key}.npy", allow_pickle=True).item()
            got = to_source_dict(shard.events(key))
            for name, array in wanted.items():
                np.testing.assert_array_equal(got[name], array)
                assert got[name].dtype == array.dtype


def test_real_clips_take_less_than_2_8_bytes_an_event_and_come_back_exactly(real_data: Path, tmp_path: Path) -> None:
    config = {
        "study": "real",
        "datasets": {"real": {"root": str(real_data / "real"), "sensor": [480, 640]}},
        "events": {"representation": "clip"},
        "models": {"e": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"}},
    }
    plan = build_plan(load_config(config), tmp_path)
    (report,) = extract(plan, tmp_path, "events")
    with shard_of(plan, tmp_path, "events") as shard:
        total = sum(shard.row(key).n_events or 0 for key in shard.clips)
        for key in shard.clips:
            source = to_source_dict(read_events(real_data / "real" / plan.clip("real", key).files["events"]))
            got = to_source_dict(shard.events(key))
            for name, array in source.items():
                np.testing.assert_array_equal(got[name], array)
                assert got[name].dtype == array.dtype
    assert report.bytes / total < 2.8


def test_real_videos_of_differing_sizes_share_a_shard(real_data: Path, tmp_path: Path) -> None:
    config = {
        "study": "real",
        "datasets": {"real": {"root": str(real_data / "real")}},
        "frames": {"count": 2},
        "models": {"v": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"}},
    }
    plan = build_plan(load_config(config), tmp_path)
    (report,) = extract(plan, tmp_path, "frames", threads=2)
    assert (report.decoded, report.failed) == (4, {})
    with shard_of(plan, tmp_path, "frames") as shard:
        for key in shard.clips:
            live = read_clip(plan.datasets["real"].root, plan.clip("real", key), "frames", shard.spec)
            np.testing.assert_array_equal(np.stack(shard.frames(key)), np.stack(live.frames))
        assert len({shard.row(key).sizes[0] for key in shard.clips}) == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_failed_clips_are_rows_with_their_reason(study: Study, threads: int) -> None:
    plan, cache = study(4)
    root = plan.datasets["d"].root
    (root / "mp4/seq_0/000000.mp4").write_bytes(b"")
    write_mp4(root / "mp4/seq_1/000001.mp4", 1, frames=5)
    (root / "mp4/seq_0/000002.mp4").unlink()
    plan, _ = study(shards={"max_failed": 0.7})
    (report,) = extract(plan, cache, "frames", threads=threads)
    assert (report.decoded, len(report.failed)) == (1, 3)
    with shard_of(plan, cache, "frames") as shard:
        assert shard.row("seq_1/000003").ok
        assert "5 decodable frames, 8 asked for" in shard.row("seq_1/000001").reason
        assert "empty" in shard.row("seq_0/000000").reason
        assert "cannot be read" in shard.row("seq_0/000002").reason
    assert "3 failed" in str(report)


def test_too_many_failures_fail_the_job_and_leave_nothing(study: Study) -> None:
    plan, cache = study(4)
    for i in range(2):
        (plan.datasets["d"].root / f"mp4/seq_{i}/{i:06d}.mp4").write_bytes(b"garbage")
    plan, _ = study()
    with pytest.raises(StoreError, match=r"2 of 4 clips failed, 1 allowed(.|\n)*seq_0/000000: (.|\n)*raise shards.max_failed"):
        extract(plan, cache, "frames")
    assert not list(cache.glob("frames/*/*"))


@pytest.mark.parametrize(
    ("share", "clips", "allowed"), [(0.05, 1, 1), (0.05, 2, 1), (0.05, 20, 1), (0.05, 21, 2), (0.05, 64, 4), (0, 64, 0), (1, 5, 5)]
)
def test_failures_allowed(share: float, clips: int, allowed: int) -> None:
    assert failures_allowed(share, clips) == allowed


def test_a_clip_without_such_a_file_is_a_failed_row(study: Study) -> None:
    plan, cache = study(3)
    index = plan.datasets["d"].root / "index.json"
    entries = json.loads(index.read_text())
    del entries[1]["event_data"]
    index.write_text(json.dumps(entries))
    plan, cache = study()
    (report,) = extract(plan, cache, "events")
    assert "nothing to read events from" in report.failed["seq_1/000001"]


def test_changing_one_of_many_clips_decodes_one(study: Study) -> None:
    plan, cache = study(9)
    extract(plan, cache, "frames")
    extract(plan, cache, "events")
    before = shard_of(plan, cache, "frames")
    write_mp4(plan.datasets["d"].root / "mp4/seq_1/000003.mp4", 77)
    plan, _ = study()
    (report,) = extract(plan, cache, "frames", threads=2)
    assert (report.decoded, report.carried) == (1, 8)
    assert extract(plan, cache, "events") == []
    with before, shard_of(plan, cache, "frames") as after:
        for key in after.clips:
            same = np.array_equal(np.stack(before.frames(key)), np.stack(after.frames(key)))
            assert same is (key != "seq_1/000003")
            live = read_clip(plan.datasets["d"].root, plan.clip("d", key), "frames", after.spec)
            if key == "seq_1/000003":
                np.testing.assert_array_equal(np.stack(after.frames(key)), np.stack(live.frames))


def test_a_leaf_that_splits_takes_its_rows_along(study: Study) -> None:
    plan, cache = study(8, shards={"max_clips": 8})
    extract(plan, cache, "frames")
    plan, _ = study(9, shards={"max_clips": 8})
    reports = extract(plan, cache, "frames")
    assert len(reports) > 1
    assert (sum(r.decoded for r in reports), sum(r.carried for r in reports)) == (1, 8)
    plan, _ = study(8, shards={"max_clips": 8, "max_failed": 0.5})
    for path in cache.glob("frames/*/root-*"):
        path.unlink()
    (report,) = extract(plan, cache, "frames")  # and a leaf that its children join again
    assert (report.decoded, report.carried) == (0, 8)


def test_a_damaged_earlier_row_is_decoded_again(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    plan, cache = study(4)
    extract(plan, cache, "frames")
    (old,) = [s.path(cache) for s in plan.shards if s.kind == "frames"]
    with Shard.open(old) as shard:
        at = shard._plain["seq_0/000002"] + 100
    data = bytearray(old.read_bytes())
    data[at] ^= 4
    old.write_bytes(data)
    write_mp4(plan.datasets["d"].root / "mp4/seq_0/000000.mp4", 77)
    plan, _ = study()
    (report,) = extract(plan, cache, "frames")
    assert (report.decoded, report.carried) == (2, 2)
    assert "seq_0/000002" in caplog.text
    with shard_of(plan, cache, "frames") as shard:
        live = read_clip(plan.datasets["d"].root, plan.clip("d", "seq_0/000002"), "frames", shard.spec)
        np.testing.assert_array_equal(np.stack(shard.frames("seq_0/000002")), np.stack(live.frames))


def test_earlier_rows_on_a_failing_disk_are_decoded_again(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    plan, cache = study(4)
    extract(plan, cache, "frames")
    write_mp4(plan.datasets["d"].root / "mp4/seq_0/000000.mp4", 77)
    plan, _ = study()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        (report,) = extract(plan, cache, "frames")
    assert (report.decoded, report.carried) == (4, 0)
    assert "Input/output error" in caplog.text


def test_failed_rows_are_tried_again_and_other_specs_are_not_taken(study: Study) -> None:
    plan, cache = study(4)
    (plan.datasets["d"].root / "mp4/seq_0/000000.mp4").write_bytes(b"garbage")
    plan, _ = study()
    extract(plan, cache, "frames")
    plan, _ = study(frames={"count": 4})
    (report,) = extract(plan, cache, "frames")
    assert (report.decoded, report.carried) == (3, 0)
    write_mp4(plan.datasets["d"].root / "mp4/seq_0/000000.mp4", 0)
    plan, _ = study()
    (report,) = extract(plan, cache, "frames")
    assert (report.decoded, report.carried) == (1, 3)


@pytest.mark.parametrize("kind", ["frames", "events"])
def test_a_file_that_changed_after_planning_is_no_part_of_the_shard(study: Study, kind: str) -> None:
    plan, cache = study(3)
    root = plan.datasets["d"].root
    write_mp4(root / "mp4/seq_1/000001.mp4", 9)
    write_events(root / "event_npy/seq_1/000001.npy", 9)
    with pytest.raises(PlanError, match="seq_1/000001.*when the study was planned"):
        extract(plan, cache, kind)
    assert not list(cache.glob(f"{kind}/*/*"))


def test_touched_and_copied_files_are_the_same(study: Study) -> None:
    plan, cache = study(3)
    extract(plan, cache, "frames")
    for path in (plan.datasets["d"].root / "mp4").rglob("*.mp4"):
        shutil.copyfile(path, path.with_suffix(".copy"))
        path.with_suffix(".copy").replace(path)
        os.utime(path)
    plan, _ = study()
    assert extract(plan, cache, "frames") == []


def test_a_passing_fault_fails_the_job_and_a_library_fault_the_clip(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, cache = study(4)
    real = module.read_row

    def faulty(root: Path, clip: Any, *rest: Any) -> Any:
        if clip.key.endswith("2"):
            raise fault
        return real(root, clip, *rest)

    monkeypatch.setattr(module, "read_row", faulty)
    fault: Exception = OSError(5, "Input/output error")
    with pytest.raises(StoreError, match=r"seq_0/000002.*Input/output error.*run again"):
        extract(plan, cache, "frames", threads=2)
    fault = ZeroDivisionError("division by zero")
    (report,) = extract(plan, cache, "frames", threads=2)
    assert report.failed == {"seq_0/000002": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_a_few_clips_whatever_the_shard(study: Study, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    plan, cache = study(24, shards={"max_clips": 64})
    size = 4 << 20
    held = peak = 0
    lock = threading.Lock()
    real = module.read_row

    def big(root: Path, clip: Any, kind: str, spec: Any, digest: str) -> Any:
        nonlocal held, peak
        with lock:
            held += 1
            peak = max(peak, held)
        time.sleep(0.01)
        return module.ClipRow.from_frames(clip.key, digest, np.zeros((1, 1, size // 3, 3), np.uint8))

    def add(self: Any, row: Any) -> None:
        nonlocal held
        real_add(self, row)
        with lock:
            held -= 1

    real_add = module.ShardWriter.add
    monkeypatch.setattr(module, "read_row", big)
    monkeypatch.setattr(module.ShardWriter, "add", add)
    gc.collect()
    tracemalloc.start()
    try:
        extract(plan, cache, "frames", threads=threads)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert real is not big
    assert peak <= threads + 3
    assert most < (threads + 5) * size


def test_progress_counts_clips(study: Study) -> None:
    plan, cache = study(3)
    seen: list[tuple[int, int]] = []
    extract(plan, cache, "frames", progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_resize_and_codec(study: Study, codec: str) -> None:
    plan, cache = study(2, cache={"codec": codec, "resize": 24})
    extract(plan, cache, "frames")
    with shard_of(plan, cache, "frames") as shard:
        key = shard.clips[0]
        assert shard.row(key).sizes == ((24, 32),) * 8
        clip, root = plan.clip("d", key), plan.datasets["d"].root
        whole = read_clip(root, clip, "frames", shard.spec, "mp4")
        assert whole.frames[0].shape == (48, 64, 3)
        wanted = np.asarray(Image.fromarray(whole.frames[3]).resize((32, 24), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(shard.frames(key)[3], wanted)
        np.testing.assert_array_equal(np.stack(shard.frames(key)), np.stack(read_clip(root, clip, "frames", shard.spec, "cache").frames))


@pytest.mark.parametrize("colours", ["ours", "others"])
def test_png_event_images_are_stored_as_they_are(study: Study, colours: str) -> None:
    plan, cache = study(2)
    root = plan.datasets["d"].root
    rng = np.random.default_rng(0)
    palette = np.array([[255, 255, 255], [0, 0, 255], [255, 0, 0]], np.uint8)
    entries = json.loads((root / "index.json").read_text())
    images = {}
    for entry in entries:
        name = entry.pop("event_data").removesuffix(".npy")
        entry["event_image"] = [f"{name}_{i}.png" for i in range(5)]
        for path in entry["event_image"]:
            full = root / "event_image" / path
            full.parent.mkdir(parents=True, exist_ok=True)
            images[path] = palette[rng.integers(0, 3, (20, 30))] if colours == "ours" else rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(images[path]).save(full)
    (root / "index.json").write_text(json.dumps(entries))
    plan, cache = study()
    extract(plan, cache, "events")
    with shard_of(plan, cache, "events") as shard:
        assert shard.row(shard.clips[0]).encoding == ("codes2" if colours == "ours" else "rgb8")
        for entry, key in zip(entries, shard.clips, strict=True):
            np.testing.assert_array_equal(np.stack(shard.frames(key)), np.stack([images[p] for p in entry["event_image"]]))
    plan, cache = study(events={"parts": 4}, shards={"max_failed": 1})
    (report,) = extract(plan, cache, "events")
    assert all("5 event images, 4 parts asked for. Set events.parts: 5" in reason for reason in report.failed.values())
    assert len(report.failed) == 2


def test_colours_are_recognised_exactly() -> None:
    image = np.array([[[255, 255, 255], [0, 0, 255], [255, 0, 0]]], np.uint8)
    np.testing.assert_array_equal(_reading._codes(image), [[0, 1, 2]])  # type: ignore[arg-type]
    image[0, 1, 1] = 1
    assert _reading._codes(image) is None
