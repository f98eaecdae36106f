"""The demo dataset: the published layout, the same bytes each time, nothing half-written."""

import hashlib

import av
import numpy as np
import pytest

from stagebench.config import DatasetConfig
from stagebench.dataset import load_dataset
from stagebench.demo import INDEX, write_demo
from stagebench.demo import dataset as demo
from stagebench.demo.scene import EventCamera, Scene
from stagebench.errors import ConfigError, DatasetError
from stagebench.sources.events import read_events

SMALL = {"clips": 3, "seconds": 0.3, "size": (96, 128)}


def state(root, *, times=False):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(f.relative_to(root)): f.stat().st_mtime_ns if times else hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    write_demo(root, **SMALL)
    return root


def test_layout(made):
    dataset = load_dataset("demo", DatasetConfig(root=str(made)))
    assert [s.clip for s in dataset.samples] == ["demo_00_a/000000", "demo_00_a/000001", "demo_01_a/000000"]
    assert {c.sequence for c in dataset.clips.values()} == {"demo_00_a", "demo_01_a"}
    for clip in dataset.clips.values():
        source = np.load(made / clip.files["events"], allow_pickle=True)
        assert source.shape == () and list(source.item()) == ["p", "t", "x", "y"]
        assert [source.item()[k].dtype for k in "ptxy"] == [np.uint8, np.int64, np.uint16, np.uint16]
        events = read_events(made / clip.files["events"])
        assert len(events) > 1000 and 0.2 < events.p.mean() < 0.8
        assert events.t0 > 2**32 and int(events.t[-1]) - events.t0 < 300_000
        assert events.x.max() < 128 and events.y.max() < 96
    first, second = (read_events(made / "event_npy" / "demo_00_a" / f"00000{i}.npy") for i in (0, 1))
    assert 0 < second.t0 - first.t[-1] < 20_000, "clips of a sequence follow each other"


def test_video(made):
    with av.open(str(made / "mp4" / "demo_00_a" / "000000.mp4")) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, stream.average_rate, len(frames)) == ("h264", 20, 6)
        assert (frames[0].format.name, frames[0].width, frames[0].height) == ("yuv420p", 128, 96)
        assert any(int(frame.pict_type) == 3 for frame in frames), "no B-frames"
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in frames]
    drawn = Scene((0, 0), (96, 128)).rgb(0.0).astype(int)
    assert np.abs(pictures[0] - drawn).mean() < 8 and np.abs(pictures[0] - pictures[5]).mean() > 1


def test_same_bytes_and_nothing_twice(made, tmp_path):
    write_demo(tmp_path / "again", **SMALL)
    assert state(tmp_path / "again") == state(made)
    before = state(made, times=True)
    write_demo(made, **SMALL)
    assert state(made, times=True) == before


def test_grows_without_touching_what_is_there(made, tmp_path):
    write_demo(tmp_path, **{**SMALL, "clips": 1})
    before = state(tmp_path, times=True)
    write_demo(tmp_path, **SMALL)
    assert state(tmp_path) == state(made)
    after = state(tmp_path, times=True)
    assert all(after[name] == before[name] for name in before if name != INDEX)


def test_missing_file_is_made_again(made, tmp_path):
    write_demo(tmp_path, **SMALL)
    before = state(tmp_path, times=True)
    lost = "mp4/demo_00_a/000001.mp4"
    (tmp_path / lost).unlink()
    write_demo(tmp_path, **SMALL)
    assert state(tmp_path) == state(made)
    assert {name for name, at in state(tmp_path, times=True).items() if at != before[name]} == {lost}


def test_other_parameters_replace_all(tmp_path):
    write_demo(tmp_path, **SMALL)
    before = state(tmp_path)
    write_demo(tmp_path, **{**SMALL, "clips": 1, "seed": 1})
    after = state(tmp_path)
    assert len(after) == 4 and all(after[name] != before[name] for name in after)


def test_interrupted_writing_leaves_no_index_and_no_scrap(tmp_path, made, monkeypatch):
    def fail(handle, *_, **__):
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo.np, "save", fail)
    with pytest.raises(DatasetError, match="No space"):
        write_demo(tmp_path, **SMALL)
    left = set(state(tmp_path))
    assert left == {"demo.json", "mp4/demo_00_a/000000.mp4"}
    monkeypatch.undo()
    write_demo(tmp_path, **SMALL)
    assert state(tmp_path) == state(made)


def test_somebody_elses_dataset_is_left_alone(tmp_path):
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(DatasetError, match="Choose another folder"):
        write_demo(tmp_path, **SMALL)
    assert set(state(tmp_path)) == {INDEX}


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"seconds": 0.01}, {"size": (95, 128)}, {"size": (16, 16)}])
def test_impossible_parameters(tmp_path, wrong):
    with pytest.raises(ConfigError, match="expected"):
        write_demo(tmp_path, **{**SMALL, **wrong})
    assert not list(tmp_path.iterdir())


def test_event_camera_counts_crossings():
    """A pixel that brightens by a known factor gives log(factor) / threshold events, evenly in time for an even change of log intensity."""
    first = np.full((1, 2), 400, np.uint16)
    camera = EventCamera(first, np.random.default_rng(0), threshold=0.1, noise_hz=0)
    second = np.array([[400, 1600]], np.uint16)
    events = camera.step(second, 10_000)
    assert set(events["x"].tolist()) == {1} and set(events["p"].tolist()) == {1}
    expected = np.log(4) / 0.1
    assert abs(len(events["t"]) - expected) <= 1
    assert (np.diff(events["t"].astype(int)) > 0).all()
    assert np.allclose(np.diff(events["t"].astype(int)), 10_000 / expected, rtol=0.02, atol=2)
    back = camera.step(first, 10_000)
    assert set(back["p"].tolist()) == {0} and abs(len(back["t"]) - expected) <= 1
    assert len(camera.step(first, 10_000)["t"]) == 0


def test_event_camera_noise_is_rare_and_everywhere():
    camera = EventCamera(np.full((50, 50), 900, np.uint16), np.random.default_rng(0), noise_hz=10)
    events = [camera.step(np.full((50, 50), 900, np.uint16), 10_000) for _ in range(100)]
    count = sum(len(e["t"]) for e in events)
    assert 24_000 < count < 26_000
