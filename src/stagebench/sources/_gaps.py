"""Whether an H.264 stream's frame numbers show that a picture is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stagebench.sources._bits import Bits, Doubt, Lost, units
from stagebench.sources._marking import empties, parameters

if TYPE_CHECKING:
    from av.packet import Packet

__all__ = ["Numbering", "check_gaps"]

_SLICE, _IDR, _PPS = 1, 5, 8


class Numbering(NamedTuple):
    """How a slice header says its frame_num and its picture order count."""

    width: int
    """Bits: log2_max_frame_num; H.265 has none."""
    before: int
    """Bits of colour_plane_id before it."""
    order: int
    """Bits: log2_max_pic_order_cnt_lsb; 0 where pictures are shown in the order of decoding (pic_order_cnt_type 2)."""
    chroma: bool = True
    """Whether weights of prediction are given for it."""


def check_gaps(
    pictures: list[tuple[bool, int, bool]], numbering: Numbering, packets: Sequence[Packet], length_size: int, sets: Sequence[bytes]
) -> None:
    """Raises Doubt unless each picture's frame_num follows that of the last one that others may refer to (ITU-T H.264, 7.4.3).

    `pictures`, one a packet: whether it is an IDR picture, its frame_num, whether others may refer to it. `sets`: the header's picture
    parameter sets.
    Lost if a picture that is predicted from others jumps ahead. Where a stream starts or is joined midway, its first picture refers to
    none; after memory_management_control_operation 5 follows 1 (7.4.3.3); a decoder takes the last number again for another part of the
    same picture. None of these is a loss.
    """
    due, doubt, last = 0, "", -1
    for at, (idr, number, referred_to) in enumerate(pictures):
        right = 0 if idr else due
        if number != right:
            doubt = doubt or f"frame_num {number} stands where {right} is due: a picture is missing"
            again = (due - 1) % (1 << numbering.width)
            legal = last < 0 or idr or number == again or _intra(packets[at], length_size)
            if not legal and not (number == 1 and _may_empty(packets, last, numbering, length_size, sets)):
                raise Lost(f"picture {at + 1} of {len(pictures)} has frame_num {number} where {due} is due: one before it is missing")
        if referred_to:
            due, last = (number * (not idr) + 1) % (1 << numbering.width), at
    if doubt:
        raise Doubt(doubt)


def _intra(packet: Packet, length_size: int) -> bool:
    """Whether the picture's first slice is predicted from no other (slice_type I or SI; ITU-T H.264, 7.3.3 and table 7-6)."""
    return _first_slice(packet, length_size, 16).golomb() % 5 in (2, 4)


def _first_slice(packet: Packet, length_size: int, size: int) -> Bits:
    """The header of the packet's first slice, behind first_mb_in_slice."""
    first = next(unit for unit in units(packet, length_size) if unit[0] & 31 in (_SLICE, _IDR))
    bits = Bits(bytes(first[1 : 1 + size]))
    bits.golomb()
    return bits


def _may_empty(packets: Sequence[Packet], at: int, numbering: Numbering, length_size: int, sets: Sequence[bytes]) -> bool:
    """Whether memory_management_control_operation 5 stands in a picture, or may, for its parameters are not known for certain."""
    kind = next(unit[0] & 31 for unit in units(packets[at], length_size) if unit[0] & 31 in (_SLICE, _IDR))
    if kind == _IDR:
        return False
    found = {unit for unit in sets if unit and unit[0] & 31 == _PPS}
    for packet in packets:
        found |= {bytes(unit) for unit in units(packet, length_size) if unit[0] & 31 == _PPS}
    known = [parameters(Bits(unit[1:])) for unit in found]
    bits = _first_slice(packets[at], length_size, 16)
    bits.golomb()
    number = bits.golomb()
    said = {layout for name, layout in known if name == number}
    layout = said.pop() if len(said) == 1 else None
    if layout is None:
        return True
    width = numbering.before + numbering.width
    header = _first_slice(packets[at], length_size, 1024)
    return empties(header, layout, number=width, order=numbering.order, chroma=numbering.chroma)
