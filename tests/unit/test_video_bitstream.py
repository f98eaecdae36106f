"""What packets prove: each doubt that `survey` may have, from packets written by hand, and the outermost boxes of cut files."""

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagebench.sources import _fast
from stagebench.sources._bitstream import Doubt, Lost, Picture, survey
from stagebench.sources._boxes import missing_end


def _bits(text: str) -> bytes:
    text = text.replace(" ", "")
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def _slice(number: int, *, nal: int = 0x41, kind: str = "00110", order: int = 0) -> bytes:
    """A picture's first slice: first_mb_in_slice 0, a P picture (0001000 for an I picture), parameter set 0, frame_num in four bits,
    idr_pic_id 0 in an IDR picture, picture order in four bits."""
    return bytes([nal]) + _bits(f"1 {kind} 1 {number:04b} {'1' if nal & 31 == 5 else ''} {order:04b}")


IDR, SLICE, SEI, OTHER_SLICE_PART = _slice(0, nal=0x65), _slice(1), b"\x06\x05\x01\x80", b"\x41\x5a\x00\x00"
SPARE, OTHER_SPARE_PART = _slice(1, nal=0x01), b"\x01\x5a\x00\x00"


def _sps(*, gaps: str = "0", frames_only: str = "1", order: str = "1 1") -> bytes:
    """Baseline profile: id 0, log2_max_frame_num 4, picture order (type, its parameter), 1 reference frame, 16x16 pixels."""
    return b"\x67\x42\x00\x1e" + _bits(f"1 1 {order} 010 {gaps} 1 1 {frames_only} 1 0 0 1")


def _avcc(*sets: bytes, pps: tuple[bytes, ...] = ()) -> bytes:
    kinds = [b"".join(struct.pack(">H", len(s)) + s for s in some) for some in (sets, pps)]
    return b"\x01\x42\x00\x1e\xff" + bytes([0xE0 | len(sets)]) + kinds[0] + bytes([len(pps)]) + kinds[1]


def _packet(*units: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units)


def _hvcc(sps: bytes, count: int = 1, pps: bytes = b"") -> bytes:
    sets = [(33, sps)] * count + [(34, pps)] * bool(pps)
    packed = b"".join(struct.pack(">BHH", kind, 1, len(unit)) + unit for kind, unit in sets)
    return b"\x01" + bytes(20) + b"\x03" + bytes([len(sets)]) + packed


HEVC_SPS = b"\x42\x01\x01" + bytes(12) + _bits("1 010 1 1 0 1 1 1 1")
"""Of one layer, id 0, 4:2:0, 0x0 pixels; 8 bits, picture order in four."""
HEVC_PPS, HEVC_HIDING_PPS = (b"\x44\x01" + _bits(f"1 1 0 {hides} 000 1") for hides in (0, 1))
HEVC_IDR, HEVC_TRAIL, HEVC_SPARE = b"\x26\x01\xaf\x00", b"\x02\x01\xd0\x00", b"\x00\x01\xd0\x00"


def test_plain_streams_are_proven() -> None:
    packets = [_packet(SEI, IDR, b"\x0b"), _packet(SLICE), _packet(_slice(2), OTHER_SLICE_PART)]
    assert survey("h264", _avcc(_sps()), packets) == [(True, False, 0), (False, False, 0), (False, False, 0)]
    assert survey("h264", _avcc(_sps()), [_packet(_sps(), IDR)]) == [(True, False, 0)]
    assert survey("hevc", _hvcc(HEVC_SPS), [_packet(HEVC_SPS, HEVC_IDR), _packet(HEVC_TRAIL)]) == [(True, False, 0), (False, False, 0)]


@pytest.mark.parametrize(
    ("codec", "units", "spare"),
    [
        ("h264", [SPARE], True),
        ("h264", [b"\x09\xf0", SEI, SPARE, OTHER_SPARE_PART, b"\x0c\xff\xff\x80"], True),
        ("h264", [SLICE], False),
        ("h264", [SPARE, OTHER_SLICE_PART], False),
        ("h264", [b"\x68\xce\x3c\x80", SPARE], False),  # brings a picture parameter set
        ("h264", [_sps(), SPARE], False),
        ("h264", [SPARE, b"\x0a"], False),  # ends the sequence
        ("h264", [_slice(0, nal=0x05)], False),  # IDR
        ("hevc", [HEVC_SPARE], True),
        ("hevc", [b"\x46\x01\x50", b"\x4e\x01\x05\x80", HEVC_SPARE], True),
        ("hevc", [HEVC_TRAIL], False),
        ("hevc", [HEVC_PPS, HEVC_SPARE], False),
        ("hevc", [HEVC_SPARE, b"\x4a\x01"], False),
        ("hevc", [b"\x28\x01\x90\x00"], False),  # type 20, even, starts a group
    ],
)
def test_only_what_is_of_account_for_no_other_picture_is_spare(codec: str, units: list[bytes], spare: bool) -> None:
    header, first = (_avcc(_sps()), IDR) if codec == "h264" else (_hvcc(HEVC_SPS), HEVC_IDR)
    assert survey(codec, header, [_packet(first), _packet(*units)])[1].spare is spare  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("codec", "extradata", "packet", "words"),
    [
        ("vp9", b"", _packet(IDR), "neither h264 nor hevc"),
        ("h264", None, _packet(IDR), "no avcC"),
        ("h264", b"\x00\x00\x00\x01" + _sps(), _packet(IDR), "no avcC"),
        ("h264", _avcc(), _packet(IDR), "0 sequence parameter sets"),
        ("h264", _avcc(_sps(), _sps()), _packet(IDR), "2 sequence parameter sets"),
        ("h264", _avcc(_sps(frames_only="0")), _packet(IDR), "interlaced"),
        ("h264", _avcc(_sps(gaps="1")), _packet(IDR), "gaps"),
        ("h264", _avcc(_sps()[:5]), _packet(IDR), "parameter set is"),
        ("h264", _avcc(b"\x67\x64\x00\x1e" + _bits("1 010 1 1 0 1")), _packet(IDR), "scaling matrices"),
        ("h264", _avcc(_sps()), _packet(SEI), "holds 0 pictures"),
        ("h264", _avcc(_sps()), _packet(OTHER_SLICE_PART), "holds 0 pictures"),
        ("h264", _avcc(_sps()), _packet(SLICE, SLICE), "holds 2 pictures"),
        ("h264", _avcc(_sps()), _packet(b"\x42\x88\x00"), "partitioned"),
        ("h264", _avcc(_sps()), _packet(_sps(order="011"), IDR), "another sequence parameter set"),
        ("h264", _avcc(_sps()), _packet(IDR)[:-1], "does not fit"),
        ("h264", _avcc(_sps()), b"\x00\x00\x00\x00" + IDR, "does not fit"),
        ("h264", _avcc(_sps()), b"\x00\x00", "does not fit"),
        ("hevc", b"\x01", _packet(HEVC_IDR), "no hvcC"),
        ("hevc", _hvcc(HEVC_SPS, 2), _packet(HEVC_IDR), "2 sequence parameter sets"),
        ("hevc", _hvcc(HEVC_SPS)[:-2], _packet(HEVC_IDR), "cut short"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x26\x09\xaf"), "several layers"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x02\x02\xd0"), "temporal layers"),
        ("hevc", _hvcc(HEVC_SPS), _packet(HEVC_IDR, HEVC_IDR), "holds 2 pictures"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x42\x01\x02", HEVC_IDR), "another sequence parameter set"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x14\x01\xd0\x00"), "of type 10"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x26\x01\xef\x00"), "not shown yet"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x20\x01\x90\x00"), "joined from several"),
        ("hevc", _hvcc(HEVC_SPS), _packet(HEVC_HIDING_PPS, HEVC_IDR), "pictures that are not shown"),
        ("hevc", _hvcc(HEVC_SPS, pps=HEVC_HIDING_PPS), _packet(HEVC_IDR), "pictures that are not shown"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x26\x01"), "cut short"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x26"), "cut short"),
        ("h264", _avcc(_sps()), _packet(b"\x65\x88"), "cut short"),
        ("h264", _avcc(_sps()), _packet(b"\x65\x80\x00\x00"), "cut short"),
        ("h264", _avcc(_sps()), _packet(b"\x65\x9a"), "cut short"),
        ("h264", _avcc(_sps()), _packet(_slice(1, nal=0x65)), "frame_num 1 stands where 0 is due"),
        ("h264", _avcc(_sps()), _packet(b"\x06\x13\x02\x09\x80\x80", IDR), "film grain"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x4e\x01\x13\x02\x09\x80\x80", HEVC_IDR), "film grain"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x4e\x01\x04\x05\xb5\x58\x90\x00\x01\x80", HEVC_IDR), "film grain"),
        ("hevc", _hvcc(HEVC_SPS), _packet(b"\x4e\x01\x05\xff\x01" + b"\x00\x00\x03" * 128 + b"\x2f\x01\x40\x80", HEVC_IDR), "orientation"),
    ],
)
def test_each_doubt(codec: str, extradata: bytes | None, packet: bytes, words: str) -> None:
    with pytest.raises(Doubt, match=words):
        survey(codec, extradata, [packet])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ("0 1 2b 2b 2 3", "whole"),
        ("0 1 2 0i 1", "whole"),
        (" ".join(str(n % 16) for n in range(40)), "whole"),
        ("0 1 3", "lost"),  # a picture that others refer to is missing
        ("0 1 2b 3", "lost"),
        ("0 2b", "lost"),
        ("0 1 2 4 0i 1", "lost"),
        ("0 1 5a 6 8", "lost"),  # joined, and then a loss
        ("0 1 1", "doubt"),  # 16 lost, or another part of the same picture
        ("0 1 2 1 2", "doubt"),  # 15 lost, or memory_management_control_operation 5
        ("0 1 5a 6 7", "doubt"),  # an I picture: joined from two
        ("4a 5 6", "doubt"),  # joined midway
        ("4 5 6", "doubt"),
        ("6b 5 6b 6", "doubt"),  # joined midway at a picture that no other refers to
        ("6b 5 7", "lost"),
        ("0 1 2 3i 1", "doubt"),  # an IDR picture has 0
    ],
)
def test_frame_numbers_tell_that_a_picture_is_missing(numbers: str, found: str) -> None:
    kinds = {"i": 0x65, "b": 0x01}
    units = [_slice(int(n.rstrip("bia")), nal=kinds.get(n[-1], 0x41), kind="0001000" if n[-1] == "a" else "00110") for n in numbers.split()]
    if numbers.startswith("0"):
        units[0] = IDR
    packets = [_packet(unit) for unit in units]
    if found == "whole":
        assert len(survey("h264", _avcc(_sps()), packets)) == len(packets)  # type: ignore[arg-type]
        return
    with pytest.raises(Doubt if found == "doubt" else Lost, match="is missing"):
        survey("h264", _avcc(_sps()), packets)  # type: ignore[arg-type]


HEVC_END, HEVC_CRA = b"\x48\x01", b"\x2a\x01\xaf\x00"


@pytest.mark.parametrize(
    ("packets", "proven"),
    [
        ([[HEVC_IDR], [HEVC_TRAIL, HEVC_END], [HEVC_IDR]], True),
        ([[HEVC_IDR], [HEVC_TRAIL], [HEVC_END, HEVC_IDR], [HEVC_TRAIL]], True),
        ([[HEVC_IDR], [HEVC_TRAIL, HEVC_END]], True),
        ([[HEVC_IDR], [HEVC_TRAIL, HEVC_END + b"\x00"], [HEVC_CRA]], False),
        ([[HEVC_IDR], [HEVC_TRAIL], [HEVC_END, HEVC_CRA]], False),
        ([[HEVC_IDR, HEVC_END], [HEVC_TRAIL]], False),
        ([[HEVC_IDR], [b"\x46\x01\x50", HEVC_END, HEVC_IDR], [HEVC_TRAIL]], False),  # as FFmpeg takes it, with the picture before
    ],
)
def test_a_sequence_may_end_before_an_idr_picture_only(packets: list[list[bytes]], proven: bool) -> None:
    """Else the pictures that follow are not all shown: an H.265 clip of 40 packets had 30 frames."""
    stream = [_packet(*units) for units in packets]
    if proven:
        assert len(survey("hevc", _hvcc(HEVC_SPS), stream)) == len(stream)  # type: ignore[arg-type]
    else:
        with pytest.raises(Doubt, match="a sequence ends"):
            survey("hevc", _hvcc(HEVC_SPS), stream)  # type: ignore[arg-type]


def _pps(*, bottom: int = 0, groups: str = "1", weighted: str = "0 00", redundant: int = 0) -> bytes:
    """Id 0, one picture of each list."""
    return b"\x68" + _bits(f"1 1 0 {bottom} {groups} 1 1 {weighted} 1 1 1 0 0 {redundant} 1")


_HEAD = "0010 0000"  # frame_num 2, picture order
_MARKED = "1 010 1 00100 1 1 00110 1"  # operations 1, 3, 5, ended


@pytest.mark.parametrize(
    ("pps", "last", "found"),
    [
        ([_pps()], f"1 00110 1 {_HEAD} 0 0 {_MARKED}", "doubt"),  # P: no override, no modification
        ([_pps()], f"1 00110 1 {_HEAD} 0 0 0", "lost"),  # a sliding window
        ([_pps()], f"1 00110 1 {_HEAD} 0 0 1 010 1 1", "lost"),  # other operations
        ([_pps()], f"1 0001000 1 {_HEAD} {_MARKED}", "doubt"),  # I
        ([_pps()], f"1 00111 1 {_HEAD} 0 1 010 010 0 1 010 1 00100 {_MARKED}", "doubt"),  # B: lists of two and two, the second modified
        ([_pps(bottom=1, redundant=1)], f"1 00110 1 {_HEAD} 010 1 1 010 0 {_MARKED}", "doubt"),
        ([_pps(weighted="1 00")], f"1 00110 1 {_HEAD} 1 010 0 1 1 1 010 010 0 0 1 010 010 010 010 {_MARKED}", "doubt"),
        ([_pps(weighted="1 00")], f"1 00110 1 {_HEAD} 1 010 0 1 1 1 010 010 0 0 1 010 010 010 010 0", "lost"),
        ([_pps(weighted="0 01")], f"1 00111 1 {_HEAD} 0 0 0 0 1 1 0 0 1 010 010 0 {_MARKED}", "doubt"),
        ([_pps(weighted="0 10")], f"1 00111 1 {_HEAD} 0 0 0 0 {_MARKED}", "doubt"),  # implicit weights
        ([_pps(groups="010")], f"1 00110 1 {_HEAD} 0 0 0", "doubt"),  # slice groups: not looked through
        ([_pps(), _pps(bottom=1)], f"1 00110 1 {_HEAD} 0 0 0", "doubt"),  # two sets of one number: which one holds?
        ([], f"1 00110 1 {_HEAD} 0 0 0", "doubt"),
    ],
)
def test_number_1_follows_what_empties_the_decoder(pps: list[bytes], last: str, found: str) -> None:
    """memory_management_control_operation 5 (ITU-T H.264, 7.4.3.3), and nothing else; an IDR picture that is lost looks like it."""
    packets = [_packet(IDR), _packet(_slice(1)), _packet(b"\x41" + _bits(last + "1")), _packet(_slice(1))]
    for header, stream in (
        (_avcc(_sps(), pps=tuple(pps)), packets),
        (_avcc(_sps()), [_packet(*pps, IDR), *packets[1:]]),
    ):
        with pytest.raises(Doubt if found == "doubt" else Lost, match="is missing"):
            survey("h264", header, stream)  # type: ignore[arg-type]


def test_number_1_where_numbers_begin_anew() -> None:
    """16 pictures on, of which the one numbered 0 again is lost."""
    packets = [_packet(IDR), *(_packet(_slice(n)) for n in range(1, 15)), _packet(b"\x41" + _bits("1 00110 1 1111 0000 0 0 0 1"))]
    with pytest.raises(Lost, match="picture 17 of 17 has frame_num 1 where 0 is due"):
        survey("h264", _avcc(_sps(), pps=(_pps(),)), [*packets, _packet(_slice(1))])  # type: ignore[list-item]


def _order(*lowest: str) -> list[int]:
    """Orders of H.264 pictures of which the lowest four bits are given: i an IDR picture, b one that no other refers to."""
    kinds, number, packets = {"i": 0x65, "b": 0x01}, 0, []
    for low in lowest:
        number = 0 if low[-1] == "i" else number
        packets.append(_packet(_slice(number, nal=kinds.get(low[-1], 0x41), order=int(low.rstrip("ib")))))
        number = (number + (low[-1] != "b")) % 16
    return [picture.order for picture in survey("h264", _avcc(_sps()), packets)]  # type: ignore[arg-type]


def test_picture_order_is_counted_on_from_its_lowest_bits() -> None:
    """ITU-T H.264, 8.2.1.1."""
    assert _order("0i", "6", "2b", "4b", "12", "8b", "2", "14b", "0b") == [0, 6, 2, 4, 12, 8, 18, 14, 16]
    assert _order("0i", "8", "0i", "9") == [0, 8, 0, -7]  # half a turn counts as ahead, more as behind
    assert _order("0i", "4", "15b", "12b", "6") == [0, 4, -1, 12, 6]  # from the last that others refer to
    packets = [_packet(IDR), _packet(_slice(1)), _packet(_slice(2))]
    found = survey("h264", _avcc(_sps(order="011")), packets)  # type: ignore[arg-type]
    assert [picture.order for picture in found] == [0, 1, 2]  # pic_order_cnt_type 2: as decoded
    with pytest.raises(Doubt, match="by a cycle"):
        survey("h264", _avcc(_sps(order="010 1")), packets)  # type: ignore[arg-type]


def test_picture_order_of_hevc() -> None:
    """ITU-T H.265, 8.3.1: counted from neither leading pictures nor those of _N."""

    def picture(kind: int, low: int) -> bytes:
        return _packet(bytes([kind << 1, 1]) + _bits(f"1 {'0' if kind >= 16 else ''} 1 010 {low:04b}"))

    idr = _packet(HEVC_IDR)
    for header in (HEVC_SPS, b"\x42\x01\x03" + bytes(12) + b"\x80\x00" + bytes(11) + _bits("1 010 1 1 1 1 1 1 1 1 1 1")):
        packets = [idr, picture(1, 6), picture(0, 2), picture(21, 12), picture(9, 15), picture(8, 10), picture(1, 2), idr, picture(1, 4)]
        found = survey("hevc", _hvcc(header), packets)  # type: ignore[arg-type]
        assert [p.order for p in found] == [0, 6, 2, 12, 15, 10, 18, 0, 4]
    assert survey("hevc", _hvcc(HEVC_SPS), [idr, picture(1, 6), picture(0, 13), picture(1, 14)])[3].order == 14  # type: ignore[list-item]
    with pytest.raises(Doubt, match="reserved bits"):
        survey("hevc", _hvcc(HEVC_SPS, pps=b"\x44\x01" + _bits("1 1 0 0 001 1")), [idr])  # type: ignore[list-item]


def test_supplemental_information_that_ends_with_its_picture_is_no_doubt() -> None:
    messages = b"\x4e\x01" + b"\x01\x02\x13\x13" + b"\x04\x03\xb5\x00\x3c" + b"\x06\x01\xc4" + b"\x80"
    assert survey("hevc", _hvcc(HEVC_SPS), [_packet(messages, HEVC_IDR)]) == [(True, False, 0)]  # type: ignore[list-item]


class _Packet(bytes):
    """A packet as `_fast` sees it."""

    pts: int | None = 0
    is_corrupt = is_discard = False
    side_data = "skip_samples"

    def iter_sidedata(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(data_type=self.side_data)]


def _stream(*changes: dict[str, Any], first: bytes = IDR, format: str = "matroska,webm") -> tuple[Any, Any]:
    """A request and a video of four packets shown at 0, 3, 1, 2, with changes to them in order."""
    packets = [_Packet(_packet(unit)) for unit in (first, *(_slice(n, order=2 * o) for n, o in enumerate((3, 1, 2), start=1)))]
    for packet, pts in zip(packets, (0, 3, 1, 2), strict=True):
        packet.pts = pts
    for packet, change in zip(packets, changes, strict=False):
        vars(packet).update(change)
    context = SimpleNamespace(name="h264", extradata=_avcc(_sps()))
    video = SimpleNamespace(container=SimpleNamespace(format=SimpleNamespace(name=format)), stream=SimpleNamespace(codec_context=context))
    return SimpleNamespace(demux=lambda _: packets), video


def test_index_is_in_presentation_order_without_discarded_frames() -> None:
    index = _fast._index(*_stream({}, {}, {"is_discard": True}))
    assert (index.pts, [picture.idr for picture in index.pictures]) == ([0, 2, 3], [True, False, False, False])
    assert _fast._reordering(index.packets) == 1  # the frame shown last is decoded before two others, which wait for it alone


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (_stream(format="mpegts"), "container is mpegts"),
        (_stream({}, {"is_corrupt": True}), "a packet is damaged"),
        (_stream(first=_slice(0)), "does not start with an IDR"),
        (_stream({}, {"pts": None}), "do not have a pts each"),
        (_stream({}, {"pts": 1}), "do not have a pts each"),
        (_stream({}, {"side_data": "new_extradata"}), "its parameters change"),
        (_stream({}, {"pts": -1}), "shown before its first picture"),
        (_stream({}, {"pts": 1}, {"pts": 3}), "timestamps are not in the order of its pictures"),
    ],
)
def test_each_reason_for_a_full_decode(stream: tuple[Any, Any], words: str) -> None:
    with pytest.raises(_fast.NotProven, match=words):
        _fast._index(*stream)


def test_a_second_sample_description_numbers_its_pictures_by_itself() -> None:
    """Read by the first one's parameters they may seem to have gaps."""
    request, video = _stream({}, {}, {"side_data": "new_extradata"})
    del request.demux(video)[1]
    with pytest.raises(_fast.NotProven, match="its parameters change"):
        _fast._index(request, video)


def test_runs_to_decode() -> None:
    packets = []
    for i in range(12):  # groups of three
        packets.append(_Packet(b"x"))
        packets[i].pts = i
    pictures = [Picture(idr=i % 3 == 0, spare=i == 7) for i in range(12)]
    index = _fast._Index(packets, list(range(12)), pictures)  # type: ignore[arg-type]

    def runs(*targets: int) -> list[list[int | None]]:
        return [[packet.pts for packet in run] for run in _fast._needed(index, set(targets))]

    assert runs(0) == [[0]]
    assert runs(4) == [[3, 4]]
    assert runs(2, 4) == [[0, 1, 2, 3, 4]]  # no gap between: decoded in one go
    assert runs(1, 4) == [[0, 1], [3, 4]]
    assert runs(5, 11) == [[3, 4, 5], [9, 10, 11]]
    assert runs(8, 9) == [[6, 8, 9]]
    assert runs(7) == [[6, 7]]


@given(st.sampled_from(["h264", "hevc"]), st.binary(max_size=80), st.lists(st.binary(min_size=1, max_size=60), max_size=4))
def test_any_bytes_are_a_doubt_or_an_answer(codec: str, extradata: bytes, packets: list[bytes]) -> None:
    for header in (extradata, b"\x01" + extradata, _avcc(extradata), _hvcc(extradata)):
        try:
            assert len(survey(codec, header, packets)) == len(packets)  # type: ignore[arg-type]
        except (Doubt, Lost):
            continue


def _box(kind: bytes, size: int, *, claimed: int | None = None, long: bool = False) -> bytes:
    claimed = size if claimed is None else claimed
    if long:
        return struct.pack(">I4sQ", 1, kind, claimed) + bytes(size - 16)
    return struct.pack(">I4s", claimed, kind) + bytes(size - 8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_box(b"ftyp", 16) + _box(b"mdat", 100) + _box(b"moov", 50), ""),
        (_box(b"ftyp", 16) + _box(b"moov", 50) + _box(b"mdat", 100, claimed=0), ""),  # 0: to the end of the file
        (_box(b"ftyp", 16) + _box(b"moov", 50) + _box(b"mdat", 100, long=True), ""),
        (_box(b"ftyp", 16) + _box(b"moov", 50) + b"junk that is no box", ""),
        (_box(b"ftyp", 16) + _box(b"moov", 50) + b"\x00\x00", ""),
        (_box(b"moov", 50) + _box(b"mdat", 100, claimed=101), "its mdat box ends at byte 151, the file at 150"),
        (_box(b"moov", 50) + _box(b"mdat", 100, claimed=1 << 40, long=True), "its mdat box ends"),
        (_box(b"ftyp", 16) + _box(b"mdat", 100), "no moov box"),
        (_box(b"ftyp", 16), "no moov box"),
        (b"\x1a\x45\xdf\xa3\x81\x00" + b"\x18\x53\x80\x67" + b"\x85" + bytes(5), ""),
        (b"\x1a\x45\xdf\xa3\x81\x00" + b"\x18\x53\x80\x67" + b"\x85" + bytes(4), "its segment ends at byte 16, the file at 15"),
        (b"\x1a\x45\xdf\xa3\x81\x00" + b"\x18\x53\x80\x67" + b"\x01" + b"\xff" * 7, ""),  # of unknown size: a live recording
        (b"\x1a\x45\xdf\xa3", ""),
        (b"RIFF" + bytes(20), ""),
    ],
)
def test_outermost_boxes(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    found = missing_end(path, len(data))
    assert found == words or (words and words in found)


@given(st.binary(max_size=64), st.sampled_from([b"", b"\x00\x00\x00\x10ftyp", b"\x1a\x45\xdf\xa3", b"\x00\x00\x00\x01mdat"]))
def test_outermost_boxes_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(head + data)
    assert isinstance(missing_end(path, len(head + data)), str)
