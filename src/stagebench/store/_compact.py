"""Thrift's compact protocol, as far as Parquet's page headers and footers need it: strict, and no more work than the bytes at hand.

Written after apache/thrift's doc/specs/thrift-compact-protocol.md. Functions take the bytes and where a value begins, and give the value
and where it ends: a footer is tens of thousands of values, and an object for each took three times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "BINARY",
    "BYTE",
    "FALSE",
    "I16",
    "I32",
    "I64",
    "LIST",
    "STRUCT",
    "TRUE",
    "Parser",
    "ShortError",
    "ThriftError",
    "binary",
    "elements",
    "integer",
    "list_head",
    "struct",
]

TRUE, FALSE, BYTE, I16, I32, I64, _DOUBLE, BINARY, LIST, _SET, _MAP, STRUCT = range(1, 13)
_MAX_DEPTH = 12

Parser = Callable[[bytes, int], tuple[Any, int]]


class ThriftError(ValueError):
    """Bytes that are not what the format says."""


class ShortError(ThriftError):
    """The bytes at hand end inside a value."""


def struct(data: bytes, at: int, wanted: Mapping[int, tuple[int, Parser]], refused: tuple[int, ...] = ()) -> tuple[dict[int, Any], int]:
    """The wanted fields that are there, {field: value}; the others are passed over.

    wanted: {field: (type, parser)}. Raises ThriftError for a wanted field of another type or there twice and for a refused field,
    ShortError where the bytes end.
    """
    found: dict[int, Any] = {}
    field = 0
    try:
        while head := data[at]:
            at, kind = at + 1, head & 15
            if head > 15:
                field += head >> 4
            else:
                field, at = integer(data, at)
            if field in wanted:
                expected, parse = wanted[field]
                if kind != expected or field in found:
                    raise ThriftError(f"field {field} {'twice' if field in found else f'of type {kind}, expected {expected}'} at byte {at}")
                found[field], at = parse(data, at)
            elif field in refused:
                raise ThriftError(f"field {field} at byte {at}, which is not expected here")
            elif I16 <= kind <= I64:  # most values are: no call for them
                while data[at] > 127:
                    at += 1
                at += 1
            else:
                at = _skip(data, at, kind, 0)
    except IndexError:
        raise ShortError(f"the bytes end at {len(data)}, inside a value") from None
    return found, at + 1


def integer(data: bytes, at: int) -> tuple[int, int]:
    """A signed number of any width."""
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def binary(data: bytes, at: int) -> tuple[bytes, int]:
    """A string's bytes."""
    size, at = _varint(data, at)
    if size > len(data) - at:
        raise ShortError(f"the bytes end at {len(data)}, inside {size} bytes at {at}")
    return data[at : at + size], at + size


def elements(data: bytes, at: int, expected: int, parse: Parser) -> tuple[list[Any], int]:
    """A list of values of one type. Raises ThriftError for another."""
    count, kind, at = list_head(data, at)
    if kind != expected:
        raise ThriftError(f"a list of type {kind}, expected {expected}, at byte {at}")
    values = []
    for _ in range(count):
        value, at = parse(data, at)
        values.append(value)
    return values, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    if value < 128:
        return value, at + 1
    value &= 127
    for shift in range(7, 64, 7):
        at += 1
        byte = data[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + 1
    raise ThriftError(f"a number longer than 64 bits at byte {at}")


def list_head(data: bytes, at: int) -> tuple[int, int, int]:
    """How many, of which type, and where the first begins."""
    head = data[at]
    at, count = at + 1, head >> 4
    if count == 15:
        count, at = _varint(data, at)
    if count > len(data) - at:  # each takes a byte at least
        raise ShortError(f"the bytes end at {len(data)}, inside a list of {count} at {at}")
    return count, head & 15, at


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    """Where the value ends. Raises ThriftError for a type that Parquet does not use, IndexError or ShortError where the bytes end."""
    if I16 <= kind <= I64:
        while data[at] > 127:
            at += 1
        return at + 1
    if kind == BINARY:
        return binary(data, at)[1]
    if kind in (TRUE, FALSE):
        return at
    if depth > _MAX_DEPTH:
        raise ThriftError(f"nested too deep at byte {at}")
    if kind == STRUCT:
        while head := data[at]:
            at += 1
            if head < 16:  # the field's number in full
                at = _skip(data, at, I32, depth)
            kind = head & 15
            if I16 <= kind <= I64:
                while data[at] > 127:
                    at += 1
                at += 1
            else:
                at = _skip(data, at, kind, depth + 1)
        return at + 1
    if kind in (LIST, _SET):
        count, inner, at = list_head(data, at)
        inner = BYTE if inner in (TRUE, FALSE) else inner
        for _ in range(count):
            at = _skip(data, at, inner, depth + 1)
        return at
    if kind in (BYTE, _DOUBLE):
        return at + (1 if kind == BYTE else 8)
    raise ThriftError(f"a value of type {kind} at byte {at}")
