"""Changes to the fields of Thrift structs (compact protocol) in a Parquet file: its footer, and the headers of its pages.

Structs carry no length, so one can be put together again and spliced in where it stood; nothing else of the file is touched.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from functools import cache

from fuzz.mutate import NUMBERS

__all__ = [
    "Field",
    "Node",
    "changed_footer",
    "changed_page",
    "changed_payload",
    "footer_nodes",
    "integer",
    "page_header",
    "page_places",
    "spliced",
]

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
INTEGERS = (I16, I32, I64)


@dataclass(frozen=True)
class Field:
    """A field of a struct, or an element of a list: its value as bytes."""

    number: int
    kind: int
    raw: bytes


@dataclass
class Node:
    """A struct or list in the bytes [begin, end). inner: the type of a list's elements, 0 for a struct. path: field numbers down to it."""

    begin: int
    end: int
    inner: int
    path: tuple[int, ...]
    fields: list[Field] = field(default_factory=list)

    def build(self, fields: list[Field]) -> bytes:
        """The struct or list with other fields."""
        if self.inner:
            return _list_head(len(fields), self.inner) + b"".join(f.raw for f in fields)
        out, last = bytearray(), 0
        for f in fields:
            step = f.number - last
            out += bytes([step << 4 | f.kind]) if 0 < step < 16 else bytes([f.kind]) + integer(f.number)
            out += f.raw
            last = f.number
        return bytes(out) + b"\0"


def changed_footer(data: bytes, rng: random.Random) -> bytes:
    """The file after one to three changes to its footer's fields."""
    nodes = footer_nodes(data)
    chosen: list[Node] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node = rng.choice(nodes)
        if not any(node.begin < other.end and other.begin < node.end for other in chosen):
            chosen.append(node)
    return spliced(data, [(node, _changed(node, rng)) for node in chosen])


def changed_page(data: bytes, rng: random.Random) -> bytes:
    """The file after a change to the header of one of its pages. What follows moves by the difference in length."""
    nodes = _nodes(data, rng.choice(page_places(data)))
    node = rng.choice(nodes)
    return data[: node.begin] + node.build(_changed(node, rng)) + data[node.end :]


def changed_payload(data: bytes, rng: random.Random) -> bytes:
    """The file after changes to the values in one of its pages, whose checksum is made right again."""
    header = page_header(data, rng.choice(page_places(data)))
    numbers = {f.number: _Parser(f.raw, 0).zigzag() for f in header.fields if f.kind == I32}
    end = header.end + numbers[3]
    payload = bytearray(data[header.end : end])
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(payload))
        size = rng.choice((1, 1, 2, 4, 8))
        number = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
        new = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size, number))
        payload[at : at + size] = new[: len(payload) - at]
    crc = zlib.crc32(payload)
    fields = [Field(4, I32, integer(crc - (crc >> 31 << 32))) if f.number == 4 else f for f in header.fields]
    return data[: header.begin] + header.build(fields) + payload + data[end:]


def page_header(data: bytes, at: int) -> Node:
    """The PageHeader that begins there."""
    return _nodes(data, at)[0]


def spliced(data: bytes, changes: list[tuple[Node, list[Field]]]) -> bytes:
    """The file with other fields in these nodes of its footer, which must not lie in one another."""
    begin = _begin(data)
    new = data[begin:-8]
    for node, fields in sorted(changes, key=lambda change: -change[0].begin):
        new = new[: node.begin - begin] + node.build(fields) + new[node.end - begin :]
    return data[:begin] + new + len(new).to_bytes(4, "little") + b"PAR1"


@cache
def footer_nodes(data: bytes) -> list[Node]:
    """Every struct and list of a Parquet file's footer that holds something."""
    return _nodes(data, _begin(data))


@cache
def page_places(data: bytes) -> list[int]:
    """Where the first page of each column chunk begins: ColumnMetaData.data_page_offset."""
    found = [f.raw for node in footer_nodes(data) if node.path == (4, 0, 1, 0, 3) for f in node.fields if f.number == 9]
    return [_Parser(raw, 0).zigzag() for raw in found]


def _begin(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def _nodes(data: bytes, at: int) -> list[Node]:
    parser = _Parser(data, at)
    parser.struct(())
    return [node for node in parser.nodes if node.fields]


class _Parser:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.nodes: list[Node] = []

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def zigzag(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def struct(self, path: tuple[int, ...]) -> None:
        node = Node(self.at, 0, 0, path)
        self.nodes.append(node)
        number = 0
        while head := self.data[self.at]:
            self.at += 1
            number = number + (head >> 4) if head > 15 else self.zigzag()
            node.fields.append(self._field(number, head & 15, path))
        self.at += 1
        node.end = self.at

    def _field(self, number: int, kind: int, path: tuple[int, ...]) -> Field:
        begin = self.at
        if kind in INTEGERS:
            self.varint()
        elif kind == BINARY:
            size = self.varint()
            self.at += size
        elif kind == LIST:
            head = self.data[self.at]
            self.at += 1
            node = Node(begin, 0, head & 15, (*path, number))
            self.nodes.append(node)
            count = head >> 4 if head < 0xF0 else self.varint()
            node.fields = [self._field(0, node.inner, node.path) for _ in range(count)]
            node.end = self.at
        elif kind == STRUCT:
            self.struct((*path, number))
        elif kind not in (TRUE, FALSE):
            self.at += 8 if kind == DOUBLE else 1
        return Field(number, kind, self.data[begin : self.at])


def integer(value: int) -> bytes:
    """A number as Thrift writes it."""
    return _varint((value << 1 ^ value >> 63) & (1 << 64) - 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _list_head(count: int, inner: int) -> bytes:
    return bytes([count << 4 | inner]) if count < 15 else bytes([0xF0 | inner]) + _varint(count)


def _changed(node: Node, rng: random.Random) -> list[Field]:
    """The node's fields after one change: one more, less, twice, elsewhere, of another number, type or value."""
    fields = list(node.fields)
    at = rng.randrange(len(fields))
    old = fields[at]
    what = rng.randrange(8)
    if what == 0:
        del fields[at]
    elif what == 1:
        fields[at:at] = [old] * rng.choice((1, 1, 2, 20))
    elif what == 2:
        other = rng.randrange(len(fields))
        fields[at], fields[other] = fields[other], old
    elif what == 3 and not node.inner:
        fields[at] = Field(rng.choice((1, old.number + 1, rng.randrange(20), 32767, -1)), old.kind, old.raw)
    elif what == 4 and not node.inner:
        fields[at] = Field(old.number, rng.choice((TRUE, I32, I64, BINARY, LIST, STRUCT)), old.raw)
    else:
        fields[at] = Field(old.number, old.kind, _other(old, rng))
    return fields


def _other(old: Field, rng: random.Random) -> bytes:
    if old.kind in INTEGERS:
        value, bits = _Parser(old.raw, 0).zigzag(), {I16: 16, I32: 32, I64: 64}[old.kind]
        new = rng.choice((value + 1, value - 1, value * 2, value ^ 1 << rng.randrange(31), rng.randrange(16), rng.choice(NUMBERS)))
        return integer((new + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1))
    if old.kind == BINARY:
        parser = _Parser(old.raw, 0)
        value = old.raw[-parser.varint() or len(old.raw) :]
        at = rng.randrange(len(value) + 1)
        new = rng.choice((b"", value[:at], value + b"\0", value[:at] + rng.randbytes(1) + value[at + 1 :], value * 2, rng.randbytes(8)))
        return _varint(len(new)) + new
    if old.kind == LIST:
        node = _list_node(old.raw)
        return node.build(node.fields * rng.choice((0, 2, 2, 9)) if rng.random() < 0.7 else node.fields[:1] * rng.choice((1, 16, 300)))
    return old.raw * rng.choice((0, 2)) if old.kind == STRUCT else old.raw


def _list_node(raw: bytes) -> Node:
    parser = _Parser(raw, 0)
    parser._field(0, LIST, ())
    return parser.nodes[0]
