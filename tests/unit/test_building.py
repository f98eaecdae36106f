"""building: datasets cut from DSEC recordings and from videos; whole clips only, and a call that goes on."""

import errno
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from attacks.h5_files import recording
from stagebench.building import from_dsec, from_video, parse_duration
from stagebench.building._clips import Encoder, clip_files, windows, worker_pool
from stagebench.config import load_config
from stagebench.dataset import load_dataset
from stagebench.errors import ConfigError, DatasetError
from stagebench.sources.events import read_events
from stagebench.sources.video import read_frames

OFFSET = 51_835_000_000
PERIOD = 50_000


def dsec(root: Path, name: str = "interlaken_00_d", seconds: float = 1.0, split: str = "test") -> Path:
    """A recording of `seconds`: events every 100 µs (and a little longer), 65x48 images at 20 Hz whose grey value is their number."""
    folder = root / split / name
    (folder / "events/left").mkdir(parents=True)
    (folder / "images/left/rectified").mkdir(parents=True)
    recording(folder / "events/left/events.h5", np.arange(0, round(seconds * 1e6) + 100_000, 100), offset=OFFSET, chunk=2000)
    count = round(seconds * 20)
    for i in range(count):
        Image.fromarray(np.full((48, 65, 3), 10 * i % 250, np.uint8)).save(folder / f"images/left/rectified/{i:06d}.png")
    (folder / "images/timestamps.txt").write_text("".join(f"{OFFSET + PERIOD * i}\n" for i in range(count)))
    return folder


@pytest.mark.parametrize(("text", "micros"), [("200ms", 200_000), ("1s", 1_000_000), ("0.5s", 500_000), ("20S", 20_000_000)])
def test_durations(text: str, micros: int) -> None:
    assert parse_duration(text) == micros


@pytest.mark.parametrize("text", ["", "1", "s", "-1s", "1m", "0s", "1ms", "1e9s", "nan s"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="as in 200ms"):
        parse_duration(text)


@given(st.integers(0, 10**9), st.integers(0, 3 * 10**6), st.sampled_from([200_000, 1_000_000]), st.sampled_from([0.0, 0.5, 0.75]))
def test_windows_are_whole_and_stepped(begin: int, length: int, duration: int, overlap: float) -> None:
    found = list(windows(begin, begin + length, duration, overlap))
    assert all(t1 - t0 == duration and begin <= t0 and t1 <= begin + length for t0, t1 in found)
    assert [b[0] - a[0] for a, b in pairwise(found)] == [round(duration * (1 - overlap))] * max(0, len(found) - 1)
    assert not found or found[-1][0] + round(duration * (1 - overlap)) + duration > begin + length, "a whole clip was left out"


def test_clips_of_a_recording(tmp_path: Path) -> None:
    dsec(tmp_path / "dsec")
    counts = from_dsec(tmp_path / "dsec", tmp_path / "out", [200_000, 500_000])
    assert {root.name: n for root, n in counts.items()} == {"dsec_200ms": 9, "dsec_500ms": 3}
    root = tmp_path / "out/dsec_500ms"
    events, video = clip_files(root, "interlaken_00_d/000001")
    found = read_events(events)
    assert (found.t[0], found.t[-1], len(found.t)) == (OFFSET + 250_000, OFFSET + 749_900, 5000)
    number = np.arange(2500, 7500)
    assert (found.x == number % 640).all() and (found.y == number % 480).all() and (found.p == number % 2).all()
    frames = read_frames(video, 10)
    assert frames.available == 10
    assert frames.pixels.shape[1:] == (48, 64, 3), "an odd side loses its last column"
    assert np.abs(frames.pixels[:, 20, 20, 0].astype(int) - 10 * np.arange(5, 15)).max() <= 6, "the images of [t0, t1)"


def test_the_dataset_loads(tmp_path: Path) -> None:
    dsec(tmp_path / "dsec")
    from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000], query="Where?")
    config = load_config(
        {
            "study": "s",
            "datasets": {"d": {"root": str(tmp_path / "out/dsec_500ms")}},
            "models": {"m": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"}},
        }
    )
    loaded = load_dataset("d", config.datasets["d"])
    assert [s.clip for s in loaded.samples] == [f"interlaken_00_d/{i:06d}" for i in range(3)]
    assert {(s.query, s.split, s.sequence) for s in loaded.samples} == {("Where?", "test", "interlaken_00_d")}


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    dsec(tmp_path / "dsec")
    from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000])
    root = tmp_path / "out/dsec_500ms"
    files = {p: p.stat().st_mtime_ns for n in range(3) for p in clip_files(root, f"interlaken_00_d/{n:06d}")}
    lost = clip_files(root, "interlaken_00_d/000001")[1]
    lost.unlink()
    dsec(tmp_path / "dsec", "zurich_city_00_a")
    assert from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000], sequences=["interlaken_00_d"]) == {root: 3}
    again = {p for p, before in files.items() if p.stat().st_mtime_ns != before}
    assert again == set(clip_files(root, "interlaken_00_d/000001"))
    assert from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000], sequences=["zurich_city_00_a"]) == {root: 6}, "the index grows"


def test_other_settings_are_refused(tmp_path: Path) -> None:
    dsec(tmp_path / "dsec")
    from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000])
    with pytest.raises(DatasetError, match="another overlap"):
        from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000], overlap=0)
    (tmp_path / "out/dsec_500ms/built.json").unlink()
    with pytest.raises(DatasetError, match="not built here"):
        from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000])


def test_another_rate_takes_the_nearest_images(tmp_path: Path) -> None:
    dsec(tmp_path / "dsec")
    from_dsec(tmp_path / "dsec", tmp_path / "out", [1_000_000], fps=5)
    frames = read_frames(clip_files(tmp_path / "out/dsec_1s", "interlaken_00_d/000000")[1], 5)
    assert frames.available == 5
    assert np.abs(frames.pixels[:, 20, 20, 0].astype(int) - np.array([0, 40, 80, 120, 160])).max() <= 6


def test_rectified_events_move_and_those_outside_go(tmp_path: Path) -> None:
    import h5py

    folder = dsec(tmp_path / "dsec")
    y, x = np.mgrid[:480, :640].astype(np.float32)
    with h5py.File(folder / "events/left/rectify_map.h5", "w") as file:
        file["rectify_map"] = np.stack([x - 100.4, y], axis=-1)
    from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000], rectify=True, max_clips=1)
    found = read_events(clip_files(tmp_path / "out/dsec_500ms", "interlaken_00_d/000000")[0])
    number = np.arange(5000)
    number = number[number % 640 >= 100]
    assert (found.x == number % 640 - 100).all() and (found.y == number % 480).all()


def test_a_damaged_recording_fails_by_name_and_the_others_stand(tmp_path: Path) -> None:
    dsec(tmp_path / "dsec")
    bad = dsec(tmp_path / "dsec", "zurich_city_00_a")
    (bad / "images/left/rectified/000003.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="1 clips could not be made.*zurich_city_00_a/000000"):
        from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000], overlap=0)
    index = json.loads((tmp_path / "out/dsec_500ms/EventGPT_Instruction_Subset.json").read_text())
    assert len(index) == 3
    assert not list((tmp_path / "out").rglob("*.part*"))


def test_recordings_that_lack_something_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="Unpack its events"):
        from_dsec(tmp_path, tmp_path / "out", [500_000])
    folder = dsec(tmp_path / "dsec")
    with pytest.raises(DatasetError, match=re.escape("no sequence 'x'; there are interlaken_00_d")):
        from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000], sequences=["x"])
    with pytest.raises(DatasetError, match="shorter duration"):
        from_dsec(tmp_path / "dsec", tmp_path / "out", [5_000_000])
    with pytest.raises(DatasetError, match=r"rectify_map\.h5: missing"):
        from_dsec(tmp_path / "dsec", tmp_path / "out2", [500_000], rectify=True)
    (folder / "images/left/rectified/000019.png").unlink()
    with pytest.raises(DatasetError, match="19 images .* 20 times"):
        from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000])
    (folder / "images/timestamps.txt").unlink()
    with pytest.raises(DatasetError, match=r"no images/timestamps\.txt"):
        from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000])


def test_exposures_stand_in_for_timestamps(tmp_path: Path) -> None:
    folder = dsec(tmp_path / "dsec")
    times = (folder / "images/timestamps.txt").read_text().split()
    (folder / "images/timestamps.txt").unlink()
    lines = "".join(f"{int(t) - 30}, {int(t) + 30}\n" for t in times)
    (folder / "images/left/exposure_timestamps.txt").write_text("# start, end\n" + lines)
    assert list(from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000]).values()) == [3]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two videos of a bright square that moves: 2.5 s and 0.4 s at 10 frames a second."""
    for name, frames in (("drive/a", 25), ("b", 4)):
        with Encoder(tmp_path / f"videos/{name}.mp4", 10) as encoder:
            for i in range(frames):
                picture = np.full((96, 128, 3), 40, np.uint8)
                picture[30:60, 3 * i : 3 * i + 30] = 200
                encoder.add(picture)
    return tmp_path / "videos"


def test_an_overlap_that_cannot_be_leaves_nothing_behind(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="overlap 1"):
        from_video(videos, tmp_path / "out", 1_000_000, overlap=1.5, height=64)
    assert from_video(videos, tmp_path / "out", 1_000_000, overlap=0.5, height=64) == 4, "the corrected call is not refused"


def test_videos_become_clips_with_events_where_things_move(videos: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    assert from_video(videos, root, 1_000_000, overlap=0.5, height=64) == 4, "2.5 s hold four clips of 1 s at half overlap"
    for number in range(4):
        events, video = clip_files(root, f"drive/a/{number:06d}")
        found = read_events(events)
        begin = 500_000 * number
        assert begin <= found.t[0] and found.t[-1] < begin + 1_000_000
        assert read_frames(video, 10).available == 10
        assert found.x.max() < 85 and found.y.max() < 64
        moving = (found.y >= 18) & (found.y <= 42)
        assert moving.mean() > 0.9, "events come where the square's edges are"


def test_videos_that_are_done_are_left_alone(videos: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    from_video(videos, root, 1_000_000)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*.npy")}
    assert from_video(videos, root, 1_000_000) == 2
    assert {p: p.stat().st_mtime_ns for p in before} == {p: m for p, (m, _) in before.items()}
    clip_files(root, "drive/a/000001")[1].unlink()
    assert from_video(videos, root, 1_000_000) == 2
    assert {p: p.read_bytes() for p in before} == {p: b for p, (_, b) in before.items()}, "the same seed gives the same events"


def test_a_broken_video_is_named_and_the_others_stand(videos: Path, tmp_path: Path) -> None:
    (videos / "broken.mp4").write_bytes(b"\0" * 4000)
    with pytest.raises(DatasetError, match=r"(?s)1 of 3 videos.*broken\.mp4"):
        from_video(videos, tmp_path / "out", 1_000_000)
    assert len(json.loads((tmp_path / "out/EventGPT_Instruction_Subset.json").read_text())) == 2
    assert not list((tmp_path / "out").rglob("*.part*"))


def test_videos_that_are_too_short_or_missing(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="shorter --duration"):
        from_video(videos, tmp_path / "out", 60_000_000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no video below it"):
        from_video(tmp_path / "empty", tmp_path / "out2", 1_000_000)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_workers_make_what_one_process_makes(tmp_path: Path, videos: Path) -> None:
    for name in ("interlaken_00_d", "zurich_city_00_a"):
        dsec(tmp_path / "dsec", name)
    told: list[tuple[str, int, int]] = []
    from_dsec(tmp_path / "dsec", tmp_path / "serial", [500_000])
    from_dsec(tmp_path / "dsec", tmp_path / "pool", [500_000], workers=3, progress=lambda *step: told.append(step))
    assert contents(tmp_path / "pool") == contents(tmp_path / "serial")
    assert told[0] == ("dsec_500ms", 0, 6) and told[-1] == ("dsec_500ms", 6, 6)
    from_video(videos, tmp_path / "video_serial", 400_000)
    from_video(videos, tmp_path / "video_pool", 400_000, workers=2)
    assert contents(tmp_path / "video_pool") == contents(tmp_path / "video_serial")


def test_workers_name_what_fails_in_each_recording(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        dsec(tmp_path / "dsec", name)
    (tmp_path / "dsec/test/b/images/left/rectified/000003.png").write_bytes(b"no image")
    (tmp_path / "dsec/test/c/images/timestamps.txt").unlink()
    (tmp_path / "dsec/test/d/events/left/events.h5").write_bytes(b"no HDF5 at all")
    with pytest.raises(DatasetError) as caught:
        from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000], overlap=0, workers=2)
    text = str(caught.value)
    assert "2 of the recordings cannot be used" in text
    assert re.search(r"\n  c: .*no images/timestamps\.txt", text) and re.search(r"\n  d: .*not a DSEC recording", text)
    assert "1 clips could not be made" in text and "b/000000" in text
    index = json.loads((tmp_path / "out/dsec_500ms/EventGPT_Instruction_Subset.json").read_text())
    assert [entry["id"] for entry in index] == ["a/000000", "a/000001", "b/000001"], "what can be had is there"


def die(_: object) -> None:
    os._exit(9)


def test_a_worker_that_is_killed_is_said_so() -> None:
    with pytest.raises(DatasetError, match="was killed.*fewer --workers"), worker_pool(2) as pool:
        list(pool.map(die, range(4)))


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dsec(tmp_path / "dsec")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Encoder, "add", full)
    with pytest.raises(DatasetError, match="No space left.*Make room"):
        from_dsec(tmp_path / "dsec", tmp_path / "out", [500_000])
    assert not list((tmp_path / "out").rglob("*.mp4"))
