"""cache: what the store holds, a shard whose bytes changed, shards that no study names; by the commands that a person types."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clip_study import extracted
from stagebench import cache, cli
from stagebench.config import load_config
from stagebench.demo import write_demo
from stagebench.errors import StoreError


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two real shards of two clips, registered by a study."""
    write_demo(tmp_path / "demo", clips=2, seconds=0.5, size=(64, 96))
    models = {name: {"adapter": "hf", "input": name, "weights": "dummy:0", "preset": "tiny"} for name in ("frames", "events")}
    study = {
        "study": "s",
        "datasets": {"d": {"root": str(tmp_path / "demo"), "sensor": [64, 96]}},
        "frames": {"count": 2},
        "models": models,
    }
    extracted(load_config(study), tmp_path / "cache").write(tmp_path / "results/plan.json")
    return tmp_path / "cache"


def call(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["cache", *words])
    return done.exit_code, done.output


def test_a_flipped_bit_is_found_and_named(store: Path) -> None:
    status, text = call("verify", "--cache-dir", str(store))
    assert status == 0 and "2 shards are as they were written, 0 are not" in text
    path = next(iter((store / "frames").glob("*/*.parquet")))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    status, text = call("verify", "--cache-dir", str(store))
    assert status == 1 and text.count("FAIL") == 1 and text.count(str(path)) == 1
    assert "changed since they were written" in text and "Delete the file" in text
    assert "1 shards are as they were written, 1 are not" in text


def test_what_no_study_names_is_said_and_goes(store: Path) -> None:
    (registration,) = (store / "studies").glob("*.json")
    content = json.loads(registration.read_text())
    registration.write_text(json.dumps({**content, "shards": [n for n in content["shards"] if n.startswith("frames/")]}))
    status, text = call("ls", "--cache-dir", str(store))
    assert status == 0 and "2 shards" in text and "1 that no study names" in text
    assert "1 shards would be removed" in call("prune", "--dry-run", "--cache-dir", str(store))[1]
    assert len(list(store.glob("*/*/*.parquet"))) == 2
    assert "1 shards removed" in call("prune", "--cache-dir", str(store))[1]
    assert [p.parent.parent.name for p in store.glob("*/*/*.parquet")] == ["frames"]
    assert "no study names" not in call("ls", "--cache-dir", str(store))[1]


def test_nothing_is_removed_where_no_study_is_registered(store: Path) -> None:
    for path in (store / "studies").glob("*.json"):
        path.unlink()
    with pytest.raises(StoreError, match="no study is registered"):
        cache.prune(store)
    assert len(list(store.glob("*/*/*.parquet"))) == 2


@pytest.mark.parametrize("call", [cache.usage, cache.prune, lambda folder: list(cache.check(folder))])
def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path, call) -> None:
    with pytest.raises(StoreError, match="no such folder.*--cache-dir"):
        call(tmp_path / "nowhere")
