"""What reading an H.264 or H.265 stream's first bytes stands on: units of a packet, a reader of bits, what is not proven."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.packet import Packet

__all__ = ["Bits", "Doubt", "Lost", "units"]


class Doubt(Exception):
    """Why the packets do not prove what decoding a part of them needs. Never leaves the reader."""


class Lost(Exception):
    """What the packets prove to be missing. A decoder puts other pictures in its place, and says so to nobody."""


def units(packet: Packet, length_size: int) -> list[memoryview]:
    """The packet's NAL units, not copied. Raises Doubt when their lengths do not fit the packet."""
    view = memoryview(packet)
    found: list[memoryview] = []
    position, end = 0, len(view)
    while position < end:
        if length_size == 4 and position + 4 <= end:
            (length,) = struct.unpack_from(">I", view, position)
        else:
            length = int.from_bytes(view[position : position + length_size], "big")
        position += length_size
        if not length or position + length > end:
            raise Doubt(f"a unit of {length} bytes does not fit its packet")
        found.append(view[position : position + length])
        position += length
    return found


class Bits:
    """Exp-Golomb reader over a raw byte sequence payload, emulation prevention taken out."""

    def __init__(self, unit: bytes) -> None:
        raw = unit.replace(b"\x00\x00\x03", b"\x00\x00")
        self._bits = f"{int.from_bytes(raw, 'big'):0{8 * len(raw)}b}"
        self._at = 0

    def take(self, width: int) -> int:
        taken = self._bits[self._at : self._at + width]
        if len(taken) < width:
            raise Doubt("a parameter set is cut short")
        self._at += width
        return int(taken, 2) if taken else 0

    def golomb(self) -> int:
        one = self._bits.find("1", self._at)
        zeros = one - self._at
        if one < 0 or zeros > 32:
            raise Doubt("a parameter set is damaged")
        self._at = one
        return self.take(zeros + 1) - 1
