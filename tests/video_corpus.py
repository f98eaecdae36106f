"""Makes the odd video files of the tests: each frame carries its number as a barcode, so that order is proven by pixels.

`ODD` lists the files that decode, with the frame numbers that a player shows; `BAD` those that must be refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8
RATE = 20
SIZE = (96, 64)  # width, height


# --- pictures -------------------------------------------------------------------------------------------------------


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 [H, W, 3]: a moving coloured texture, its upper half `number` as 8 black or white bars."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([(x * 3 + number * 7) % 256, (y * 5 + number * 3) % 256, (x + y * 2 + number * 11) % 256], -1).astype(np.uint8)
    for bit in range(BITS):
        image[: height // 2, bit * width // BITS : (bit + 1) * width // BITS] = 235 if number >> bit & 1 else 20
    return image


def number_of(image: np.ndarray) -> int:
    """The barcode read back."""
    height, width = image.shape[:2]
    bars = [image[: height // 4, bit * width // BITS : (bit + 1) * width // BITS].mean() for bit in range(BITS)]
    return sum(1 << bit for bit, value in enumerate(bars) if value > 127)


# --- writing --------------------------------------------------------------------------------------------------------


def encode(
    path: Path,
    numbers: Iterable[int] = range(30),
    *,
    codec: str = "libx264",
    size: tuple[int, int] = SIZE,
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    format: str | None = None,
    pts: Sequence[int] | None = None,
    tags: dict[str, int] | None = None,
    rotation: tuple[float, bool, bool] | None = None,
    matrix: Sequence[int] | None = None,
    sound: bool = False,
) -> Path:
    """A video of `picture(number)` for each number. `pts` in frame durations; default 0, 1, 2, ..."""
    with av.open(str(path), "w", format=format, options=container or {}) as out:
        stream = out.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.options = {**_DEFAULTS.get(codec, {}), **(options or {})}
        stream.codec_context.thread_count = 1
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
        if matrix:
            stream.set_display_matrix(matrix)
        if sound:
            _add_sound(out)
        for i, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts, frame.time_base = (pts[i] if pts else i), Fraction(1, RATE)
            if tags:
                frame = frame.reformat(format=pixel_format, dst_colorspace=tags.get("colorspace"), dst_color_range=tags.get("color_range"))
                frame.pts, frame.time_base = (pts[i] if pts else i), Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


_DEFAULTS = {
    "libx264": {"crf": "12", "preset": "fast", "bf": "3"},
    "libx265": {"crf": "12", "preset": "fast", "x265-params": "log-level=none"},
}


def _add_sound(out: av.container.OutputContainer) -> None:
    stream = out.add_stream("aac", rate=8000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    for i in range(4):
        frame.pts = i * 1024
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def remux(
    source: Path, path: Path, *, skip: int = 0, shift: int = 0, format: str | None = None, container: dict[str, str] | None = None
) -> Path:
    """The packets of `source` in another file, without the first `skip`, all times shifted by `shift` frame durations."""
    with av.open(str(source)) as inside, av.open(str(path), "w", format=format, options=container or {}) as out:
        stream = inside.streams.video[0]
        copy = out.add_stream_from_template(stream)
        duration = int(1 / (RATE * stream.time_base))
        for i, packet in enumerate(p for p in inside.demux(stream) if p.size):
            if i < skip:
                continue
            packet.stream = copy
            packet.pts += shift * duration
            packet.dts += shift * duration
            out.mux(packet)
    return path


def altered(path: Path, change: Callable[[int, bytearray], bytes], **settings: object) -> Path:
    """A video whose packets went through `change`, which is given each packet's place in decoding order and its bytes."""
    whole = encode(path.with_name("whole_" + path.name), **settings)  # type: ignore[arg-type]
    with av.open(str(whole)) as inside, av.open(str(path), "w") as out:
        stream = inside.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for place, old in enumerate(p for p in inside.demux(stream) if p.size):
            packet = av.Packet(change(place, bytearray(bytes(old))))
            packet.pts, packet.dts, packet.time_base, packet.duration = old.pts, old.dts, old.time_base, old.duration
            packet.is_keyframe, packet.stream = old.is_keyframe, copy
            out.mux(packet)
    return path


def edit(path: Path, *cuts: tuple[int, int]) -> Path:
    """Let the edit list show `frames` frames from the `first` on, for each (first, frames): cutting without encoding anew."""
    with av.open(str(path)) as container:
        step = int(1 / (RATE * container.streams.video[0].time_base))
    data = path.read_bytes()
    scale = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    at = data.index(b"elst") - 4
    (size,) = struct.unpack_from(">I", data, at)
    (delay,) = struct.unpack_from(">i", data, at + 20)  # media_time of the first frame, which B-frames put above 0
    entries = b"".join(struct.pack(">IiHH", frames * scale // RATE, delay + first * step, 1, 0) for first, frames in cuts)
    box = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(cuts)) + entries
    data = bytearray(data[:at] + box + data[at + size :])
    for parent in (b"moov", b"trak", b"edts"):  # moov stands last: no frame moves
        found = data.index(parent) - 4
        struct.pack_into(">I", data, found, struct.unpack_from(">I", data, found)[0] + len(box) - size)
    path.write_bytes(data)
    return path


def joined_sizes(path: Path, *, format: str | None = None) -> Path:
    """A stream that changes from 96x64 to 128x96 in its middle, the second half bringing its parameters in-band."""
    halves = []
    for size in (SIZE, (128, 96)):
        context = av.CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = *size, "yuv420p"
        context.time_base = context.framerate = Fraction(1, RATE)
        context.framerate = Fraction(RATE)
        context.options = {"bf": "0", "preset": "fast"}
        context.thread_count = 1
        packets = []
        for i in range(15):
            frame = av.VideoFrame.from_ndarray(picture(i, size), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            packets += context.encode(frame)
        halves.append([bytes(p) for p in packets + context.encode(None)])
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.options = {"bf": "0", "preset": "fast"}
        stream.codec_context.thread_count = 1
        for i, data in enumerate([*halves[0], *halves[1]]):
            packet = av.Packet(data)
            packet.pts = packet.dts = i
            packet.time_base, packet.stream = Fraction(1, RATE), stream
            packet.is_keyframe = i % 15 == 0
            out.mux(packet)
    return path


# --- files that decode ----------------------------------------------------------------------------------------------

Maker = Callable[[Path], Path]


@dataclass(frozen=True)
class Odd:
    """A file that decodes. `numbers`: what a player shows, in order. `fast`: whether a part of it may be decoded."""

    name: str
    make: Maker
    numbers: tuple[int, ...] = tuple(range(30))
    fast: bool = True
    codecs: tuple[str, ...] = ("libx264",)
    turn: Callable[[np.ndarray], np.ndarray] | None = field(default=None, compare=False)
    """Takes a returned frame back to the coded picture, to read its barcode."""
    tolerance: int = 0
    """What the ffmpeg program may differ by: scalers of two FFmpeg versions round a few pixels of odd sizes differently, and
    version 5.1 has other grain."""


def _x264(name: str, fast: bool = True, numbers: Iterable[int] = range(30), suffix: str = ".mp4", **settings: object) -> Odd:
    numbers = tuple(numbers)
    return Odd(name + suffix, lambda path: encode(path, numbers, **settings), numbers, fast)  # type: ignore[arg-type]


def _other(name: str, codec: str, fast: bool = False, numbers: Iterable[int] = range(30), **settings: object) -> Odd:
    numbers = tuple(numbers)
    return Odd(name, lambda path: encode(path, numbers, codec=codec, **settings), numbers, fast, (codec,))  # type: ignore[arg-type]


def _turned(name: str, rotation: tuple[float, bool, bool], turn: Callable[[np.ndarray], np.ndarray]) -> Odd:
    return Odd(name, lambda path: encode(path, rotation=rotation), turn=turn)


def _edited(name: str, *cuts: tuple[int, int], **settings: object) -> Odd:
    numbers = tuple(n for first, frames in cuts for n in range(first, first + frames))
    return Odd(name, lambda path: edit(encode(path, options={"g": "10"}), *cuts), numbers, **settings)  # type: ignore[arg-type]


def _joined_midway(path: Path) -> Path:
    """Begins at the second keyframe of an open GOP: its first pictures refer to what is not there."""
    whole = encode(path.with_name("open_" + path.name), options={"g": "10", "x264-params": "open-gop=1:scenecut=0"})
    with av.open(str(whole)) as container:
        keys = [i for i, p in enumerate(container.demux(video=0)) if p.is_keyframe]
    return remux(whole, path, skip=keys[1])


_GRAIN = bytes.fromhex("0000000f 4e01 130a 00a00200ff03c0402180 80")
"""A unit with film grain characteristics (ITU-T H.265, D.2.17): on luma, one interval of all values, until another message."""


def _hevc_groups(open_gop: int) -> dict[str, object]:
    options = {"g": "10", "bf": "3", "crf": "12", "x265-params": f"log-level=none:b-adapt=0:scenecut=0:open-gop={open_gop}"}
    return {"codec": "libx265", "options": options}


def _grained(path: Path) -> Path:
    """Grain is asked for with the first picture, and every later one has it."""
    return altered(path, lambda place, data: _GRAIN + bytes(data) if place == 0 else bytes(data), **_hevc_groups(0))


def _spliced(path: Path) -> Path:
    """Open groups whose first pictures are marked as the begin of another recording: a player leaves out those before them."""

    def change(place: int, data: bytearray) -> bytes:
        at = 0
        while at < len(data):
            if data[at + 4] >> 1 & 63 == 21:  # a clean random access picture
                data[at + 4] = 16 << 1  # a broken link access picture
            at += 4 + int.from_bytes(data[at : at + 4], "big")
        return bytes(data)

    return altered(path, change, **_hevc_groups(1))


_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_BT601, _BT709, _BT2020 = 6, 1, 9

ODD = (
    _x264("b_frames"),
    _x264("no_b_frames", options={"bf": "0"}),
    _x264("many_b_frames", options={"bf": "8", "x264-params": "b-adapt=0:ref=6"}),
    _x264("strict_pyramid", options={"x264-params": "b-pyramid=strict:b-adapt=0"}),
    _x264("short_gops", options={"g": "5"}),
    _x264("all_intra", options={"g": "1"}),
    _x264("open_gops", options={"g": "10", "x264-params": "open-gop=1:scenecut=0"}),
    _x264("intra_refresh", options={"g": "10", "x264-params": "intra-refresh=1"}),
    _x264("slices", options={"x264-params": "slices=4"}),
    _x264("headers_repeated", options={"g": "10", "x264-params": "repeat-headers=1"}),
    _x264("scaling_matrices", options={"x264-params": "cqm=jvt"}),
    _x264("one_frame", numbers=[7]),
    _x264("three_frames", numbers=[5, 6, 7]),
    _x264("baseline", options={"profile": "baseline", "bf": "0"}),
    _x264("faststart", container={"movflags": "faststart"}),
    _x264("with_sound", sound=True),
    _x264("variable_rate", pts=np.cumsum([0, *([1, 3, 1, 2, 7] * 6)])[:30].tolist()),
    _x264("starts_late", pts=[i + 40 for i in range(30)]),
    _edited("edit_list_mid_gop.mp4", (13, 17)),
    _edited("edit_list_both_ends.mp4", (4, 20)),
    _edited("edit_list_two_parts.mp4", (2, 6), (23, 7), fast=False),
    _edited("edit_list_swapped.mp4", (20, 10), (0, 10)),
    _edited("edit_list_repeats.mp4", (5, 10), (5, 10), fast=False),
    Odd(
        "negative_times.mp4",
        lambda p: remux(encode(p.with_name("n_" + p.name)), p, shift=-6, container={"avoid_negative_ts": "disabled"}),
        tuple(range(6, 30)),
    ),
    _x264("fragmented", container=_FRAGMENTS, options={"g": "10"}),
    _x264("fragmented_b_offsets", container={"movflags": "frag_keyframe+empty_moov+negative_cts_offsets"}, options={"g": "10"}),
    _x264("matroska", suffix=".mkv"),
    _x264("quicktime", suffix=".mov"),
    _x264("mpeg_ts", suffix=".ts", fast=False),
    _x264("flash", suffix=".flv", fast=False),
    _x264("misnamed", suffix=".mp4", format="mpegts", fast=False),
    _x264("elementary", suffix=".h264", fast=False),
    _x264("ten_bit", pixel_format="yuv420p10le"),
    _x264("yuv422", pixel_format="yuv422p"),
    _x264("yuv422_ten_bit", pixel_format="yuv422p10le"),
    _x264("yuv444", pixel_format="yuv444p"),
    _x264("yuv444_odd_size", pixel_format="yuv444p", size=(97, 63)),
    _x264("even_but_narrow", size=(98, 66)),
    _x264("tiny", size=(16, 16)),
    _x264("full_range", pixel_format="yuvj420p"),
    _x264("tagged_bt709", tags={"colorspace": _BT709, "color_range": 1}),
    _x264("tagged_bt601", tags={"colorspace": _BT601, "color_range": 1}),
    _x264("tagged_bt2020_ten_bit", pixel_format="yuv420p10le", tags={"colorspace": _BT2020, "color_range": 1}),
    _x264("tagged_bt709_full", tags={"colorspace": _BT709, "color_range": 2}),
    _x264("untagged_hd", size=(1280, 720), numbers=range(6)),
    _x264("interlaced", fast=False, options={"x264-params": "tff=1"}),
    _x264("interlaced_yuv422", fast=False, pixel_format="yuv422p", options={"x264-params": "bff=1"}),
    Odd("joined_midway.mp4", _joined_midway, tuple(range(10, 30)), False),
    Odd("joined_midway.ts", _joined_midway, tuple(range(10, 30)), False),
    _turned("turned_90.mp4", (90, False, False), lambda f: np.rot90(f, -1)),
    _turned("turned_180.mp4", (180, False, False), lambda f: np.rot90(f, 2)),
    _turned("turned_270.mp4", (-90, False, False), lambda f: np.rot90(f, 1)),
    _turned("mirrored.mp4", (0, True, False), lambda f: f[:, ::-1]),
    _turned("upside_down.mp4", (0, False, True), lambda f: f[::-1]),
    _turned("turned_and_mirrored.mp4", (90, True, False), lambda f: np.rot90(f[:, ::-1], -1)),
    _turned("turned_and_flipped.mp4", (90, False, True), lambda f: np.rot90(f[::-1], -1)),
    Odd("turned_90.mkv", lambda p: remux(encode(p.with_suffix(".mp4"), rotation=(90, False, False)), p), turn=lambda f: np.rot90(f, -1)),
    Odd(
        "turned_90_yuv422_odd.mp4",
        lambda p: encode(p, pixel_format="yuv444p", size=(97, 63), rotation=(90, False, False)),
        turn=lambda f: np.rot90(f, -1),
    ),
    _other("mpeg4_b_frames.avi", "mpeg4", options={"bf": "2", "q": "2"}),
    _other("mpeg4_b_frames.mp4", "mpeg4", options={"bf": "2"}),
    Odd("mpeg4_odd_size.mp4", lambda path: encode(path, codec="mpeg4", size=(97, 63)), fast=False, codecs=("mpeg4",), tolerance=2),
    _other("mpeg2_interlaced.ts", "mpeg2video", options={"flags": "+ildct+ilme", "bf": "2", "b": "4M"}),
    _other("mjpeg.avi", "mjpeg", pixel_format="yuvj420p"),
    _other("vp9.webm", "libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8", "b": "2M"}),
    _other("ffv1_ten_bit.mkv", "ffv1", pixel_format="yuv422p10le"),
    _other("ffv1_grey.mkv", "ffv1", pixel_format="gray"),
    _other("prores.mov", "prores_ks", pixel_format="yuv422p10le"),
    _other("hevc_open_gops.mp4", "libx265", fast=True, options={"g": "10", "bf": "3"}),
    _other("hevc_closed_gops.mkv", "libx265", fast=True, options={"g": "10", "bf": "3", "x265-params": "log-level=none:open-gop=0"}),
    _other("hevc_interlaced.mp4", "libx265", options={"bf": "2", "x265-params": "log-level=none:interlace=tff"}),
    _other("hevc_ten_bit.mp4", "libx265", fast=True, pixel_format="yuv420p10le"),
    Odd("hevc_film_grain.mp4", _grained, fast=False, codecs=("libx265",), tolerance=64),
    Odd("hevc_spliced.mp4", _spliced, tuple(n for n in range(30) if n not in (9, 19)), fast=False, codecs=("libx265",)),
    _x264("delimiters", options={"x264-params": "aud=1"}),
    _other("hevc_temporal_layers.mp4", "libx265", options={"bf": "3", "x265-params": "log-level=none:temporal-layers=3:b-adapt=0"}),
)


def available(odd: Odd) -> bool:
    """Whether this build of FFmpeg can make the file."""
    return all(codec in av.codecs_available for codec in odd.codecs)


# --- files that must be refused -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A file that is refused, with the error's class name and words that its message must hold."""

    name: str
    make: Maker
    error: str
    words: tuple[str, ...]


def _written(data: bytes) -> Maker:
    def make(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return make


def _cut(share: float, **settings: object) -> Maker:
    def make(path: Path) -> Path:
        encode(path, **settings)  # type: ignore[arg-type]
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    return make


def _rotten(path: Path) -> Path:
    """Bytes of the first and largest picture overwritten: all that follows refers to it."""
    encode(path, options={"g": "250"})
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    for i in range(at + 1500, at + 2200, 7):
        data[i] ^= 0x5A
    path.write_bytes(data)
    return path


def _sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        _add_sound(out)
    return path


def _cover(path: Path) -> Path:
    """Sound with a cover picture, which is a video stream of one frame to FFmpeg."""
    with av.open(str(path), "w", format="mp4") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = *SIZE, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        _add_sound(out)
        frame = av.VideoFrame.from_ndarray(picture(0), format="rgb24")
        frame.pts = 0
        out.mux(cover.encode(frame))
        out.mux(cover.encode(None))
    return path


def _no_samples(path: Path) -> Path:
    with av.open(str(path), "w", options={"movflags": "empty_moov+frag_keyframe"}) as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        out.start_encoding()
    return path


def _playlist(path: Path) -> Path:
    """An HLS playlist under a video's name: FFmpeg would open what it lists."""
    other = encode(path.with_name("secret.ts"))
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.5,\nfile://{other}\n#EXT-X-ENDLIST\n")
    return path


_SHEARED = (65536, 20000, 0, 0, 65536, 0, 0, 0, 1 << 30)

BAD = (
    Bad("missing.mp4", lambda path: path, "NoVideoError", ("No such file",)),
    Bad("folder.mp4", lambda path: (path.mkdir(), path)[1], "NoVideoError", ("folder",)),
    Bad("empty.mp4", _written(b""), "NoVideoError", ("0 bytes",)),
    Bad("garbage.mp4", _written(np.random.default_rng(0).bytes(20_000)), "CorruptClipError", ("cannot be opened",)),
    Bad("text.mp4", _written(b"<html>404 not found</html>" * 40), "CorruptClipError", ("cannot be opened",)),
    Bad("playlist.m3u8", _playlist, "CorruptClipError", ("cannot be opened",)),
    Bad("sound_only.mp4", _sound_only, "NoVideoError", ("no video stream", "audio")),
    Bad("sound_with_cover.mp4", _cover, "NoVideoError", ("no video stream",)),
    Bad("no_samples.mp4", _no_samples, "NoVideoError", ("single decodable frame",)),
    Bad("truncated_index_last.mp4", _cut(0.6), "TruncatedClipError", ("mdat",)),
    Bad("truncated_in_index.mp4", _cut(0.99), "TruncatedClipError", ("moov",)),
    Bad("truncated_faststart.mp4", _cut(0.6, container={"movflags": "faststart"}), "TruncatedClipError", ("of 30 frames are whole",)),
    Bad("truncated_fragments.mp4", _cut(0.55, container=_FRAGMENTS, options={"g": "10"}), "TruncatedClipError", ("mdat",)),
    Bad("truncated.mkv", _cut(0.6), "TruncatedClipError", ("segment",)),
    Bad("rotten.mp4", _rotten, "CorruptClipError", ("cannot be trusted",)),
    Bad("resolution_change.ts", lambda path: joined_sizes(path), "RefusedClipError", ("96x64", "128x96")),
    Bad("resolution_change.mp4", lambda path: joined_sizes(path), "RefusedClipError", ("96x64", "128x96")),
    Bad("turned_33.mp4", lambda path: encode(path, rotation=(33, False, False)), "RefusedClipError", ("33", "frames.rotation")),
    Bad("sheared.mp4", lambda path: encode(path, matrix=_SHEARED), "RefusedClipError", ("sheared",)),
)
