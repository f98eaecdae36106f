"""The MP4 reader against a full decode: real clips, and a corpus of odd files whose frames carry their numbers."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import video_corpus as corpus

from stagebench.errors import CorruptClipError, NoVideoError, RefusedClipError, ShortClipError, SourceError, TooLargeError
from stagebench.sources import _fast, _full, _request
from stagebench.sources.frames import pick
from stagebench.sources.video import LIMITS, Limits, read_frames

REAL = ("interlaken_00_d/000069", "interlaken_00_d/000074", "interlaken_00_d/000079", "eventgpt/000000")
FFMPEG = shutil.which("ffmpeg")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


def _make(odd: corpus.Odd, folder: Path) -> Path:
    if not corpus.available(odd):
        pytest.skip(f"this FFmpeg has no {', '.join(odd.codecs)}")
    path = folder / odd.name
    return path if path.exists() else odd.make(path)


def _everything(path: Path, *, upright: bool = True) -> Iterator[tuple[int | None, np.ndarray]]:
    """(pts, RGB) of every frame, in output order: decoder and filter graph in their plainest form, for frames without rotation."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        graph = None
        for frame in container.decode(stream):
            if graph is None:
                graph = av.filter.Graph()
                source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base)
                graph.link_nodes(source, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
            graph.push(frame)
            yield frame.pts, graph.pull().to_ndarray()


def _program(path: Path, *options: str) -> bytes:
    """All frames as the ffmpeg program writes them: turned as players turn them, nothing dropped, nothing doubled."""
    command = [
        str(FFMPEG),
        "-v",
        "error",
        *options,
        "-i",
        str(path),
        "-fps_mode",
        "passthrough",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    return subprocess.run(command, capture_output=True, check=True).stdout


def _request_for(path: Path, count: int = 8, limits: Limits = LIMITS) -> _request.Request:
    return _request.Request(path, path.stat().st_size, count, "linspace", "repeat", "apply", limits)


# --- the real clips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", REAL)
def test_real_clips_equal_a_full_decode(real_data: Path, clip: str) -> None:
    path = real_data / "real" / "mp4" / f"{clip}.mp4"
    asked = {(count, sampling): read_frames(path, count, sampling) for count in (1, 4, 8, 16, 32) for sampling in ("linspace", "stride")}
    (total,) = {read.available for read in asked.values()}
    seen = 0
    for index, (pts, rgb) in enumerate(_everything(path)):
        seen += 1
        for read in asked.values():
            for place in np.flatnonzero(read.indices == index):
                assert read.pts[place] == pts
                assert (read.pixels[place] == rgb).all()
    assert seen == total
    for (count, sampling), read in asked.items():
        assert read.indices.tolist() == pick(total, count, sampling)
        assert read.pixels.dtype == np.uint8 and read.pixels.flags.c_contiguous and read.pixels.shape[0] == count
        assert read.pts.dtype == read.indices.dtype == np.int64


@pytest.mark.skipif(FFMPEG is None, reason="no ffmpeg program to compare with")
@pytest.mark.parametrize("clip", REAL)
def test_real_clips_equal_the_ffmpeg_program(real_data: Path, clip: str) -> None:
    path = real_data / "real" / "mp4" / f"{clip}.mp4"
    read = read_frames(path, 8)
    all_of_it = np.frombuffer(_program(path), np.uint8).reshape(-1, *read.pixels.shape[1:])
    assert len(all_of_it) == read.available
    assert (all_of_it[read.indices] == read.pixels).all()


# --- odd files that decode ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", corpus.ODD, ids=lambda odd: odd.name)
@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_odd_files_give_the_frames_that_a_player_shows(made: Path, odd: corpus.Odd, count: int) -> None:
    path = _make(odd, made)
    for sampling in ("linspace", "stride"):
        read = read_frames(path, count, sampling, short_clips="repeat")
        expected = pick(len(odd.numbers), count, sampling)
        assert read.available == len(odd.numbers)
        assert read.indices.tolist() == expected
        coded = [odd.turn(frame) if odd.turn else frame for frame in read.pixels]
        assert [corpus.number_of(frame) for frame in coded] == [odd.numbers[i] for i in expected]
        assert (np.diff(read.pts) >= 0).all()


@pytest.mark.parametrize("odd", [odd for odd in corpus.ODD if odd.turn is None], ids=lambda odd: odd.name)
def test_odd_files_equal_a_full_decode(made: Path, odd: corpus.Odd) -> None:
    path = _make(odd, made)
    read = read_frames(path, 7, short_clips="repeat")
    full = list(_everything(path))
    assert read.available == len(full)
    for place, index in enumerate(read.indices):
        assert (read.pixels[place] == full[index][1]).all()
        assert full[index][0] in (None, read.pts[place])


@pytest.mark.skipif(FFMPEG is None, reason="no ffmpeg program to compare with")
@pytest.mark.parametrize("odd", corpus.ODD, ids=lambda odd: odd.name)
def test_odd_files_equal_the_ffmpeg_program(made: Path, odd: corpus.Odd) -> None:
    path = _make(odd, made)
    read = read_frames(path, 12, short_clips="repeat")
    program = np.frombuffer(_program(path), np.uint8).reshape(-1, *read.pixels.shape[1:])
    assert len(program) == read.available
    difference = np.abs(program[read.indices].astype(np.int16) - read.pixels).max()
    assert difference <= odd.tolerance


@pytest.mark.parametrize("odd", corpus.ODD, ids=lambda odd: odd.name)
def test_the_way_taken(made: Path, odd: corpus.Odd) -> None:
    """That a file is decoded in part must rest on proof; that it is decoded in full must have a reason."""
    request = _request_for(_make(odd, made))
    if odd.fast:
        assert (_fast.read(request).pixels == _full.read(request).pixels).all()
    else:
        with pytest.raises(_fast.NotProven):
            _fast.read(request)


def test_a_part_is_decoded(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unreferenced frames and groups without a target never reach a frame of output."""
    decoded: list[int] = []
    check = _fast.Converter.check
    monkeypatch.setattr(_fast.Converter, "check", lambda self, frame: (decoded.append(frame.pts), check(self, frame))[1])
    path = corpus.encode(made / "long.mp4", range(120), options={"g": "20", "bf": "3", "x264-params": "b-adapt=0:scenecut=0"})
    assert corpus.number_of(read_frames(path, 1).pixels[0]) == 59
    assert len(decoded) <= 20
    decoded.clear()
    assert [corpus.number_of(f) for f in read_frames(path, 2).pixels] == [0, 119]
    assert len(decoded) <= 21
    decoded.clear()
    read_frames(path, 8)
    assert len(decoded) < 75


def test_header_counts_are_not_believed(made: Path) -> None:
    path = _make(next(odd for odd in corpus.ODD if odd.name == "edit_list_both_ends.mp4"), made)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 30
    assert read_frames(path, 20).available == 20


def test_untagged_video_is_bt601_and_tags_are_followed(made: Path) -> None:
    first = {name: read_frames(made / f"{name}.mp4", 1).pixels[0].astype(int) for name in ("tagged_bt709", "tagged_bt601")}
    expected = corpus.picture(14).astype(int)
    for name, read in first.items():  # both were made from the same picture, and both must come back as it
        assert np.abs(read - expected)[40:, 8:-8].mean() < 12, name


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(made: Path) -> Path:
    return corpus.encode(made / "plain.mp4", range(5))


def test_short_clip(plain: Path) -> None:
    with pytest.raises(ShortClipError, match=r"plain\.mp4: 5 decodable frames, 8 asked for\. Lower frames\.count"):
        read_frames(plain, 8)
    read = read_frames(plain, 8, short_clips="repeat")
    assert [corpus.number_of(f) for f in read.pixels] == pick(5, 8)
    assert read.indices.tolist() == pick(5, 8)


def test_short_clip_found_by_a_full_decode(made: Path) -> None:
    path = corpus.encode(made / "short.ts", range(5))
    with pytest.raises(ShortClipError, match="5 decodable frames, 8 asked for"):
        read_frames(path, 8)


def test_wrong_arguments_are_the_callers_fault(plain: Path) -> None:
    for arguments, words in [
        ({"sampling": "random"}, "sampling"),
        ({"rotation": "90"}, "rotation"),
        ({"short_clips": "pad"}, "short_clips"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_frames(plain, 4, **arguments)
    with pytest.raises(ValueError):
        read_frames(plain, 0)


def test_rotation_policies(made: Path) -> None:
    path = corpus.encode(made / "turned.mp4", range(5), rotation=(90, False, False))
    applied, ignored = read_frames(path, 1).pixels[0], read_frames(path, 1, rotation="ignore").pixels[0]
    assert applied.shape == (96, 64, 3) and ignored.shape == (64, 96, 3)
    assert (np.rot90(ignored) == applied).all()
    with pytest.raises(RefusedClipError, match="turned by 90 degrees.*frames.rotation"):
        read_frames(path, 1, rotation="refuse")
    assert len(read_frames(corpus.encode(made / "upright.mp4", range(3)), 3, rotation="refuse")) == 3
    odd_angle = corpus.encode(made / "turned_odd.mp4", range(5), rotation=(33, False, False))
    assert read_frames(odd_angle, 1, rotation="ignore").pixels.shape == (1, 64, 96, 3)


@pytest.mark.parametrize("name", ["with space.mp4", "a:b.mp4", "http:x.mp4", "späße_%05d.mp4", "?[1]*.mp4"])
def test_a_name_is_only_a_name(plain: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(plain, tmp_path / name)
    assert read_frames(tmp_path / name, 5).available == 5


def test_relative_paths_and_strings(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plain.parent)
    assert read_frames("plain.mp4", 5).available == 5


# --- files that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", corpus.BAD, ids=lambda bad: bad.name)
def test_bad_files_are_refused_with_the_reason(tmp_path: Path, bad: corpus.Bad) -> None:
    path = bad.make(tmp_path / bad.name)
    with pytest.raises(SourceError) as caught:
        read_frames(path, 4)
    assert type(caught.value).__name__ == bad.error
    message = str(caught.value)
    assert bad.name in message and message.endswith(".")
    for words in bad.words:
        assert words in message


def test_names_that_no_file_can_have() -> None:
    for name in ("nul\0.mp4", "x" * 5000):
        with pytest.raises(NoVideoError):
            read_frames(name, 1)
    with pytest.raises(NoVideoError, match="expected a file"):
        read_frames("/dev/zero", 1)


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(file_bytes=500), "bytes, at most 500"),
        (Limits(frame_pixels=96 * 64 - 1), "96x64 pixels, at most 6,143"),
        (Limits(frames=4), "more than 4 frames"),
        (Limits(clip_pixels=96 * 64 * 4), "5 frames of 96x64"),
        (Limits(output_bytes=1000), "4 frames of 96x64 take 73,728 bytes, at most 1,000"),
    ],
)
def test_limits_are_kept_before_a_frame_is_decoded(
    tmp_path: Path, suffix: str, limits: Limits, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus.encode(tmp_path / f"a{suffix}", range(5))
    for module in (_fast, _full):
        monkeypatch.setattr(module, "_decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(TooLargeError, match=words):
        read_frames(path, 4, limits=limits)


def test_a_header_that_lies_about_the_size(tmp_path: Path) -> None:
    path = corpus.encode(tmp_path / "a.mp4", range(5), size=(320, 240))
    data = path.read_bytes()
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    assert data[at : at + 4] == (320).to_bytes(2, "big") + (240).to_bytes(2, "big")
    path.write_bytes(data[:at] + (16).to_bytes(2, "big") + (16).to_bytes(2, "big") + data[at + 4 :])
    assert read_frames(path, 1).pixels.shape == (1, 240, 320, 3)
    with pytest.raises((CorruptClipError, TooLargeError)):
        read_frames(path, 1, limits=Limits(frame_pixels=1000))
    with pytest.raises(TooLargeError, match="320x240"):
        read_frames(path, 1, limits=Limits(clip_pixels=320 * 240 * 5 - 1))


def test_a_playlist_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = next(b for b in corpus.BAD if b.name == "playlist.mp4")
    path = bad.make(tmp_path / bad.name)
    for module in (_request,):  # with the guard out, FFmpeg follows the list: this test can fail
        monkeypatch.setitem(module._OPTIONS, "format_whitelist", "hls,mpegts")
        monkeypatch.setitem(module._OPTIONS, "extension_picky", "0")
    try:
        assert read_frames(path, 1).available
    except CorruptClipError:
        pytest.skip("this FFmpeg refuses local playlists by itself")
    monkeypatch.undo()
    with pytest.raises(CorruptClipError):
        read_frames(path, 1)


@pytest.mark.parametrize(
    "name", ["b_frames.mp4", "fragmented.mp4", "matroska.mkv", "mpeg_ts.ts", "hevc_open_gops.mp4", "mpeg4_b_frames.avi"]
)
def test_mutilated_files_give_frames_or_a_source_error(made: Path, tmp_path: Path, name: str) -> None:
    odd = next(o for o in corpus.ODD if o.name == name)
    good = _make(odd, made).read_bytes()
    rng = np.random.default_rng(len(name))
    path = tmp_path / name
    outcomes = set()
    for attempt in range(40):
        data = bytearray(good)
        if attempt % 4 == 0:
            data = data[: rng.integers(1, len(data))]
        elif attempt % 4 == 1:
            at = rng.integers(0, len(data))
            del data[at : at + rng.integers(1, 200)]
        else:
            for at in rng.integers(0, len(data), 1 + attempt):
                data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            read = read_frames(path, 4, short_clips="repeat")
        except SourceError as error:
            assert name in str(error)
            outcomes.add("refused")
        else:
            assert len(read.pixels) == 4 and read.pixels.ndim == 4
            outcomes.add("read")
    assert "refused" in outcomes


def test_a_cut_file_is_never_a_short_clip(made: Path, tmp_path: Path) -> None:
    """Wherever an MP4 or MKV is cut, it is refused as truncated or corrupt."""
    for name in ("faststart.mp4", "b_frames.mp4", "matroska.mkv"):
        good = _make(next(o for o in corpus.ODD if o.name == name), made).read_bytes()
        path = tmp_path / name
        for end in range(len(good) // 50, len(good), len(good) // 50):
            path.write_bytes(good[:end])
            with pytest.raises(CorruptClipError):
                read_frames(path, 4)


# --- state, threads, processes --------------------------------------------------------------------------------------


def test_nothing_stays_open(plain: Path, tmp_path: Path) -> None:
    bad = [b.make(tmp_path / b.name) for b in corpus.BAD]
    read_frames(plain, 4)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("no /proc")
    for _ in range(5):
        read_frames(plain, 4)
        for path in bad:
            with pytest.raises(SourceError):
                read_frames(path, 4)
    assert len(os.listdir("/proc/self/fd")) == before


def _digest(path: Path) -> int:
    return hash(read_frames(path, 8).pixels.tobytes())


def test_threads_read_the_same(made: Path) -> None:
    paths = [_make(odd, made) for odd in corpus.ODD if odd.name in ("b_frames.mp4", "open_gops.mp4", "mpeg_ts.ts", "interlaced.mp4")]
    alone = [read_frames(path, 8).pixels for path in paths]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda path: read_frames(path, 8).pixels, paths * 8))
    for i, pixels in enumerate(together):
        assert (pixels == alone[i % len(paths)]).all()


def test_processes_read_the_same(plain: Path) -> None:
    expected = read_frames(plain, 4).pixels.sum()  # FFmpeg has been used in the parent before the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_sum, [plain] * 6) == [expected] * 6


def _sum(path: Path) -> int:
    return int(read_frames(path, 4).pixels.sum())


def test_import_is_light() -> None:
    code = "import sys, stagebench.sources.video; print([m for m in ('av', 'PIL', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip() == "[]"
