"""Reader of untrusted `.npy` and `.npz` event files: dicts of plain numeric arrays, and nothing else.

`np.load(allow_pickle=True)` runs whatever code a file names. This reader has no such switch: the published clips are pickles,
so their pickles are interpreted by `_pickle`, which knows numpy's own opcodes and no callable besides. Memory stays below a small multiple
of the file's size, whatever the file claims.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from stagebench.errors import CorruptClipError, SourceError, UnsafeFileError
from stagebench.sources._pickle import load_object_array
from stagebench.sources._pickle_values import MAX_NDIM, ObjectArray, Refused

__all__ = ["MAX_FILE_BYTES", "load_array", "load_events_dict"]

MAX_FILE_BYTES = 4 << 30
"""About 330 million events; a sparse file can claim any size without taking any disk."""
MAX_KEYS = 16
MAX_HEADER_BYTES = 64 << 10
# A compressed member may unfold this far. Real event columns compress 2- to 30-fold; deflate's own limit is about 1,030.
MAX_UNFOLD = 64
FREE_UNFOLD_BYTES = 64 << 20

_MAGIC = b"\x93NUMPY"
_ITEM = re.compile(
    r"\s*'(?P<key>descr|fortran_order|shape)'\s*:\s*"
    r"(?:'(?P<descr>[<>|=]?[A-Za-z][0-9]*)'|(?P<bool>True|False)|\((?P<shape>[0-9L, ]*)\))\s*(?P<end>,|\})"
)
_PLAIN = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_REMEDY = "Do not open it with allow_pickle. Save the events again as a dict of plain arrays p, t, x, y (np.save or np.savez)."


def load_events_dict(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an event file: a pickled 0-d dict (`.npy`, as published) or an archive of plain arrays (`.npz`).

    Returns read-only views of the file's bytes (big-endian ones stay so); numbers in the dict become 0-d arrays.
    Raises UnsafeFileError for anything but plain numeric arrays or a claim beyond the file's size, CorruptClipError for bytes that are
    no such file, SourceError when it is not there.
    """
    path = Path(path)
    data = _read(path)
    try:
        found = _from_zip(data) if bytes(data[:4]) == b"PK\x03\x04" else _from_npy(data)
    except Refused as refused:
        raise UnsafeFileError(f"{path}: refused: {refused}. {_REMEDY}") from None
    # Garbled bytes end in one of these somewhere in the interpreter or in zipfile; none of them means that anything was run.
    except (
        *(ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError, EOFError, RuntimeError),
        *(NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile, OSError),
    ) as error:
        raise CorruptClipError(
            f"{path}: not a readable event file ({type(error).__name__}: {str(error)[:120]}). Copy it again, or leave the clip out."
        ) from None
    if not found:
        raise CorruptClipError(f"{path}: an empty dict, expected p, t, x, y. Save the events again.")
    return found


def load_array(path: Path) -> np.ndarray:
    """A plain `.npy` (no pickle) as a read-only view of its bytes. Raises as `load_events_dict` does."""
    path = Path(path)
    data = _read(path)
    try:
        return _plain_array(data)
    except Refused as refused:
        raise UnsafeFileError(f"{path}: refused: {refused}. Save it again as a plain numeric array.") from None
    except (ValueError, IndexError, struct.error) as error:
        raise CorruptClipError(f"{path}: not a readable .npy ({error}). Copy it again, or leave the clip out.") from None


def _read(path: Path) -> memoryview:
    try:
        # O_NONBLOCK: a FIFO in the place of a clip must not hang the job.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}). Check the dataset's root and the index."
        ) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise SourceError(f"{path}: not a regular file. Point the index at the event file itself.")
        if info.st_size > MAX_FILE_BYTES:
            raise UnsafeFileError(f"{path}: {info.st_size:,} bytes, at most {MAX_FILE_BYTES:,} are read. Cut the recording into clips.")
        with os.fdopen(fd, "rb", closefd=False) as handle:
            return memoryview(handle.read(info.st_size))
    except OSError as error:
        raise SourceError(f"{path}: reading failed ({error.strerror}). Check the disk, or copy the file again.") from None
    finally:
        os.close(fd)


def _header(data: memoryview) -> tuple[str, bool, tuple[int, ...], int]:
    """(descr, fortran_order, shape, where the content begins). Parsed by a regular expression: no literal is evaluated."""
    if bytes(data[:6]) != _MAGIC:
        raise ValueError(f"it begins with {bytes(data[:6])!r}, expected {_MAGIC!r}")
    major = data[6]
    if major == 1:
        (length,), begin = struct.unpack("<H", data[8:10]), 10
    elif major in (2, 3):
        (length,), begin = struct.unpack("<I", data[8:12]), 12
    else:
        raise Refused(f"npy format version {major}, expected 1 to 3")
    if length > MAX_HEADER_BYTES or begin + length > len(data):
        raise Refused(f"a header of {length:,} bytes where the file holds {len(data) - begin:,}")
    text = str(data[begin : begin + length], "latin-1").strip()
    items: dict[str, Any] = {}
    if not text.startswith("{"):
        raise ValueError(f"header {text[:60]!r}")
    at = 1
    while text[at:].strip() not in ("", "}"):
        item = _ITEM.match(text, at)
        if item is None or item["key"] in items:
            raise Refused(f"the header {text[:120]!r}: only plain numeric arrays, or one pickled dict")
        items[item["key"]] = item
        at = item.end()
        if item["end"] == "}":
            break
    if set(items) != {"descr", "fortran_order", "shape"} or text[at:].strip() not in ("", "}"):
        raise ValueError(f"header {text[:120]!r}")
    descr, order, shape = items["descr"]["descr"], items["fortran_order"]["bool"], items["shape"]["shape"]
    if descr is None or order is None or shape is None:
        raise Refused(f"the header {text[:120]!r}: only plain numeric arrays, or one pickled dict")
    sizes = tuple(int(size.strip().rstrip("L")) for size in shape.split(",") if size.strip())
    if len(sizes) > MAX_NDIM:
        raise Refused(f"an array of {len(sizes)} dimensions")
    return descr, order == "True", sizes, begin + length


def _plain_array(data: memoryview) -> np.ndarray:
    descr, fortran, shape, begin = _header(data)
    if not _PLAIN.fullmatch(descr):
        what = "an array of objects (a pickle)" if "O" in descr else f"dtype {descr!r}"
        raise Refused(f"{what}: only bool, int, uint and float")
    dtype = np.dtype(descr)
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    held = len(data) - begin
    if expected != held:
        raise Refused(f"an array of shape {shape} and dtype {dtype} that takes {expected:,} bytes and holds {held:,}")
    return _checked(np.frombuffer(data[begin:], dtype=dtype).reshape(shape, order="F" if fortran else "C"))


def _checked(array: np.ndarray) -> np.ndarray:
    """A bool whose byte is neither 0 nor 1 compares in ways that no one expects."""
    if array.dtype == np.bool_ and array.size and int(array.view(np.uint8).max()) > 1:
        raise Refused("a bool array with bytes other than 0 and 1")
    return array


def _from_npy(data: memoryview) -> dict[str, np.ndarray]:
    descr, _, shape, begin = _header(data)
    if descr.lstrip("<>|=") not in ("O", "O4", "O8"):
        raise Refused(f"a plain array of dtype {descr} and shape {shape}, whose columns nothing names")
    if shape != ():
        raise Refused(f"an object array of shape {shape} where a 0-d one was expected")
    found, used = load_object_array(data[begin:])
    if begin + used != len(data):
        raise Refused(f"{len(data) - begin - used:,} bytes after the pickle's end")
    if len(found) > MAX_KEYS:
        raise Refused(f"a dict of {len(found)} keys, at most {MAX_KEYS}")
    result: dict[str, np.ndarray] = {}
    for key, value in found.items():
        if isinstance(value, (bool, int, float)):
            if isinstance(value, int) and abs(value) >= 2**63:
                raise Refused(f"{key}: an integer beyond 64 bits")
            value = np.array(value)
        if not isinstance(value, np.ndarray):
            kind = "object array" if isinstance(value, ObjectArray) else type(value).__name__.lstrip("_").lower()
            raise Refused(f"{key}: of type {kind}, only plain numeric arrays are read")
        result[key] = _checked(value)
    return result


def _from_zip(data: memoryview) -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) > MAX_KEYS:
            raise Refused(f"an archive of {len(members)} members, at most {MAX_KEYS}")
        allowed = max(FREE_UNFOLD_BYTES, MAX_UNFOLD * len(data))
        total = sum(member.file_size for member in members)
        if total > min(allowed, MAX_FILE_BYTES):
            raise Refused(f"members that claim {total:,} bytes in a file of {len(data):,}: at most {min(allowed, MAX_FILE_BYTES):,}")
        for member in members:
            key = member.filename.removesuffix(".npy")
            if key == member.filename or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", key):
                raise Refused(f"a member named {member.filename[:80]!r}: only <name>.npy")
            if key in result:
                raise Refused(f"the member {member.filename!r} twice")
            if member.flag_bits & 0x1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Refused(f"{member.filename}: encrypted, or compressed by another method than deflate")
            with archive.open(member) as stream:
                content = stream.read(member.file_size + 1)
            if len(content) != member.file_size:
                raise Refused(f"{member.filename}: {len(content):,} bytes where {member.file_size:,} are claimed")
            result[key] = _plain_array(memoryview(content))
    return result
