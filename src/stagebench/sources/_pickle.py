"""An interpreter for the few pickle opcodes that numpy writes for a dict of plain arrays. It runs no code of the file's choosing.

Python's own Unpickler is not used, even restricted: a hostile stream can make it allocate by a claimed length or memo index before any
hook is asked. Here every value is a slice of the file, a name is looked up in a table of six entries that are implemented below,
and whatever else turns up is refused by name. Protocols 0 to 5; module paths of numpy 1 (`numpy.core`) and 2 (`numpy._core`).
"""

from __future__ import annotations

import codecs
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagebench.sources._pickle_values import (
    OBJECT_DTYPES,
    PLAIN_DTYPES,
    DType,
    ObjectArray,
    Refused,
    checked_shape,
    dtype_state,
    show,
    view,
)

__all__ = ["load_object_array"]

MAX_OPCODES = 4000
"""A dict of four arrays takes about 150."""
MAX_DEPTH = 256
MAX_TEXT = 4096


# Every callable that may be named, and the tag under which it is implemented here.
_NAMES = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy.core.multiarray scalar": "scalar",
    "numpy._core.multiarray scalar": "scalar",
    "numpy.core.numeric _frombuffer": "frombuffer",
    "numpy._core.numeric _frombuffer": "frombuffer",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    "builtins bytes": "bytes",
    "__builtin__ bytes": "bytes",
    "builtins bytearray": "bytes",
    "__builtin__ bytearray": "bytes",
}


@dataclass(frozen=True, slots=True)
class _Name:
    """A callable that was named in the stream: a tag, never the callable."""

    tag: str


_MARK = object()


def load_object_array(stream: memoryview) -> tuple[dict[Any, Any], int]:
    """Read the pickle of a 0-d object array that holds a dict.

    Returns (dict of str -> read-only array that views `stream`, or a plain number), and the bytes consumed.
    Raises Refused, or whatever Python raises for a stream that is cut short or garbled (the caller reports those as corrupt).
    """
    machine = _Machine(stream)
    top = machine.run()
    if not isinstance(top, ObjectArray):
        raise Refused(f"a pickled {type(top).__name__.lstrip('_').lower()} where a 0-d object array was expected")
    if top.shape != () or not isinstance(top.content, list) or len(top.content) != 1:
        raise Refused(f"an object array of shape {top.shape} where a 0-d one was expected")
    if not isinstance(top.content[0], dict):
        raise Refused(f"an object array that holds a {type(top.content[0]).__name__.lstrip('_').lower()} where a dict was expected")
    return top.content[0], machine.at


class _Machine:
    def __init__(self, stream: memoryview) -> None:
        self.stream = stream
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # Bytes that had to be made rather than sliced (protocols 0-2 write arrays as text). Text of n bytes makes at most n bytes
        # once; a stream that encodes the same text again and again would multiply them.
        self.budget = 2 * len(stream) + MAX_TEXT

    # reading

    def take(self, count: int) -> memoryview:
        if count < 0 or count > len(self.stream) - self.at:
            raise Refused(f"a value of {count:,} bytes where the file holds {len(self.stream) - self.at:,} more")
        piece = self.stream[self.at : self.at + count]
        self.at += count
        return piece

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def line(self) -> bytes:
        window = 256
        while True:
            chunk = bytes(self.stream[self.at : self.at + window])
            end = chunk.find(b"\n")
            if end >= 0:
                self.at += end + 1
                return chunk[:end]
            if len(chunk) < window:
                raise Refused("a line without its end")
            window *= 4

    def short_line(self) -> str:
        line = self.line()
        if len(line) > MAX_TEXT:
            raise Refused(f"a line of {len(line):,} characters")
        return line.decode("ascii")

    def text(self, raw: memoryview | bytes, encoding: str = "utf-8") -> str:
        self.spend(len(raw))
        return str(raw, encoding, "surrogatepass" if encoding == "utf-8" else "strict")

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise Refused("values that unfold to more than the file holds")

    # running

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                if len(self.stack) != 1:
                    raise Refused(f"{len(self.stack)} values left at the end of the pickle")
                return self.stack[0]
            step = _STEPS.get(code)
            if step is None:
                raise Refused(f"pickle opcode {chr(code)!r} (0x{code:02x}), which no dict of arrays needs")
            step(self)
            if len(self.stack) > MAX_DEPTH:
                raise Refused(f"more than {MAX_DEPTH} values at once")
        raise Refused(f"more than {MAX_OPCODES:,} opcodes")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Refused("a mark where a value was expected")
        return value

    def to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise Refused("a group without its mark")

    def remember(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise Refused("a mark kept for later")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"value {index} used before it was made")
        self.push(self.memo[index])

    def name(self, module: str, attribute: str) -> None:
        tag = _NAMES.get(f"{module} {attribute}")
        if tag is None:
            raise Refused(f"the callable {module[:100]}.{attribute[:100]}")
        self.push(_Name(tag))

    def stack_name(self) -> None:
        attribute, module = self.pop(), self.pop()
        if not isinstance(attribute, str) or not isinstance(module, str):
            raise Refused("a callable named by something that is no text")
        self.name(module, attribute)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise Refused("items set on something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, bytes):  # Python 2 wrote its strings as bytes
                key = key.decode("ascii")
            if not isinstance(key, str) or len(key) > 64:
                raise Refused(f"a dict key that is no short text but {show(key)}")
            if key in target:
                raise Refused(f"the key {key!r} twice")
            target[key] = value

    def make_dict(self) -> None:
        items = self.to_mark()
        self.push({})
        self.set_items(items)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused("items appended to something that is no list")
        if len(target) + len(items) > 1:
            raise Refused("a list of several values")
        target.extend(items)

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def reduce(self) -> None:
        arguments, callable_ = self.pop(), self.pop()
        if not isinstance(callable_, _Name) or not isinstance(arguments, tuple):
            raise Refused("a call of something that is no named callable")
        self.push(getattr(self, f"call_{callable_.tag}")(*arguments))

    # the callables, re-implemented

    def call_reconstruct(self, subtype: Any, shape: Any, typecode: Any) -> ObjectArray:
        if subtype != _Name("ndarray"):
            raise Refused("a subclass of ndarray")
        return ObjectArray()

    def call_ndarray(self, *arguments: Any) -> Any:
        raise Refused("a direct call of numpy.ndarray")

    def call_dtype(self, code: Any, align: Any = False, copy: Any = False) -> DType:
        if isinstance(code, bytes):
            code = code.decode("ascii")
        if not isinstance(code, str) or code not in PLAIN_DTYPES | OBJECT_DTYPES:
            raise Refused(f"dtype {show(code)}: only bool, int, uint and float")
        return DType(code)

    def call_encode(self, text: Any, encoding: Any) -> bytes:
        if isinstance(encoding, bytes):
            encoding = encoding.decode("ascii")
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise Refused(f"bytes made by the encoding {show(encoding)}")
        self.spend(len(text))
        return text.encode("latin-1")

    def call_bytes(self, *arguments: Any) -> bytes:
        if not arguments:
            return b""
        if len(arguments) == 1 and isinstance(arguments[0], (bytes, memoryview)):
            return arguments[0]  # type: ignore[return-value]
        if len(arguments) == 2:
            return self.call_encode(*arguments)
        # bytes(10**12) would be a claim without content
        raise Refused(f"bytes made from a {type(arguments[0]).__name__}")

    def call_frombuffer(self, buffer: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
        if order not in ("C", "F") or axis_order is not None:
            raise Refused(f"memory order {show(order)}")
        return view(buffer, dtype, shape, fortran=order == "F")

    def call_scalar(self, dtype: Any, buffer: Any) -> np.ndarray:
        return view(buffer, dtype, (), fortran=False)

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, DType):
            self.stack[-1] = dtype_state(target, state)
        elif isinstance(target, ObjectArray) and target.content is None:
            self.stack[-1] = self.array_state(target, state)
        else:
            raise Refused(f"state set on a {type(target).__name__.lstrip('_').lower()}")
        # Later references must see the built value: it was memoized before its state came.
        for index, value in self.memo.items():
            if value is target:
                self.memo[index] = self.stack[-1]

    def array_state(self, target: ObjectArray, state: Any) -> Any:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], DType):
            raise Refused("an array state of another form than numpy's")
        _, shape, dtype, fortran, content = state
        if dtype.code in OBJECT_DTYPES:
            if not isinstance(content, list):
                raise Refused("an object array without a list of objects")
            if any(isinstance(item, (ObjectArray, list)) for item in content):
                raise Refused("an array of objects inside an object array")
            target.content, target.shape = content, checked_shape(shape)
            return target
        return view(content, dtype, shape, fortran=bool(fortran))


def _integer(text: str) -> Any:
    if text in ("00", "01"):
        return text == "01"
    if len(text) > 25:
        raise Refused(f"an integer of {len(text)} digits")
    return int(text.removesuffix("L"))


def _long(raw: memoryview) -> int:
    if len(raw) > 16:
        raise Refused(f"an integer of {len(raw):,} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _quoted(line: bytes) -> bytes:
    line = line.strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise Refused("a string without quotes")
    return codecs.escape_decode(line[1:-1])[0]


_STEPS: dict[int, Any] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME: advisory; each value checks its own length
    ord("("): lambda m: m.push(_MARK),
    ord("0"): lambda m: m.pop(),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): lambda m: m.push(_integer(m.short_line())),
    ord("L"): lambda m: m.push(_integer(m.short_line())),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.push(_long(m.take(m.number("<B")))),
    0x8B: lambda m: m.push(_long(m.take(m.number("<i")))),
    ord("F"): lambda m: m.push(float(m.short_line())),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("S"): lambda m: m.push(_quoted(m.line())),
    ord("T"): lambda m: m.push(bytes(m.take(m.number("<i")))),
    ord("U"): lambda m: m.push(bytes(m.take(m.number("<B")))),
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),
    ord("C"): lambda m: m.push(bytes(m.take(m.number("<B")))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    0x96: lambda m: m.push(m.take(m.number("<Q"))),  # BYTEARRAY8
    ord("V"): lambda m: m.push(m.text(m.line(), "raw-unicode-escape")),
    ord("X"): lambda m: m.push(m.text(m.take(m.number("<I")))),
    0x8C: lambda m: m.push(m.text(m.take(m.number("<B")))),
    0x8D: lambda m: m.push(m.text(m.take(m.number("<Q")))),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.to_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: (items := m.to_mark(), m.push([]), m.append(items)),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.to_mark()),
    ord("}"): lambda m: m.push({}),
    ord("d"): lambda m: m.make_dict(),
    ord("s"): lambda m: (value := m.pop(), key := m.pop(), m.set_items([key, value])),
    ord("u"): lambda m: m.set_items(m.to_mark()),
    ord("p"): lambda m: m.remember(_integer(m.short_line())),
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("g"): lambda m: m.recall(_integer(m.short_line())),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("c"): lambda m: m.name(m.short_line(), m.short_line()),
    0x93: lambda m: m.stack_name(),
    ord("R"): lambda m: m.reduce(),
    ord("b"): lambda m: m.build(),
}
