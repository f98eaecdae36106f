"""In which order samples are measured, in which batches, and which of them also run without instrumentation."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Group", "Task", "groups", "is_plain", "sampling_seed"]


@dataclass(frozen=True)
class Task:
    """One sample to be timed."""

    sample: str
    clip: str
    sequence: str
    id: str
    query: str
    clip_digest: str | None = None
    """Content digest of the clip's source files; None when rows of it are never taken over."""
    skip: str | None = None
    """Why there are no pixels; the sample becomes `skipped` rows."""


@dataclass(frozen=True)
class Group:
    """The samples of one forward pass."""

    order: int
    tasks: tuple[Task, ...]
    """Measured here: each gets rows."""
    filling: tuple[Task, ...] = ()
    """Samples of other groups that fill the last batch, so that a time at batch 8 is a time of 8. They get no rows here."""

    @property
    def all(self) -> tuple[Task, ...]:
        return self.tasks + self.filling

    @property
    def key(self) -> str:
        """Equal for equal work: what the journal finds it again by."""
        return "\n".join(task.sample for task in self.all)


def groups(tasks: Sequence[Task], *, seed: int, batch: int) -> list[Group]:
    """Batches in a random order that depends on the seed and the sample keys only. Skipped samples have no part in it."""
    there = sorted((task for task in tasks if task.skip is None), key=lambda task: task.sample)
    random.Random(seed).shuffle(there)  # noqa: S311  (an order, no secret)
    found = []
    for order, start in enumerate(range(0, len(there), batch)):
        own = tuple(there[start : start + batch])
        lacking = batch - len(own)
        filling = tuple(there[n % start] if start else own[n % len(own)] for n in range(lacking))
        found.append(Group(order, own, filling))
    return found


def is_plain(order: int, share: float) -> bool:
    """Whether the group at this place also runs without instrumentation: evenly spread, the first one always when share > 0.

    The order is random already, so even spacing in it is a random choice of samples.
    """
    if share <= 0:
        return False
    return order == 0 or int(order * share) != int((order - 1) * share)


def sampling_seed(seed: int, sample: str) -> int:
    """The seed of a sample's own random tokens: other samples draw otherwise, its repeats draw the same."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=4).digest(), "big")
