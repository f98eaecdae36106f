"""Decoded frames to RGB: one filter graph a clip, orientation by the display matrix.

The graph is what the ffmpeg program uses, so the result is the program's, bit for bit; `VideoFrame.to_ndarray` is not for
10-bit, interlaced and odd-sized video, and costs more.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer

from stagebench.errors import RefusedClipError
from stagebench.sources._request import Request, words

if TYPE_CHECKING:
    from av.buffer import Buffer
    from av.filter.context import FilterContext
    from av.video.frame import VideoFrame

__all__ = ["Converter"]

# The display matrix (a b; c d) moves a point to x' = ax + cy, y' = bx + dy, y downwards. Filters that do the same:
_ORIENTATIONS: dict[tuple[int, int, int, int], tuple[tuple[str, str], ...]] = {
    (1, 0, 0, 1): (),
    (-1, 0, 0, 1): (("hflip", ""),),
    (1, 0, 0, -1): (("vflip", ""),),
    (-1, 0, 0, -1): (("hflip", ""), ("vflip", "")),
    (0, 1, -1, 0): (("transpose", "dir=clock"),),
    (0, -1, 1, 0): (("transpose", "dir=cclock"),),
    (0, 1, 1, 0): (("transpose", "dir=cclock_flip"),),
    (0, -1, -1, 0): (("transpose", "dir=clock_flip"),),
}
_UPRIGHT = (1, 0, 0, 1)
_TOLERANCE = 0.01


class _Properties(NamedTuple):
    """What a filter graph is configured for. A frame that differs needs another graph."""

    width: int
    height: int
    pixel_format: str
    color_space: int
    color_range: int
    orientation: tuple[int, int, int, int]


class Converter:
    """Turns a clip's frames into RGB; `expected` is how many the clip has. Not for use by several threads at once."""

    def __init__(self, request: Request, expected: int) -> None:
        self._request = request
        self._expected = expected
        self._size: tuple[int, int] | None = None
        self._properties: _Properties | None = None
        self._graph: Graph | None = None
        self._source: FilterContext
        self._sink: FilterContext

    def check(self, frame: VideoFrame) -> None:
        """Every decoded frame, whether asked for or not. Raises CorruptClipError, RefusedClipError."""
        if frame.is_corrupt:
            raise self._request.corrupt(f"the frame at pts {frame.pts} is damaged")
        size = (frame.width, frame.height)
        if self._size is None:
            self._size = size
            self._request.check_work(self._expected, *size)  # the container may have said another size
        elif size != self._size:
            raise RefusedClipError(
                f"{self._request.path}: its frames change from {self._size[0]}x{self._size[1]} to {size[0]}x{size[1]} pixels at pts "
                f"{frame.pts}, expected one size. Encode the clip at one size, or cut it where the size changes."
            )

    def convert(self, frame: VideoFrame) -> np.ndarray:
        """RGB uint8 [H, W, 3]: a view that the next call may overwrite. Raises RefusedClipError for its orientation."""
        properties = _Properties(
            frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range), self._orientation(frame)
        )
        if properties != self._properties:
            if self._properties is not None and properties.orientation != self._properties.orientation:
                raise RefusedClipError(f"{self._request.path}: its rotation changes at pts {frame.pts}. Set frames.rotation: ignore.")
            self._configure(properties)
        try:
            self._source.push(frame)
            rgb = cast("VideoFrame", self._sink.pull())
        except Exception as error:  # PyAV's own beside FFmpeg's
            raise self._request.corrupt(
                f"the frame at pts {frame.pts} ({frame.format.name}) does not convert to RGB: {words(error)}"
            ) from error
        plane = rgb.planes[0]
        # rows may be padded at their end
        return np.ndarray((rgb.height, rgb.width, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))

    def _configure(self, properties: _Properties) -> None:
        graph = Graph()
        graph.threads = 1
        self._source = graph.add(
            "buffer",
            video_size=f"{properties.width}x{properties.height}",
            pix_fmt=properties.pixel_format,
            time_base="1/1000",  # of no account: pts are taken from the decoded frame
            pixel_aspect="1/1",
            colorspace=str(properties.color_space),
            range=str(properties.color_range),
        )
        turns = [graph.add(name, args or None) for name, args in _ORIENTATIONS[properties.orientation]]
        self._sink = graph.add("buffersink")
        graph.link_nodes(self._source, *turns, graph.add("format", "pix_fmts=rgb24"), self._sink)
        graph.configure()
        self._graph, self._properties = graph, properties  # contexts hold their graph weakly

    def _orientation(self, frame: VideoFrame) -> tuple[int, int, int, int]:
        if self._request.rotation == "ignore":
            return _UPRIGHT
        # not `frame.side_data`: the frame would keep it, and it the frame, until the collector comes by: 19 MB a clip of 8 x 1440x1080
        found = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # its stub leaves out __init__
        if found is None:
            return _UPRIGHT
        matrix = struct.unpack("=9i", bytes(cast("Buffer", found)))
        corners = (matrix[0], matrix[1], matrix[3], matrix[4])
        largest = max(map(abs, corners)) or 1
        scaled = [value / largest for value in corners]
        turned = tuple(round(value) for value in scaled)
        right_angle = turned in _ORIENTATIONS and all(abs(v - r) <= _TOLERANCE for v, r in zip(scaled, turned, strict=True))
        if right_angle and turned == _UPRIGHT:
            return _UPRIGHT
        degrees = round(-math.degrees(math.atan2(matrix[1], matrix[0])))
        if self._request.rotation == "refuse":
            raise RefusedClipError(
                f"{self._request.path}: turned by {degrees} degrees or mirrored by its metadata, expected upright (frames.rotation: "
                "refuse). Set frames.rotation: apply to read it as players show it, or ignore."
            )
        if not right_angle:
            raise RefusedClipError(
                f"{self._request.path}: turned by {degrees} degrees or sheared by its metadata, expected a multiple of 90. "
                "Set frames.rotation: ignore, or encode the clip upright."
            )
        return (turned[0], turned[1], turned[2], turned[3])
