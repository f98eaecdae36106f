"""Changes to a good file that tend to break readers: bytes, lengths, tokens of the format, parts of other good files."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["changed_bytes", "changed_value"]

NUMBERS = (0, 1, -1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30)
TEXTS = ("", "..", "../x", "/etc/passwd", "\x00", "\ud800", "a" * 300, "<script>", "nan", "dummy:0", "dummy:-1", "natural", "1e999", "é")


def changed_bytes(seeds: Sequence[bytes], rng: random.Random, tokens: Sequence[bytes] = ()) -> bytes:
    """One of the seeds after one to six changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        _CHANGES[rng.randrange(len(_CHANGES))](data, at, rng, seeds, tokens)
    return bytes(data)


def _flip(data: bytearray, at: int, rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    if at < len(data):
        data[at] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, at: int, rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    if at < len(data):
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(data: bytearray, at: int, rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    size = rng.choice((2, 4, 8))
    data[at : at + size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))


def _cut(data: bytearray, at: int, rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    del data[at : at + rng.choice((1, 2, 4, 16, 1 << 30))]


def _double(data: bytearray, at: int, rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    data[at:at] = data[at : at + rng.choice((1, 8, 64, 512))] * rng.choice((1, 2, 30))


def _token(data: bytearray, at: int, rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    token = rng.choice(tokens) if tokens else rng.randbytes(rng.randrange(9))
    data[at : at + rng.choice((0, 0, len(token), 1))] = token


def _splice(data: bytearray, at: int, rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    other = rng.choice(seeds)
    start = rng.randrange(len(other) + 1)
    part = other[start : start + rng.choice((4, 32, 256, 4096))]
    data[at : at + rng.choice((0, len(part)))] = part


_CHANGES: list[Callable[..., None]] = [_flip, _flip, _byte, _byte, _number, _cut, _double, _token, _token, _splice]


def changed_value(value: Any, rng: random.Random) -> Any:
    """A JSON-able value with one to three of its parts replaced, removed, renamed or put elsewhere."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _descend(value, rng)
    return value


def _descend(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        copy = dict(value)
        what = rng.random()
        if what < 0.1:
            del copy[key]
        elif what < 0.2:
            copy[rng.choice((*TEXTS, *value))] = copy.pop(key)
        else:
            copy[key] = _descend(value[key], rng)
        return copy
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _descend(value[at], rng), *value[at + rng.choice((0, 1)) :]]
    return rng.choice((None, True, {}, [], [value], {"a": value}, float("nan"), float("inf"), 0.5, rng.choice(NUMBERS), rng.choice(TEXTS)))
