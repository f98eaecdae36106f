"""What a change of a dataset runs again: 64 clips in one shard, each reread counted at the one place where clips are read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clip_study import extract, write_mp4
from stagebench import extract as module
from stagebench.config import load_config
from stagebench.plan import Plan, build_plan
from stagebench.store import Shard

CLIPS = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 small MP4s of different content (one encoded clip, each with a `free` box of its own) and their index."""
    root = tmp_path_factory.mktemp("made")
    (root / "mp4/seq").mkdir(parents=True)
    write_mp4(root / "one.mp4", 1)
    data = (root / "one.mp4").read_bytes()
    entries = []
    for number in range(CLIPS):
        (root / f"mp4/seq/{number:06d}.mp4").write_bytes(data + (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big"))
        turn = {"from": "human", "value": "What is there?"}
        entries.append({"id": str(number), "mp4_data": f"seq/{number:06d}.mp4", "conversations": [turn]})
    (root / "index.json").write_text(json.dumps(entries))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the clips that are decoded from now on."""
    seen: list[str] = []
    read: Callable[..., object] = module.read_row

    def counting(root: Path, clip: object, *rest: object) -> object:
        seen.append(clip.key)  # type: ignore[attr-defined]
        return read(root, clip, *rest)

    monkeypatch.setattr(module, "read_row", counting)
    return seen


def run(root: Path, cache: Path) -> Plan:
    """Plan, and extract the shards that are not there, as Snakemake does."""
    model = {"adapter": "hf", "architecture": "video_llava", "input": "frames", "weights": "dummy:0", "preset": "tiny"}
    dataset = {"root": str(root), "index": "index.json"}
    plan = build_plan(load_config({"study": "t", "datasets": {"d": dataset}, "models": {"v": model}}), cache)
    extract(plan, cache, threads=2)
    return plan


def test_one_of_64_videos_changes_and_one_is_decoded(root: Path, tmp_path: Path, decoded: list[str]) -> None:
    cache = tmp_path / "cache"
    (first,) = run(root, cache).shards
    assert sorted(decoded) == [f"seq/{n:06d}" for n in range(CLIPS)]
    changed = root / "mp4/seq/000017.mp4"
    original = changed.read_bytes()

    decoded.clear()
    write_mp4(changed, 2)
    (second,) = run(root, cache).shards
    assert decoded == ["seq/000017"]
    assert second.bucket == first.bucket and second.digest != first.digest
    with Shard.open(first.path(cache)) as old, Shard.open(second.path(cache)) as new:
        assert new.clips == old.clips
        same = {key for key in new.clips if np.array_equal(np.stack(new.frames(key)), np.stack(old.frames(key)))}
    assert set(second.clips) - same == {"seq/000017"}

    decoded.clear()
    changed.write_bytes(original)  # reverted: its old shard is there
    assert [s.name for s in run(root, cache).shards] == [first.name]
    assert decoded == []


def test_a_touched_and_a_copied_dataset_decodes_nothing(root: Path, tmp_path: Path, decoded: list[str]) -> None:
    cache = tmp_path / "cache"
    names = [s.name for s in run(root, cache).shards]
    decoded.clear()
    for path in root.rglob("*.mp4"):
        os.utime(path)
    assert [s.name for s in run(root, cache).shards] == names
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(root, elsewhere)
    assert [s.name for s in run(elsewhere, cache).shards] == names
    assert decoded == []


def test_a_new_clip_decodes_one_and_a_removed_one_none(root: Path, tmp_path: Path, decoded: list[str]) -> None:
    cache, index = tmp_path / "cache", root / "index.json"
    entries = json.loads(index.read_text())
    index.write_text(json.dumps(entries[:-1]))
    run(root, cache)
    decoded.clear()
    index.write_text(json.dumps(entries))
    run(root, cache)
    assert decoded == [f"seq/{CLIPS - 1:06d}"]
    decoded.clear()
    index.write_text(json.dumps(entries[1:-1]))
    run(root, cache)
    assert decoded == []
