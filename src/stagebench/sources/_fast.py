"""Decoding no more than the asked frames need.

Frames that no other frame refers to are left out unless asked for, so are whole groups of pictures from which nothing is
asked, and everything after the last frame asked for. Frames are recognised by their pts. `NotProven` where the file
does not prove that this gives what a full decode gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stagebench.errors import CorruptClipError
from stagebench.sources._bitstream import Doubt, Lost, Picture, survey
from stagebench.sources._memory import empty
from stagebench.sources._pixels import Converter
from stagebench.sources._request import Request, Video, words
from stagebench.sources.frames import Frames

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame

__all__ = ["NotProven", "read"]

_CHANGES = ("new_extradata", "param_change")
_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})  # whose packets carry true pts


class NotProven(Exception):
    """Why the clip is to be decoded in full."""


class _Index(NamedTuple):
    """The clip by its packets: `pts` of the decodable frames in presentation order; `packets` and what they are in decoding order."""

    packets: Sequence[Packet]
    pts: list[int]
    pictures: list[Picture]


def read(request: Request) -> Frames:
    """The frames, exactly. Raises NotProven, and the SourceErrors of `read_frames` that are certain without a full decode."""
    with request.open(probe=False) as video:
        index = _index(request, video)
        indices = request.choose(len(index.pts))
        request.check_work(len(index.packets), video.stream.width, video.stream.height)
        targets = sorted({index.pts[i] for i in indices})
        pixels: np.ndarray | None = None
        places: dict[int, list[int]] = {}
        for place, i in enumerate(indices):
            places.setdefault(index.pts[i], []).append(place)
        converter = Converter(request, len(index.packets))
        for frame in _decode(video.stream.codec_context, index, set(targets)):
            try:
                converter.check(frame)
            except CorruptClipError as error:  # a full decode is the judge of what is damaged
                raise NotProven(str(error)) from error
            if frame.interlaced_frame:
                raise NotProven("it is interlaced")
            wanted = places.pop(frame.pts, None) if frame.pts is not None else None
            if wanted is None:
                continue
            rgb = converter.convert(frame)
            if pixels is None:
                pixels = empty((request.count, *rgb.shape))
            for place in wanted:
                pixels[place] = rgb
            del rgb  # else the graph needs a second buffer, and its page faults, for the next frame
        if places or pixels is None:
            raise NotProven(f"{len(places)} frames of its index did not come out of the decoder")
        chosen = np.asarray(indices, np.int64)
        return Frames(pixels, np.asarray(index.pts, np.int64)[chosen], chosen, len(index.pts), video.stream.time_base)


def _index(request: Request, video: Video) -> _Index:
    if video.container.format.name not in _CONTAINERS:
        raise NotProven(f"its container is {video.container.format.name}")
    try:
        packets = list(request.demux(video))
    except CorruptClipError as error:
        raise NotProven(str(error)) from error
    if not packets:
        raise NotProven("it has no packets")
    if any(p.is_corrupt for p in packets):
        raise NotProven("a packet is damaged")
    try:
        changes = any(side.data_type in _CHANGES for packet in packets for side in packet.iter_sidedata())
    except IndexError as error:
        raise NotProven("a packet brings what PyAV has no name for") from error
    if changes:
        raise NotProven("its parameters change")
    try:
        pictures = survey(video.stream.codec_context.name, video.stream.codec_context.extradata, packets)
    except Doubt as doubt:
        raise NotProven(str(doubt)) from doubt
    except Lost as lost:
        raise request.corrupt(str(lost)) from lost
    if not pictures[0].idr:
        raise NotProven("it does not start with an IDR picture")
    pts: list[int] = [p.pts for p in packets if p.pts is not None]
    if len(pts) < len(packets) or len(set(pts)) < len(pts):
        raise NotProven("its packets do not have a pts each")
    if min(pts) < pts[0]:
        raise NotProven("frames are shown before its first picture")
    return _Index(packets, _shown(packets, pts, pictures), pictures)


def _shown(packets: Sequence[Packet], pts: list[int], pictures: list[Picture]) -> list[int]:
    """The pts in the order of showing, of what is shown. Raises NotProven unless frames come out of the decoder in that order; of clips
    joined without a new encoding they may not."""
    places: list[tuple[int, tuple[int, int]]] = []
    group = 0
    for time, packet, picture in zip(pts, packets, pictures, strict=True):
        group += picture.idr
        if not packet.is_discard:
            places.append((time, (group, picture.order)))
    places.sort()
    if any(one >= other for (_, one), (_, other) in pairwise(places)):
        raise NotProven("its timestamps are not in the order of its pictures")
    return [time for time, _ in places]


def _decode(context: VideoCodecContext, index: _Index, targets: set[int]) -> Iterator[VideoFrame]:
    """Decoded frames, `targets` (pts) among them, in any order. Raises NotProven when the decoder complains."""
    context.reorder_depth = max(context.reorder_depth, _reordering(index.packets))
    context.skip_frame = "DEFAULT"  # opening left it elsewhere
    try:
        for group in _needed(index, targets):
            for packet in group:
                yield from context.decode(packet)
            yield from context.decode(None)
            context.flush_buffers()
    except Exception as error:  # a full decode will tell what it is
        raise NotProven(f"the decoder reports: {words(error)}") from error


def _needed(index: _Index, targets: set[int]) -> list[list[Packet]]:
    """Runs of packets to decode, each starting at an IDR picture; between them are runs without a target, which are left out."""
    starts = [i for i, picture in enumerate(index.pictures) if picture.idr]
    runs: list[list[Packet]] = []
    whole = False  # is the last run complete up to here? Then there is no reason to drain the decoder
    for start, end in zip(starts, [*starts[1:], len(index.packets)], strict=True):
        last = max((i for i in range(start, end) if index.packets[i].pts in targets), default=-1)
        if last >= 0:
            if not whole:
                runs.append([])
            both = zip(index.packets[start : last + 1], index.pictures[start : last + 1], strict=True)
            runs[-1] += [packet for packet, picture in both if not picture.spare or packet.pts in targets]
        whole = last + 1 == end
    return runs


def _reordering(packets: Sequence[Packet]) -> int:
    """How many frames, at most, are decoded before a frame and shown after it: what the decoder must hold back."""
    order = sorted(range(len(packets)), key=lambda i: packets[i].pts or 0)
    return max((i - place for place, i in enumerate(order)), default=0)
