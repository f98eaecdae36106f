"""The MP4 reader against a full decode: real clips, and a corpus of odd files whose frames carry their numbers."""

import gc
import multiprocessing
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
from stagebench.errors import CorruptClipError, RefusedClipError, ShortClipError, SourceError
from stagebench.sources import _fast, _full, _request
from stagebench.sources._bitstream import survey
from stagebench.sources.frames import pick
from stagebench.sources.video import LIMITS, read_frames

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


def _request_for(path: Path) -> _request.Request:
    return _request.Request(path, path.stat().st_size, 8, "linspace", "repeat", "apply", LIMITS)


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


@pytest.mark.parametrize("delimiters", [0, 1])
def test_a_part_is_decoded(made: Path, monkeypatch: pytest.MonkeyPatch, delimiters: int) -> None:
    """Unreferenced frames and groups without a target never reach a frame of output."""
    decoded: list[int] = []
    check = _fast.Converter.check
    monkeypatch.setattr(_fast.Converter, "check", lambda self, frame: (decoded.append(frame.pts), check(self, frame))[1])
    options = {"g": "20", "bf": "3", "x264-params": f"b-adapt=0:scenecut=0:aud={delimiters}"}
    path = corpus.encode(made / f"long_{delimiters}.mp4", range(120), options=options)
    assert corpus.number_of(read_frames(path, 1).pixels[0]) == 59
    assert len(decoded) <= 20
    decoded.clear()
    assert [corpus.number_of(f) for f in read_frames(path, 2).pixels] == [0, 119]
    assert len(decoded) <= 21
    decoded.clear()
    read_frames(path, 8)
    assert len(decoded) < 75


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_clip_with_a_missing_picture_is_refused(made: Path, suffix: str) -> None:
    """A packet lost on its way, the file whole otherwise: the pictures that refer to it are not the ones that were recorded, and FFmpeg
    gives them without a word."""
    whole = corpus.encode(made / "whole.mp4", range(30), options={"bf": "0", "x264-params": "scenecut=0"})
    lost = _without(whole, made / f"lost.{suffix}", {9})
    assert sum(1 for _ in _everything(lost)) == 29
    with pytest.raises(CorruptClipError, match=r"lost\.\w+: picture 10 of 29 has frame_num 10 where 9 is due: one before it is missing"):
        read_frames(lost, 4)


def test_a_clip_without_one_of_its_idr_pictures_is_refused(made: Path) -> None:
    """The group then refers to the pictures before it. Weights and B pictures that others refer to lengthen the slices' headers."""
    options = {"bf": "3", "g": "10", "x264-params": "scenecut=0:b-pyramid=normal:weightp=2:weightb=1:ref=4"}
    whole = corpus.encode(made / "whole_groups.mp4", range(30), options=options)
    lost = _without(whole, made / "lost_idr.mp4", {10})
    with pytest.raises(CorruptClipError, match="has frame_num 1 where .* is due: one before it is missing"):
        read_frames(lost, 4)


def test_what_is_no_loss_is_read(made: Path) -> None:
    """Frames that no other refers to may be missing; a clip that is joined from two has another number at the second's first picture."""
    whole = corpus.encode(made / "with_b.mp4", range(30), options={"bf": "2", "x264-params": "b-adapt=0:b-pyramid=none:scenecut=0"})
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        pictures = survey("h264", container.streams.video[0].codec_context.extradata, packets)
    some = [number for number, picture in enumerate(pictures) if picture.spare][::2]
    assert len(some) > 5
    assert read_frames(_without(whole, made / "thinned.mp4", set(some)), 4).available == 30 - len(some)
    # groups of pictures that start with an I picture which is no IDR picture; the second is left out
    open_gop = corpus.encode(made / "open.mp4", range(36), options={"bf": "0", "g": "12", "x264-params": "open-gop=1:scenecut=0:bframes=0"})
    joined = _without(open_gop, made / "joined.mp4", set(range(12, 24)))
    assert read_frames(joined, 4).available == 24


def test_what_is_cut_before_a_key_picture_is_read(made: Path) -> None:
    """A copy that starts midway, at a picture that no other refers to: frame numbers before the next key picture tell nothing."""
    whole = corpus.encode(
        made / "long.mp4", range(40), options={"bf": "2", "g": "20", "x264-params": "b-adapt=0:scenecut=0:b-pyramid=none"}
    )
    cut = _without(whole, made / "cut.mp4", set(range(8)))
    shown = [rgb for _, rgb in _everything(cut)]
    assert 20 <= len(shown) < 32
    assert (read_frames(cut, len(shown)).pixels == shown).all()


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_timestamps_in_the_order_of_decoding_do_not_reorder_frames(made: Path, codec: str) -> None:
    """As FFmpeg's concat demuxer writes a clip that was cut before a key frame: its times would run back, and are put in order."""
    options = (
        {"g": "15", "bf": "3", "x265-params": "log-level=none:b-adapt=0:keyint=15:open-gop=0"}
        if codec == "libx265"
        else {"g": "15", "bf": "3"}
    )
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    whole = corpus.encode(made / f"groups_{codec}.mp4", range(30), codec=codec, options=options)
    joined = made / f"joined_{codec}.mp4"
    with av.open(str(whole)) as source, av.open(str(joined), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        assert packets[15].is_keyframe
        begin = packets[15].pts
        for number, packet in enumerate(packets):
            if number >= 15:
                packet.pts = packet.dts = begin + number - 15
            packet.stream = stream
            out.mux(packet)
    shown = list(_everything(joined))
    assert [pts for pts, _ in shown] != sorted(pts for pts, _ in shown if pts is not None)
    for count in (2, 5, 30):
        read = read_frames(joined, count)
        assert (read.pixels == [shown[i][1] for i in read.indices]).all()


def _without(path: Path, target: Path, numbers: set[int]) -> Path:
    """The clip without these packets, in decoding order."""
    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            if number not in numbers:
                packet.stream = stream
                out.mux(packet)
    return target


def test_header_counts_are_not_believed(made: Path) -> None:
    path = _make(next(odd for odd in corpus.ODD if odd.name == "edit_list_both_ends.mp4"), made)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 30
    assert read_frames(path, 20).available == 20


def test_untagged_video_is_bt601_and_tags_are_followed(tmp_path: Path) -> None:
    """The same YCbCr samples under three tags, against the conversion's own formula (ITU-R BT.601 and BT.709, limited range).

    The two differ by 9 and more here, and FFmpeg's scaler rounds by less than 2.5."""
    weights = {"untagged": (0.299, 0.114), "bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
    tags = {"untagged": None, "bt601": 6, "bt709": 1}
    planes = {"y": 90, "u": 100, "v": 180}
    for name, (red, blue) in weights.items():
        path = tmp_path / f"{name}.mp4"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=20, options={"qp": "0"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            if tags[name] is not None:
                stream.codec_context.colorspace = tags[name]
            for _ in range(3):
                frame = av.VideoFrame(64, 48, "yuv420p")
                for plane, value in zip(frame.planes, planes.values(), strict=True):
                    plane.update(bytes([value]) * plane.buffer_size)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        luma, cb, cr = (planes["y"] - 16) / 219, (planes["u"] - 128) / 224, (planes["v"] - 128) / 224
        r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
        g = (luma - red * r - blue * b) / (1 - red - blue)
        expected = np.clip([255 * r, 255 * g, 255 * b], 0, 255)
        assert np.abs(read_frames(path, 1).pixels.reshape(-1, 3) - expected).max() < 2.5, name


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
def test_a_name_is_only_a_name(plain: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(plain, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        assert read_frames(path, 5).available == 5


def test_relative_paths_and_strings(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plain.parent)
    assert read_frames("plain.mp4", 5).available == 5


# --- state, threads, processes --------------------------------------------------------------------------------------


def test_nothing_stays_open(plain: Path, tmp_path: Path) -> None:
    bad = [b.make(tmp_path / b.name) for b in corpus.BAD]
    read_frames(plain, 4)
    before = _open_files()
    for _ in range(5):
        read_frames(plain, 4)
        for path in bad:
            with pytest.raises(SourceError):
                read_frames(path, 4)
    assert _open_files() == before


def _open_files() -> int:
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to count open files in")
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("name", ["b_frames.mp4", "mpeg_ts.ts", "turned_90.mp4"])
def test_decoded_frames_are_let_go_of_without_the_collector(made: Path, name: str) -> None:
    """In a cycle, each clip's decoder memory would stay until the collector comes by, and the next clip pay for fresh pages."""
    path = _make(next(odd for odd in corpus.ODD if odd.name == name), made)
    gc.collect()
    gc.disable()
    try:
        assert read_frames(path, 4).pixels.size
        left = [found for found in gc.get_objects() if isinstance(found, av.VideoFrame | av.Packet | av.CodecContext)]
    finally:
        gc.enable()
    assert left == []


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
