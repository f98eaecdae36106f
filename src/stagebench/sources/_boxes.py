"""Whether the end of an MP4 or Matroska file is missing, by its outermost boxes: a few bytes read, nothing decoded."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from stagebench.errors import NoVideoError

__all__ = ["missing_end"]

_HOLDS_FRAMES = (b"moov", b"mdat", b"moof")
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_MAX_BOXES = 1 << 20


def missing_end(path: Path, size: int) -> str:
    """What is missing, in words, or "" when the file is whole or of another kind."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
            if head[4:8] in (b"ftyp", *_HOLDS_FRAMES):
                return _mp4(file, size)
            if head[:4] == _EBML:
                return _matroska(file, size)
    except OSError as error:
        raise NoVideoError(f"{path}: video cannot be read: {error.strerror}. Check its permissions.") from error
    return ""


def _mp4(file: BinaryIO, size: int) -> str:
    position, seen = 0, set()
    for _ in range(_MAX_BOXES):
        file.seek(position)
        head = file.read(16)
        if len(head) < 8:
            break
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        elif length == 0:  # to the end of the file
            length = size - position
        if length < 8:
            break
        seen.add(kind)
        if position + length > size:
            if kind not in _HOLDS_FRAMES:  # junk after the last box
                break
            return f"its {kind.decode()} box ends at byte {position + length:,}, the file at {size:,}"
        position += length
    if b"moov" not in seen:
        return "it has no moov box, the index of its frames, which stands at the end of many MP4s"
    return ""


def _matroska(file: BinaryIO, size: int) -> str:
    file.seek(4)
    header, _ = _vint(file)
    if header > size:  # not Matroska, and too far to seek
        return ""
    file.seek(header, 1)
    if file.read(4) != _SEGMENT:
        return ""
    length, unknown = _vint(file)
    end = file.tell() + length
    return "" if unknown or end <= size else f"its segment ends at byte {end:,}, the file at {size:,}"


def _vint(file: BinaryIO) -> tuple[int, bool]:
    """An EBML length and whether it says `unknown`, as a live recording does."""
    first = file.read(1)
    width = 9 - first[0].bit_length() if first and first[0] else 0
    if not width:
        return 0, True
    value = int.from_bytes(first + file.read(width - 1), "big") & ((1 << 7 * width) - 1)
    return value, value == (1 << 7 * width) - 1
