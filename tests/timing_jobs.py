"""What tests of timing jobs share: clips in memory, a tiny real model, an engine that gives other tokens, a job that is killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from stagebench import engines
from stagebench.errors import SourceError
from stagebench.models import registry
from stagebench.models.base import Adapter, Decoding, ModelSpec, Tokens
from stagebench.session import Task
from stagebench.stages import StageClock


class Frames:
    """A loader whose clips are in memory: those in `bad` cannot be read, and each takes `seconds`, as a disk does, without the interpreter.

    It notes which clips were asked for, and by which threads.
    """

    def __init__(self, bad: Collection[str] = (), seconds: float = 0.0) -> None:
        self.bad, self.seconds = bad, seconds
        self.loaded: list[str] = []
        self.threads: set[str] = set()

    def load(self, clip: str) -> list[np.ndarray]:
        self.threads.add(threading.current_thread().name)
        self.loaded.append(clip)
        time.sleep(self.seconds)
        if clip in self.bad:
            raise SourceError(f"{clip}: no such clip. Look for it.")
        rng = np.random.default_rng(int(clip.rpartition("/")[2]))
        return [rng.integers(0, 255, (40, 48, 3), dtype=np.uint8) for _ in range(4)]


def tiny_llava(device: str = "cpu") -> Adapter:
    """LLaVA's classes with random weights."""
    adapter = registry.create("hf")
    adapter.load(ModelSpec("dummy:0", "llava", "tiny", frames_as="grid"), device)
    return adapter


def tasks(count: int, queries: Sequence[str] = ("What is there?",)) -> list[Task]:
    """One for each of `count` clips that `Frames` has, asked the queries in turn."""
    return [Task(f"seq/{n}#q", f"seq/{n}", "seq", f"id{n}", queries[n % len(queries)], f"digest{n}") for n in range(count)]


class Edited:
    """The engine `generate`, with its tokens changed: `edit(tokens, decoding, clock)`."""

    name = "edited"

    def __init__(self, edit: Callable[[Tokens, Decoding, StageClock], Tokens]) -> None:
        self.edit, self.inner = edit, engines.create("generate")

    def prepare(self, *arguments: Any) -> Any:
        return self.inner.prepare(*arguments)

    def run(self, merge: Any, decoding: Decoding, clock: StageClock) -> Tokens:
        return self.edit(self.inner.run(merge, decoding, clock), decoding, clock)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in a job catches it."""


def killed_after(samples: int) -> Callable[[int, int], None]:
    """A job's `progress` that kills it when so many samples are done."""

    def die(done: int, total: int) -> None:
        if done == samples:
            raise Killed

    return die
