"""Before anything is timed: every shape that will come is shown to the engine, so that it captures and compiles outside all windows.

A prompt's length follows from its text and its frames' sizes. One sample of each such pair is loaded, preprocessed, encoded and merged
once, untimed, and the engine admits the prompt. What it spent is reported with the job. A shape that comes up all the same is found by
`captures`: the row of that run is kept out of means.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stagebench.models.base import Decoding
from stagebench.session.order import Group
from stagebench.session.run import Subject, explain

__all__ = ["Admission", "admit_shapes"]

log = logging.getLogger(__name__)


@dataclass
class Admission:
    """What the preparation took. Empty for engines that capture and compile nothing."""

    shapes: int = 0
    """Different batches of (text, frame sizes)."""
    total_ms: float = 0.0
    """Loading, preprocessing and encoding included."""
    captured_ms: dict[str, float] = field(default_factory=dict)
    """Capture and compile times by what was captured."""
    note: str | None = None
    """What engine or encoder turned out not to be able to, which `prepare` could not know."""
    failed: list[str] = field(default_factory=list)
    """Shapes that could not be prepared; their runs show the fault as rows."""


def admit_shapes(
    subject: Subject, groups: Sequence[Group], decodings: Sequence[Decoding], noted: Callable[[Group], AbstractContextManager[None]]
) -> Admission:
    """Show the engine one batch of every shape among the groups.

    decodings: one a length mode; the one with most tokens comes first, so that caches are sized once. noted: a context in which a lost
    device is put down to the group. Raises DeviceLostError; any other failure is noted and left to the runs.
    """
    found = Admission()
    admit = getattr(subject.engine, "admit", None)
    if admit is None:
        return found
    began = time.perf_counter()
    seen: set[tuple[Any, ...]] = set()
    longest_first = sorted(decodings, key=lambda decoding: -decoding.max_new_tokens)
    for group in groups:
        with noted(group):
            try:
                clips = [subject.loader.load(task.clip) for task in group.all]
                shape = tuple((task.query, _sizes(frames)) for task, frames in zip(group.all, clips, strict=True))
                if shape in seen:
                    continue
                seen.add(shape)
                _admit(subject, group, clips, longest_first, admit)
            except Exception as error:  # of any kind: the run will meet it again, and there it becomes a row
                reason = explain(subject.device, error)
                log.warning("%s: not prepared: %s", group.tasks[0].sample, reason)
                found.failed.append(f"{group.tasks[0].sample}: {reason}")
    found.shapes = len(seen)
    found.total_ms = (time.perf_counter() - began) * 1e3
    found.captured_ms = dict(getattr(subject.engine, "prepare_ms", {}))
    eager = getattr(getattr(subject.engine, "encoder", None), "eager", None)
    notes = (getattr(subject.engine, "note", None), f"encode stays eager: {eager}" if eager else None)
    found.note = "; ".join(note for note in notes if note) or None
    return found


def _admit(subject: Subject, group: Group, clips: Sequence[Any], decodings: Sequence[Decoding], admit: Callable[..., Any]) -> None:
    adapter = subject.adapter
    with torch.inference_mode():
        inputs = adapter.collate([adapter.preprocess(frames, task.query) for frames, task in zip(clips, group.all, strict=True)])
        inputs = inputs.to(adapter.device, adapter.spec.dtype)
        prompt = adapter.merge(inputs, adapter.encode(inputs))
        for decoding in decodings:
            admit(prompt, decoding)


def _sizes(frames: Sequence[np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(frame.shape for frame in frames)
