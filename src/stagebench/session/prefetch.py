"""`timing.prefetch`: the next run's load and preprocess on a worker thread while the device works on this one.

For throughput studies. With it `load` and `preprocess` are what a run waited for the worker, and `total_ms` is what a sample costs in a
stream of samples; the worker takes the interpreter from the decode loop now and then. None of that is a latency, so the rows' source
carries `+prefetch`, and their settings are never pooled with those of runs without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from stagebench.session.order import Task
    from stagebench.session.run import Subject

__all__ = ["SUFFIX", "Ahead", "Pending"]

SUFFIX = "+prefetch"


class Pending:
    """One batch on its way: `loaded` gives its clips' frames, `inputs` what the model takes (on the host)."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.wanted = _key(tasks)
        self.loaded: Future[list[Sequence[Any]]] = Future()
        self.inputs: Future[Any] = Future()


class Ahead:
    """The worker. One batch at a time: the loader's buffers hold the batch in use and the next one, and no third."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: Pending | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, tasks: Sequence[Task]) -> None:
        """Start on what probably comes next. Call it when the current batch's inputs have been taken."""
        pending = Pending(tasks)
        self._pending = pending
        self._pool.submit(self._work, pending, tuple(tasks))

    def take(self, tasks: Sequence[Task]) -> Pending:
        """The batch, begun earlier or now. A wrong guess is waited for (it holds the loader) and dropped."""
        pending = self._pending
        if pending is None or pending.wanted != _key(tasks):
            self.begin(tasks)
            pending = self._pending
        self._pending = None
        if pending is None:
            raise RuntimeError("nothing pending after begin: a prefetcher serves one thread. Use one for each.")
        return pending

    def _work(self, pending: Pending, tasks: Sequence[Task]) -> None:
        subject = self._subject
        try:
            with torch.inference_mode():  # a thread's own setting
                clips: list[Sequence[Any]] = [subject.loader.load(task.clip) for task in tasks]
                pending.loaded.set_result(clips)
                ready = [subject.adapter.preprocess(list(frames), task.query) for frames, task in zip(clips, tasks, strict=True)]
                pending.inputs.set_result(subject.adapter.collate(ready))
        except BaseException as error:  # raised again where the run waits, and judged there like any failure of its own
            if not pending.loaded.done():
                pending.loaded.set_exception(error)
            pending.inputs.set_exception(error)


def _key(tasks: Sequence[Task]) -> tuple[tuple[str, str], ...]:
    return tuple((task.clip, task.query) for task in tasks)
