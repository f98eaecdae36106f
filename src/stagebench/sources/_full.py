"""Decoding everything, frames in the order in which the decoder puts them out: for the files of which packets prove nothing.

The count is not known before the end, so the frames are picked for as many as there are packets, and once more if
that was wrong. Memory holds the packets and the frames asked for, never the decoded clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import av.error
import numpy as np

from stagebench.errors import TruncatedClipError
from stagebench.sources._memory import empty
from stagebench.sources._pixels import Converter
from stagebench.sources._request import Request, Video, words
from stagebench.sources.frames import Frames, pick

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

__all__ = ["read"]


def read(request: Request) -> Frames:
    """The frames, or the SourceError that says why not."""
    guess: int | None = None
    for _ in range(2):
        with request.open(probe=True) as video:
            packets = list(request.demux(video))
            frames, total = _attempt(request, video, packets, guess)
        if frames is not None:
            return frames
        guess = total
    raise request.corrupt("two decodes of it gave different numbers of frames")


def _attempt(request: Request, video: Video, packets: list[Packet], guess: int | None) -> tuple[Frames | None, int]:
    """Frames picked for `guess` frames, None where the count turns out to be another, and that count."""
    expected = guess if guess is not None else max(1, sum(1 for p in packets if not p.is_discard))
    request.check_work(max(expected, len(packets)), video.stream.width, video.stream.height)
    # a first guess may be short by error, so it is not yet held against short_clips
    indices = request.choose(expected) if guess is not None else pick(expected, request.count, request.sampling)
    places: dict[int, list[int]] = {}
    for place, i in enumerate(indices):
        places.setdefault(i, []).append(place)
    converter = Converter(request, expected)
    pixels: np.ndarray | None = None
    pts = np.zeros(request.count, np.int64)
    total = 0
    for frame in _decode(request, video, packets):
        converter.check(frame)
        for place in places.get(total, ()):
            rgb = converter.convert(frame)
            if pixels is None:
                pixels = empty((request.count, *rgb.shape))
            pixels[place] = rgb
            del rgb
            pts[place] = frame.pts if frame.pts is not None else total
        total += 1
        request.check_work(total, frame.width, frame.height)
    if total != expected or pixels is None:
        request.choose(total)  # a clip that is too short says so here
        return None, total
    chosen = np.asarray(request.choose(total), np.int64)
    return Frames(pixels, pts, chosen, total, video.stream.time_base), total


def _decode(request: Request, video: Video, packets: list[Packet]) -> Iterator[VideoFrame]:
    context = video.stream.codec_context
    started, first_error = False, ""
    for number, packet in enumerate([*packets, None]):
        if packet is not None and packet.is_corrupt:
            raise TruncatedClipError(
                f"{request.path}: packet {number + 1} of {len(packets)} is incomplete: the file's end may be missing. Download it again."
            )
        try:
            frames = context.decode(packet)
        except av.error.EOFError:
            continue
        except Exception as error:  # PyAV's own beside FFmpeg's
            # a stream that is joined midway begins with what refers to frames before it; ffmpeg passes over that too
            if not started:
                first_error = first_error or words(error)
                continue
            raise request.corrupt(f"packet {number + 1} of {len(packets)} does not decode: {words(error)}") from error
        for frame in frames:
            started = True
            yield frame
    if first_error and not started:
        raise request.corrupt(f"none of its {len(packets)} packets decodes: {first_error}")
