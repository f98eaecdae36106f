"""Frames of a video file: `read_frames`, the one public reader of MP4s and what else FFmpeg decodes.

What is returned is bit-identical to FFmpeg's own `-pix_fmt rgb24 -fps_mode passthrough` of the same frames: the stream's
colour matrix and range by its tags, BT.601 and limited range where it has none (as ffmpeg does), rotation and flips applied
as players do; pixels are not stretched for a sample aspect ratio, HDR is not mapped. Two ways lead there: `_fast` decodes
only what the asked frames need and is taken where the file's packets prove it exact; `_full` decodes everything and is
taken everywhere else.

What is not found: damage that is itself a valid bitstream (1 of 20 flipped bits in H.264, more in H.265 and VP9, which
mark little); a whole packet that is gone, but for H.264 without interlacing in MP4 and MKV, whose frame numbers tell (not of a
picture that no other refers to, nor of an IDR picture where every other one is); and an MPEG-TS or raw stream cut between two
frames, for those say nowhere how long they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from stagebench.sources.frames import MAX_IMAGE_PIXELS, Frames, choose, pick, regular_file

__all__ = ["LIMITS", "Limits", "Rotation", "read_frames"]

Rotation = Literal["apply", "refuse", "ignore"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a clip may be at most. A file beyond any of these is refused before it is decoded."""

    file_bytes: int = 1 << 30
    """1 GiB: a worker holds the file's packets in memory while it decodes."""
    frame_pixels: int = MAX_IMAGE_PIXELS
    """67 megapixels. Given to the decoder too, so that a header that lies about the size changes nothing."""
    frames: int = 1 << 20
    """A million packets: 9.7 hours at 30 frames a second."""
    clip_pixels: int = 1 << 40
    """All frames together: half an hour of 8K, 1.5 hours of 4K, at 60 frames a second. Bounds the time of a decode."""
    output_bytes: int = 4 << 30
    """4 GiB of RGB returned: 32 frames of 6K."""


LIMITS = Limits()


def read_frames(
    path: str | Path,
    count: int,
    sampling: str = "linspace",
    *,
    short_clips: str = "error",
    rotation: str = "apply",
    limits: Limits = LIMITS,
) -> Frames:
    """`count` frames of a video file, in presentation order, picked by `stagebench.sources.frames.pick`.

    `rotation`: apply turns and mirrors frames as the file's display matrix says (so do players), ignore leaves them as
    coded, refuse raises. `.pts` are in the stream's time base; `.available` counts the clip's decodable frames, never what
    a header claims. One thread; safe in threads and in processes. Nothing is kept between calls but memory: arrays above 32 MB that
    nobody holds any more are used again.

    Raises a SourceError, which names the file, what was found and what to do: NoVideoError (missing, empty, no video stream,
    no frame), ShortClipError, TruncatedClipError, CorruptClipError (does not open, or a frame does not decode cleanly),
    RefusedClipError (rotation, size changes within the clip), TooLargeError. ValueError for a wrong argument.
    """
    pick(1, count, sampling)  # wrong arguments are the caller's, whatever the file: raise before it is opened
    choose(path, count, count, sampling, short_clips)
    if rotation not in get_args(Rotation):
        raise ValueError(f"rotation {rotation!r}: expected one of {get_args(Rotation)}")
    # PyAV takes a tenth of a second to import: whoever only plans must not pay for it
    from stagebench.sources import _fast, _full, _request

    path = Path(path)
    size = regular_file(path, "video")
    request = _request.Request(path, size, count, sampling, short_clips, rotation, limits)
    request.check_file()
    try:
        return _fast.read(request)
    except _fast.NotProven as reason:
        log.debug("%s: decoded in full, because %s", path, reason)
    return _full.read(request)
