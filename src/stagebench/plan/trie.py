"""Where a clip lies: leaves of a binary trie over the bits of blake2b(clip key).

A node's place depends on the keys below it and on nothing else, so a clip that comes or goes touches its own leaf, or splits or joins
it. A number of buckets chosen from the number of clips would move every clip instead.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate

__all__ = ["BITS", "below", "bucket_name", "cut", "find", "prefix", "sort_keys", "spot"]

BITS = 128
ROOT = "root"


def spot(key: str) -> int:
    """The clip's place: BITS bits of blake2b over the key's UTF-8, as a number."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=BITS // 8).digest(), "big")


def sort_keys(keys: Iterable[str]) -> list[tuple[int, str]]:
    """(place, key) in the trie's order, from left to right."""
    return sorted((spot(key), key) for key in keys)


def cut(places: list[tuple[int, str]], weights: list[int], limit: int) -> list[tuple[str, int, int]]:
    """The highest nodes whose keys weigh at most `limit` together, left to right, as (bits, begin, end) into `places`.

    A single key heavier than the limit is a node of its own. Empty nodes are left out. `bits` is "" for the root.
    """
    total = [0, *accumulate(weights)]
    numbers = [place for place, _ in places]
    nodes: list[tuple[str, int, int]] = []
    stack = [("", 0, len(places))]
    while stack:
        bits, begin, end = stack.pop()
        if begin == end:
            continue
        if end - begin == 1 or total[end] - total[begin] <= limit:
            nodes.append((bits, begin, end))
            continue
        right = bits + "1"
        middle = bisect_left(numbers, int(right, 2) << (BITS - len(right)), begin, end)
        stack.append((right, middle, end))
        stack.append((bits + "0", begin, middle))
    return nodes


def bucket_name(bits: str) -> str:
    """How a node is written in file names: its bits, or "root"."""
    return bits or ROOT


def prefix(bucket: str) -> str:
    """The bits of a bucket's name."""
    return "" if bucket == ROOT else bucket


def find(key: str, has: Callable[[str], bool]) -> str | None:
    """The name of the one bucket that holds the key, where `has` says which buckets there are."""
    bits = format(spot(key), f"0{BITS}b")
    return next((name for n in range(BITS + 1) if has(name := bucket_name(bits[:n]))), None)


def below(key: str, bits: str) -> bool:
    """Whether the key lies under the node with these bits."""
    return not bits or spot(key) >> (BITS - len(bits)) == int(bits, 2)
