"""Video files that must be refused with the reason, limits, hostile and mutilated files."""

from pathlib import Path

import numpy as np
import pytest

import video_corpus as corpus
from stagebench.errors import CorruptClipError, NoVideoError, SourceError, TooLargeError, TruncatedClipError
from stagebench.sources import _fast, _full, _request
from stagebench.sources.video import LIMITS, Limits, read_frames


def _odd(name: str, folder: Path) -> Path:
    odd = next(o for o in corpus.ODD if o.name == name)
    if not corpus.available(odd):
        pytest.skip(f"this FFmpeg has no {', '.join(odd.codecs)}")
    return odd.make(folder / name)


def _request_for(path: Path) -> _request.Request:
    return _request.Request(path, path.stat().st_size, 8, "linspace", "error", "apply", LIMITS)


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


def test_a_header_that_lies_about_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus.encode(tmp_path / "a.mp4", range(5), size=(320, 240))
    data = path.read_bytes()
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    assert data[at : at + 4] == (320).to_bytes(2, "big") + (240).to_bytes(2, "big")
    path.write_bytes(data[:at] + (16).to_bytes(2, "big") + (16).to_bytes(2, "big") + data[at + 4 :])
    assert read_frames(path, 1).pixels.shape == (1, 240, 320, 3)
    with monkeypatch.context() as patch, pytest.raises(TooLargeError, match="320x240"):  # and before a frame is decoded
        patch.setattr(_full.Converter, "check", lambda *_: pytest.fail("decoded"))
        read_frames(path, 1, limits=Limits(frame_pixels=1000))
    with pytest.raises(TooLargeError, match="320x240"):
        read_frames(path, 1, limits=Limits(clip_pixels=320 * 240 * 5 - 1))


def test_a_playlist_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = next(b for b in corpus.BAD if b.name == "playlist.m3u8")
    path = bad.make(tmp_path / bad.name)
    with monkeypatch.context() as patch:  # without the guard FFmpeg follows the list: the refusal is ours
        patch.setitem(_request._OPTIONS, "format_whitelist", "hls,mpegts")
        assert read_frames(path, 1).available == 30
    with pytest.raises(CorruptClipError):
        read_frames(path, 1)


@pytest.mark.parametrize(
    "name", ["b_frames.mp4", "fragmented.mp4", "matroska.mkv", "mpeg_ts.ts", "hevc_open_gops.mp4", "mpeg4_b_frames.avi"]
)
def test_mutilated_files_give_frames_or_a_source_error(tmp_path: Path, name: str) -> None:
    good = _odd(name, tmp_path).read_bytes()
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


def test_flipped_bits_never_make_the_two_ways_differ(tmp_path: Path) -> None:
    """Frames of a partial decode are those of a full one, or the true ones where the damage lies in frames left out."""
    data = corpus.encode(tmp_path / "good.mp4", size=(160, 128)).read_bytes()
    good = read_frames(tmp_path / "good.mp4", 8).pixels
    rng, path, refused = np.random.default_rng(5), tmp_path / "bad.mp4", 0
    for place in rng.integers(data.index(b"mdat") + 4, data.index(b"moov"), 80):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.integers(8)]) + data[place + 1 :])
        try:
            part = _fast.read(_request_for(path)).pixels
        except (_fast.NotProven, CorruptClipError):  # in a frame number it looks like a lost picture
            refused += 1
            continue
        try:
            assert (part == _full.read(_request_for(path)).pixels).all()
        except CorruptClipError:
            assert (part == good).all()
    assert refused > 40


def test_a_frame_that_never_comes_out_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus.encode(tmp_path / "a.mp4")
    decode = _fast._decode
    monkeypatch.setattr(_fast, "_decode", lambda *a: (frame for i, frame in enumerate(decode(*a)) if i != 3))
    with pytest.raises(_fast.NotProven, match="1 frames of its index did not come out"):
        _fast.read(_request.Request(path, path.stat().st_size, 30, "linspace", "error", "apply", LIMITS))


def test_an_incomplete_packet_is_refused(tmp_path: Path) -> None:
    request = _request_for(corpus.encode(tmp_path / "a.ts", range(2)))
    with request.open(probe=True) as video:
        packets = list(request.demux(video))
        packets[1].is_corrupt = True
        with pytest.raises(TruncatedClipError, match="packet 2 of 2 is incomplete"):
            list(_full._decode(request, video, packets))


def test_a_cut_file_is_never_a_short_clip(tmp_path: Path) -> None:
    """Wherever an MP4 or MKV is cut, it is refused as truncated or corrupt."""
    for name in ("faststart.mp4", "b_frames.mp4", "matroska.mkv"):
        good = _odd(name, tmp_path).read_bytes()
        path = tmp_path / name
        for end in range(len(good) // 50, len(good), len(good) // 50):
            path.write_bytes(good[:end])
            with pytest.raises(CorruptClipError):
                read_frames(path, 4)
