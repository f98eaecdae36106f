"""What `read_frames` was asked for, and the checks and messages that both ways of decoding share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
from av.stream import Disposition

from stagebench.errors import CorruptClipError, NoVideoError, SourceError, TooLargeError, TruncatedClipError
from stagebench.sources import _boxes
from stagebench.sources.frames import choose

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

    from stagebench.sources.video import Limits

__all__ = ["Request", "Video", "words"]

# A playlist (HLS, DASH, concat, SDP) under an innocent name would make FFmpeg read other files or the network.
_FORMATS = "mov,mp4,matroska,webm,mpegts,mpeg,avi,flv,ogg,asf,h264,hevc,m4v,mpegvideo,mjpeg,ivf,nut,mxf,wtv,rm,dv"
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}


class Video(NamedTuple):
    """An opened file and its video stream."""

    container: InputContainer
    stream: VideoStream


@dataclass(frozen=True)
class Request:
    """The arguments of one `read_frames` call; `size` is the file's, in bytes."""

    path: Path
    size: int
    count: int
    sampling: str
    short_clips: str
    rotation: str
    limits: Limits

    def check_file(self) -> None:
        """Before FFmpeg sees the file. Raises TooLargeError, TruncatedClipError."""
        if self.size > self.limits.file_bytes:
            raise TooLargeError(
                f"{self.path}: {self.size:,} bytes, at most {self.limits.file_bytes:,} are read. Cut it into shorter clips."
            )
        missing = _boxes.missing_end(self.path, self.size)
        if missing:
            raise TruncatedClipError(f"{self.path}: truncated: {missing}{self._whole_frames()}. Copy or download it again.")

    def _whole_frames(self) -> str:
        """How much of a truncated file is there, where its index tells; for the message only."""
        try:
            with self.open(probe=False) as video:
                claimed = video.stream.frames
                whole = sum(1 for p in self.demux(video) if not p.is_corrupt)
        except SourceError:
            return ""
        return f"; {whole} of {claimed} frames are whole" if claimed else ""

    @contextmanager
    def open(self, *, probe: bool) -> Iterator[Video]:
        """The file, closed again whatever happens.

        `probe` lets FFmpeg decode the first frames to learn the stream's parameters, which costs up to a fifth of reading a
        one-second clip; MP4 and Matroska state them in their headers.
        """
        options = {**_OPTIONS, **self._decoder_options()}
        if not probe:
            options["skip_frame"] = "all"
        try:
            # "file:": a name with a colon in it is a name, not a protocol. Bad bytes in a title must not fail the clip.
            container = av.open(f"file:{self.path}", options=options, metadata_errors="replace")
        except Exception as error:  # beside FFmpeg's errors PyAV raises what a hostile header makes it: ValueError, RuntimeError
            raise CorruptClipError(
                f"{self.path}: cannot be opened as video: {words(error)}. Expected MP4, Matroska or the like."
            ) from error
        with container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & Disposition.attached_pic:
                kinds = sorted({s.type for s in container.streams}) or ["nothing"]
                raise NoVideoError(f"{self.path}: no video stream, found {', '.join(kinds)}. Point the index at the clip's video.")
            if stream.codec_context is None:
                raise CorruptClipError(f"{self.path}: its video codec is unknown to this FFmpeg. Encode it as H.264.")
            self._check_size(stream.width, stream.height)
            stream.codec_context.options = self._decoder_options()
            stream.codec_context.thread_count = 1
            stream.codec_context.thread_type = "NONE"
            yield Video(container, stream)

    def demux(self, video: Video) -> Iterator[Packet]:
        """The video stream's packets in decoding order, without the empty one at the end. Raises CorruptClipError, TooLargeError."""
        taken = 0
        try:
            for packet in video.container.demux(video.stream):
                if packet.size:
                    taken += 1
                    yield packet
                if taken > self.limits.frames:
                    raise TooLargeError(f"{self.path}: more than {self.limits.frames:,} frames. Cut it into shorter clips.")
        except SourceError:
            raise
        except Exception as error:  # and IndexError where a stream appears midway
            raise CorruptClipError(
                f"{self.path}: its packets cannot be read after {taken}: {words(error)}. Write the file again."
            ) from error

    def choose(self, total: int) -> list[int]:
        """Indices to return. Raises NoVideoError, ShortClipError."""
        if not total:
            raise NoVideoError(f"{self.path}: a video stream without a single decodable frame. Encode the clip again.")
        return choose(self.path, total, self.count, self.sampling, self.short_clips)

    def check_work(self, frames: int, width: int, height: int) -> None:
        """Raises TooLargeError when decoding or returning the frames is more than a clip may be."""
        self._check_size(width, height)
        if frames * width * height > self.limits.clip_pixels:
            raise TooLargeError(
                f"{self.path}: {frames:,} frames of {width}x{height} decode to {frames * width * height:,} pixels, at most "
                f"{self.limits.clip_pixels:,} are decoded. Cut or scale the clip."
            )
        if self.count * width * height * 3 > self.limits.output_bytes:
            raise TooLargeError(
                f"{self.path}: {self.count} frames of {width}x{height} take {self.count * width * height * 3:,} bytes, at most "
                f"{self.limits.output_bytes:,} are returned. Lower frames.count, or scale the clip."
            )

    def _decoder_options(self) -> dict[str, str]:
        # the decoder itself refuses a picture beyond this, whatever the container says about its size
        return {"max_pixels": str(self.limits.frame_pixels)}

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.limits.frame_pixels:
            raise TooLargeError(
                f"{self.path}: frames of {width}x{height} pixels, at most {self.limits.frame_pixels:,} pixels are decoded. Scale the clip."
            )

    def corrupt(self, what: str) -> CorruptClipError:
        return CorruptClipError(f"{self.path}: {what}. Its frames cannot be trusted: encode or download the clip again.")


def words(error: BaseException) -> str:
    """FFmpeg's words for an error, without PyAV's number, name and log line around them."""
    return getattr(error, "strerror", None) or str(error)
