"""Whole Thrift structs (compact protocol) as trees, to be changed and written again: what the writer makes footers of.

A struct is a dict from field number to (type, value), a list is (type of its elements, elements). A boolean field is its type. Only
pyarrow's own footers are decoded here, never a file's: what is read from files goes through `_compact.struct`, which is strict.
"""

from __future__ import annotations

from typing import Any

from stagebench.store._compact import BINARY, BYTE, FALSE, I16, I32, I64, LIST, STRUCT, TRUE, binary, integer, list_head

__all__ = ["Struct", "decode", "encode"]

Struct = dict[int, tuple[int, Any]]


def decode(data: bytes, at: int = 0) -> tuple[Struct, int]:
    """The struct at a place, and the place behind it. `encode` gives the same bytes. Raises ValueError for a type that Parquet has not."""
    struct: Struct = {}
    field = 0
    while head := data[at]:
        at += 1
        kind = head & 15
        if head >> 4:
            field += head >> 4
        else:
            field, at = integer(data, at)
        if kind in (I64, I32) and (byte := data[at]) < 128:  # most values: each row has some hundred of them
            struct[field] = (kind, byte >> 1 ^ -(byte & 1))
            at += 1
            continue
        value, at = _value(data, at, kind)
        struct[field] = (kind, value)
    return struct, at + 1


def encode(struct: Struct) -> bytes:
    """The bytes of a struct, its fields in the order of their numbers. A struct within it may be given as its bytes."""
    out = bytearray()
    _put_struct(out, struct)
    return bytes(out)


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (I32, I64, I16):
        return integer(data, at)
    if kind == BINARY:
        return binary(data, at)
    if kind == STRUCT:
        return decode(data, at)
    if kind == LIST:
        count, inner, at = list_head(data, at)
        values = []
        for _ in range(count):
            value, at = (data[at], at + 1) if inner in (TRUE, FALSE) else _value(data, at, inner)
            values.append(value)
        return (inner, values), at
    if kind in (TRUE, FALSE):
        return None, at
    if kind == BYTE:
        return data[at], at + 1
    raise ValueError(f"a Thrift value of type {kind} at {at}")


def _put_struct(out: bytearray, struct: Struct) -> None:
    before = 0
    for field, (kind, value) in sorted(struct.items()):
        delta = field - before
        if delta < 16:
            out.append(delta << 4 | kind)
        else:
            out.append(kind)
            _put_integer(out, field)
        before = field
        _put(out, kind, value)
    out.append(0)


def _put(out: bytearray, kind: int, value: Any) -> None:
    if kind in (I32, I64, I16):
        _put_integer(out, value)
    elif kind == BINARY:
        _put_varint(out, len(value))
        out += value
    elif kind == STRUCT:
        if isinstance(value, bytes):
            out += value
        else:
            _put_struct(out, value)
    elif kind == LIST:
        inner, values = value
        if len(values) < 15:
            out.append(len(values) << 4 | inner)
        else:
            out.append(0xF0 | inner)
            _put_varint(out, len(values))
        for each in values:
            if inner in (TRUE, FALSE):
                out.append(each)
            else:
                _put(out, inner, each)
    elif kind == BYTE:
        out.append(value)
    elif kind not in (TRUE, FALSE):
        raise ValueError(f"a Thrift value of type {kind}")


def _put_integer(out: bytearray, value: int) -> None:
    _put_varint(out, (value << 1) ^ (value >> 63))


def _put_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
