"""What the packets of an H.264 or H.265 stream prove about it, from their first bytes, before anything is decoded.

`survey` answers whether packets and frames correspond one to one and whether frames that no other frame refers to may be
left out. It says so only where it can show it; any doubt is a reason, in words, to decode in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from stagebench.sources._bits import Bits, Doubt, Lost, units
from stagebench.sources._gaps import Numbering, check_gaps

if TYPE_CHECKING:
    from av.packet import Packet

__all__ = ["Doubt", "Lost", "Picture", "survey"]

_H264_SLICE, _H264_PARTITIONS, _H264_IDR, _H264_SPS = 1, (2, 3, 4), 5, 7
_H264_OF_ONE = (6, 9, 12)
"""Supplemental information, delimiter, filler: of account for their own picture at most."""
_HEVC_LAST_SLICE_TYPE, _HEVC_IRAP, _HEVC_BLA, _HEVC_IDR = 31, range(16, 24), (16, 17, 18), (19, 20)
_HEVC_SPS, _HEVC_PPS, _HEVC_ENDS = 33, 34, (36, 37)
_HEVC_LAST_N, _HEVC_OF_ONE = 14, (35, 38, 39, 40)
_HEVC_COUNTS = (1, 3, 5, *_HEVC_IRAP)
"""Neither leading pictures nor those of _N."""
_HEVC_RESERVED = (*range(10, 16), *range(22, 32))
"""Slices that a decoder passes over."""
_H264_SEI, _HEVC_SEI = 6, 39
_LASTING = {19: "film grain", 47: "an orientation of its own"}
"""Supplemental information that changes pixels and may hold for the pictures that follow, decoded or not."""
_AOM_GRAIN = b"\xb5\x58\x90"


class Picture(NamedTuple):
    """What a packet is."""

    idr: bool
    """Decoding can start afresh here."""
    spare: bool
    """Nothing in the packet is of account for any other picture: it can be left out unless its own is wanted."""
    order: int = 0
    """When it is shown among the pictures from one IDR picture to the next: its picture order count."""


def survey(codec: str, extradata: bytes | None, packets: Sequence[Packet]) -> list[Picture]:
    """What each packet is, in decoding order.

    Proven when it returns: every packet holds one whole coded picture; every picture is a frame (no fields); the stream has
    one sequence parameter set, the header's; a picture marked as not referred to (`nal_ref_idc` 0, or the H.265 types that
    end in _N within one temporal layer) is referred to by none; no picture's pixels depend on another's supplemental
    information; in H.264 no picture that others refer to is missing, which recordings with network loss do not say elsewhere.
    Raises Lost where one is missing for certain, Doubt for all else.
    """
    if codec == "h264":
        length_size, known, picture_sets = _avcc(extradata or b"")
        numbering = _h264_numbering(known[0])
        found = [_h264_picture(packet, length_size, known, numbering) for packet in packets]
        check_gaps(
            [(picture.idr, number, referred_to) for picture, number, referred_to in found],
            numbering,
            packets,
            length_size,
            picture_sets,
        )
        return _in_order([(picture, referred_to) for picture, _, referred_to in found], numbering.order)
    if codec == "hevc":
        length_size, known = _hvcc(extradata or b"")
        counting = _hevc_counting(known[0])
        ends = [_hevc_picture(packet, length_size, known, counting) for packet in packets]
        for (_, _, ended), (picture, _, _) in pairwise(ends):
            if ended and not picture.idr:
                raise Doubt("a sequence ends before a picture that is not an IDR picture")
        return _in_order([(picture, counts) for picture, counts, _ in ends], counting.order)
    raise Doubt(f"{codec} is neither h264 nor hevc")


def _in_order(pictures: list[tuple[Picture, bool]], width: int) -> list[Picture]:
    """The pictures, `order` counted on from its lowest bits (ITU-T H.264, 8.2.1.1; H.265, 8.3.1); beside each, whether others count
    from it."""
    if not width:
        return [Picture(picture.idr, picture.spare, place) for place, (picture, _) in enumerate(pictures)]
    found, last, turn = [], 0, 1 << width
    for picture, counts in pictures:
        if picture.idr:
            last = 0
        order = last + (picture.order - last + turn // 2 - 1) % turn - turn // 2 + 1  # half a turn counts as ahead
        found.append(Picture(picture.idr, picture.spare, order))
        if counts:
            last = order
    return found


_Numbered = tuple[Picture, int, bool]
"""A picture, its frame_num, and whether others may refer to it."""


def _head(unit: memoryview, names: int, bits: int, passed: int) -> tuple[int, int]:
    """The first bytes of a slice's header behind `names` bytes, `bits` bits and `passed` Exp-Golomb codes, and how many bits that are."""
    head = unit[names : names + 12].tobytes()
    if b"\x00\x00\x03" in head:
        head = unit[names : names + 24].tobytes().replace(b"\x00\x00\x03", b"\x00\x00")
    left = 8 * len(head) - bits
    return _passed(int.from_bytes(head, "big"), left, passed)


def _passed(value: int, left: int, codes: int) -> tuple[int, int]:
    value &= (1 << left) - 1
    for _ in range(codes):
        left -= 2 * (left - value.bit_length()) + 1
        if left < 0:
            raise Doubt("a slice is cut short")
        value &= (1 << left) - 1
    return value, left


def _numbers(unit: memoryview, numbering: Numbering, idr: bool) -> tuple[int, int]:
    """frame_num and pic_order_cnt_lsb, behind first_mb_in_slice, slice_type and pic_parameter_set_id (7.3.3); the first is the one bit
    of a picture's first slice."""
    value, left = _head(unit, 1, 1, 2)
    left -= numbering.before + numbering.width
    if left < 0:
        raise Doubt("a slice is cut short")
    number = value >> left & (1 << numbering.width) - 1
    value, left = _passed(value, left, int(idr))  # idr_pic_id
    left -= numbering.order
    if left < 0:
        raise Doubt("a slice is cut short")
    return number, value >> left & (1 << numbering.order) - 1


def _h264_picture(packet: Packet, length_size: int, known: list[bytes], numbering: Numbering) -> _Numbered:
    pictures, idr, spare, referred_to, number, order = 0, False, True, False, 0, 0
    for unit in units(packet, length_size):
        kind = unit[0] & 31
        if kind in (_H264_SLICE, _H264_IDR):
            if len(unit) < 3:
                raise Doubt("a slice is cut short")
            if unit[1] >> 7:  # first_mb_in_slice == 0 is coded as one set bit
                pictures += 1
                number, order = _numbers(unit, numbering, kind == _H264_IDR)
            idr |= kind == _H264_IDR
            referred_to |= unit[0] & 0x60 != 0  # nal_ref_idc
        elif kind in _H264_PARTITIONS:
            raise Doubt("its slices are partitioned")
        elif kind == _H264_SPS and bytes(unit) not in known:
            raise Doubt("a packet brings another sequence parameter set")
        else:
            if kind == _H264_SEI:
                _check_sei(unit, 1)
            spare &= kind in _H264_OF_ONE
    if pictures != 1:
        raise Doubt(f"a packet holds {pictures} pictures")
    # an IDR picture empties the decoder, even one marked as not referred to
    return Picture(idr, spare and not referred_to and not idr, order), number, referred_to


def _hevc_picture(packet: Packet, length_size: int, known: list[bytes], counting: Numbering) -> tuple[Picture, bool, bool]:
    """And whether the order of others is counted from it (8.3.1), and whether a sequence ends with it: what may be shown of the next
    picture's group then is another matter (8.1.3)."""
    pictures, idr, spare, order, counts = 0, False, True, 0, True
    begun = starts_new = ended = False
    for unit in units(packet, length_size):
        if len(unit) < 2:
            raise Doubt("a unit is cut short")
        kind, layer, temporal = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3, unit[1] & 7
        if layer:
            raise Doubt("it has several layers")
        if kind <= _HEVC_LAST_SLICE_TYPE:
            if kind in _HEVC_RESERVED or len(unit) < 3:
                raise Doubt(f"its slices are of type {kind} or cut short")
            if kind in _HEVC_BLA:
                raise Doubt("it is joined from several, whose leading pictures are not shown")
            if kind in _HEVC_IRAP and unit[2] & 0x40:  # no_output_of_prior_pics_flag
                raise Doubt("it drops pictures that were not shown yet")
            if temporal != 1:  # a _N picture is not referred to within its own temporal layer only
                raise Doubt("it has several temporal layers")
            first = unit[2] >> 7  # first_slice_segment_in_pic_flag
            pictures += first
            idr |= kind in _HEVC_IDR
            if first and kind not in _HEVC_IDR:
                value, left = _head(unit, 2, 1 + (kind in _HEVC_IRAP), 2)  # slice_pic_parameter_set_id, slice_type
                left -= counting.before + counting.order
                if left < 0:
                    raise Doubt("a slice is cut short")
                order, counts = value >> left & (1 << counting.order) - 1, kind in _HEVC_COUNTS
            spare &= kind <= _HEVC_LAST_N and not kind & 1
        elif kind == _HEVC_SPS and bytes(unit) not in known:
            raise Doubt("a packet brings another sequence parameter set")
        else:
            if kind == _HEVC_SEI:
                _check_sei(unit, 2)
            elif kind == _HEVC_PPS:
                _check_hevc_pps(bytes(unit))
            elif kind in _HEVC_ENDS:
                starts_new, ended = starts_new or not begun, ended or begun
            spare &= kind in _HEVC_OF_ONE
        begun |= kind not in _HEVC_ENDS
    if pictures != 1:
        raise Doubt(f"a packet holds {pictures} pictures")
    if starts_new and not idr:
        raise Doubt("a sequence ends before a picture that is not an IDR picture")
    return Picture(idr, spare, order), counts, ended


def _check_sei(unit: memoryview, header: int) -> None:
    """Raises Doubt for a message that changes pixels of other pictures than its own (ITU-T H.265, 7.3.5 and D.2.1)."""
    data = bytes(unit[header:]).replace(b"\x00\x00\x03", b"\x00\x00")
    position = 0
    while position < len(data) - 2:  # the last byte ends the unit
        numbers = []
        for _ in ("type", "size"):
            value = 0
            while data[position : position + 1] == b"\xff":
                value, position = value + 255, position + 1
            value += int.from_bytes(data[position : position + 1], "big")
            numbers.append(value)
            position += 1
        kind, size = numbers
        if kind in _LASTING or (kind == 4 and data.startswith(_AOM_GRAIN, position)):
            raise Doubt(f"it has {_LASTING.get(kind, 'film grain')}")
        position += size


def _avcc(extradata: bytes) -> tuple[int, list[bytes], list[bytes]]:
    """Size of a unit's length, sequence and picture parameter sets of an AVCDecoderConfigurationRecord (ISO/IEC 14496-15)."""
    if len(extradata) < 7 or extradata[0] != 1:
        raise Doubt("its header is no avcC")
    sequence, position = _sets(extradata, 5, 31)
    if len(sequence) != 1 or position > len(extradata):
        raise Doubt(f"its header has {len(sequence)} sequence parameter sets")
    return (extradata[4] & 3) + 1, sequence, _sets(extradata, position, 255)[0]


def _sets(extradata: bytes, position: int, mask: int) -> tuple[list[bytes], int]:
    """Parameter sets, each behind its length, behind their number (of which `mask` are the bits), and where they end."""
    count, position = int.from_bytes(extradata[position : position + 1], "big") & mask, position + 1
    found = []
    for _ in range(count):
        length = int.from_bytes(extradata[position : position + 2], "big")
        found.append(extradata[position + 2 : position + 2 + length])
        position += 2 + length
    return found, position


def _hvcc(extradata: bytes) -> tuple[int, list[bytes]]:
    """The same of an HEVCDecoderConfigurationRecord."""
    if len(extradata) < 23 or extradata[0] != 1:
        raise Doubt("its header is no hvcC")
    known, position = [], 23
    for _ in range(extradata[22]):
        kind, count = extradata[position : position + 1], int.from_bytes(extradata[position + 1 : position + 3], "big")
        position += 3
        for _ in range(count):
            length = int.from_bytes(extradata[position : position + 2], "big")
            if kind and kind[0] & 63 == _HEVC_SPS:
                known.append(extradata[position + 2 : position + 2 + length])
            elif kind and kind[0] & 63 == _HEVC_PPS:
                _check_hevc_pps(extradata[position + 2 : position + 2 + length])
            position += 2 + length
        if position > len(extradata):
            raise Doubt("its header is cut short")
    if len(known) != 1:
        raise Doubt(f"its header has {len(known)} sequence parameter sets")
    return (extradata[21] & 3) + 1, known


def _check_hevc_pps(unit: bytes) -> None:
    """Raises Doubt unless every picture is shown (ITU-T H.265, 7.3.2.3.1)."""
    bits = Bits(unit)
    bits.take(16)
    bits.golomb()
    bits.golomb()
    bits.take(1)
    if bits.take(1):  # output_flag_present_flag
        raise Doubt("it may have pictures that are not shown")
    if bits.take(3):  # num_extra_slice_header_bits
        raise Doubt("its slice headers have reserved bits")


def _hevc_counting(unit: bytes) -> Numbering:
    """Where pictures say their order (ITU-T H.265, 7.3.2.2.1 and 7.3.3)."""
    bits = Bits(unit)
    bits.take(20)
    layers = bits.take(3)
    bits.take(1 + 88 + 8)
    present = [(bits.take(1), bits.take(1)) for _ in range(layers)]  # sub_layer_profile_present_flag, sub_layer_level_present_flag
    bits.take(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits.take(88 * profile + 8 * level)
    bits.golomb()
    before = 2 * bits.take(1) if bits.golomb() == 3 else 0  # chroma_format_idc, separate_colour_plane_flag
    bits.golomb()
    bits.golomb()
    if bits.take(1):  # conformance_window_flag
        for _ in range(4):
            bits.golomb()
    bits.golomb()
    bits.golomb()
    order = bits.golomb() + 4  # log2_max_pic_order_cnt_lsb_minus4
    if order > 16:
        raise Doubt("its sequence parameter set is damaged")
    return Numbering(0, before, order)


_H264_HIGH = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


def _h264_numbering(unit: bytes) -> Numbering:
    """Raises Doubt unless every picture is a frame and frame numbers have no gaps (ITU-T H.264, 7.3.2.1.1)."""
    bits, before, chroma = Bits(unit), 0, 1
    bits.take(8)
    profile = bits.take(8)
    bits.take(16)
    bits.golomb()
    if profile in _H264_HIGH:
        chroma = bits.golomb()  # chroma_format_idc
        if chroma == 3:
            before = 2 * bits.take(1)  # separate_colour_plane_flag
        bits.golomb()
        bits.golomb()
        bits.take(1)
        if bits.take(1):
            raise Doubt("it has scaling matrices")
    width = bits.golomb() + 4  # log2_max_frame_num_minus4
    if width > 16:
        raise Doubt("its sequence parameter set is damaged")
    kind, order = bits.golomb(), 0  # pic_order_cnt_type
    if kind == 0:
        order = bits.golomb() + 4  # log2_max_pic_order_cnt_lsb_minus4
    elif kind == 1:
        raise Doubt("its pictures count their order by a cycle")
    if order > 16:
        raise Doubt("its sequence parameter set is damaged")
    bits.golomb()
    if bits.take(1):
        raise Doubt("it allows gaps in frame numbers")
    bits.golomb()
    bits.golomb()
    if not bits.take(1):
        raise Doubt("it may be interlaced")
    return Numbering(width, before, order, bool(chroma) and not before)
