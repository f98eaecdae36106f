"""Arrays and dtypes as a pickle describes them, checked against the bytes that are there before numpy sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["MAX_NDIM", "OBJECT_DTYPES", "PLAIN_DTYPES", "DType", "ObjectArray", "Refused", "checked_shape", "dtype_state", "show", "view"]

MAX_NDIM = 8


class Refused(Exception):
    """The stream does something that a dict of plain arrays never needs. The text says what; the caller adds the file and the remedy."""


PLAIN_DTYPES = frozenset(f"{kind}{size}" for kind, sizes in {"b": "1", "i": "1248", "u": "1248", "f": "248"}.items() for size in sizes)
OBJECT_DTYPES = frozenset(["O", "O4", "O8"])


@dataclass(slots=True)
class DType:
    code: str
    order: str = "|"

    def numpy(self) -> np.dtype[Any]:
        if self.code in OBJECT_DTYPES:
            raise Refused("an array of objects inside the dict")
        return np.dtype(("" if self.order == "|" else self.order) + self.code)


@dataclass(slots=True)
class ObjectArray:
    """An array before its BUILD, and the outer object array after it."""

    content: Any = None
    shape: tuple[int, ...] = ()


def show(value: Any) -> str:
    """For messages. Only flat values are printed: tuples that share their parts can be short in the file and endless on paper."""
    if isinstance(value, tuple) and all(isinstance(item, int) for item in value):
        return str(value[: MAX_NDIM + 1])
    return repr(value)[:60] if isinstance(value, (str, int, float, bytes)) else f"({type(value).__name__})"


def dtype_state(target: DType, state: Any) -> DType:
    """numpy's state: (version, byte order, subdtype, names, fields, itemsize, alignment, flags[, metadata])."""
    if not isinstance(state, tuple) or len(state) not in (8, 9):
        raise Refused("a dtype state of another form than numpy's")
    order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
    if order not in ("<", ">", "|", "="):
        raise Refused(f"byte order {show(order)}")
    if any(field is not None for field in state[2:5]) or (len(state) == 9 and state[8] is not None):
        raise Refused("a dtype with fields, sub-arrays or metadata")
    return DType(target.code, order)


def checked_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or len(shape) > MAX_NDIM or any(type(size) is not int or size < 0 for size in shape):
        raise Refused(f"array shape {show(shape)}")
    return shape


def view(buffer: Any, dtype: Any, shape: Any, *, fortran: bool) -> np.ndarray:
    """A read-only array over bytes of the file; their number must be what shape and dtype say."""
    if isinstance(shape, int) and not isinstance(shape, bool):
        shape = (shape,)
    shape = checked_shape(shape)
    if not isinstance(dtype, DType):
        raise Refused("an array without a dtype")
    if not isinstance(buffer, (bytes, memoryview)):
        raise Refused(f"an array whose content is a {type(buffer).__name__}")
    plain = dtype.numpy()
    expected = plain.itemsize
    for size in shape:  # Python's integers: no overflow to hide a claim in
        expected *= size
    if expected != len(buffer):
        raise Refused(f"an array of shape {shape} and dtype {plain} that takes {expected:,} bytes and holds {len(buffer):,}")
    return np.frombuffer(buffer, dtype=plain).reshape(shape, order="F" if fortran else "C")
