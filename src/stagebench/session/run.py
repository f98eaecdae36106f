"""One run of one sample (or batch) through all stages: the only place where stages are opened in order."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from stagebench.engines.base import Engine
from stagebench.errors import SampleTimeoutError, SourceError, TimingError
from stagebench.machine import Reading
from stagebench.models.base import Adapter, Decoding, Features, Prompt, Tokens
from stagebench.models.hooks import EncoderCounter
from stagebench.rows import Status
from stagebench.session.order import Task
from stagebench.session.prefetch import Ahead
from stagebench.stages import StageClock, StageTimes

__all__ = ["ClockFactory", "DeviceLostError", "FrameLoader", "Run", "Subject", "explain", "failure", "recover", "run_once"]

log = logging.getLogger(__name__)


class FrameLoader(Protocol):
    """The timed load stage. What it hands out must stay as it is until a batch's last clip is loaded (loading.Loader keeps two batches)."""

    def load(self, clip: str) -> Sequence[np.ndarray]: ...


class ClockFactory(Protocol):
    def __call__(self, device: str, *, sync: bool, timeout_s: float | None) -> StageClock: ...


class Sensors(Protocol):
    """As much of a machine.Monitor as a run needs."""

    def read(self, *, closing: bool = False) -> Reading: ...


class DeviceLostError(TimingError):
    """The device is of no more use to this process: nothing measured after this would be true."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a loaded model, how it makes tokens, and where its frames come from."""

    adapter: Adapter
    engine: Engine
    loader: FrameLoader
    device: str
    clock: ClockFactory = StageClock
    ahead: Ahead | None = None
    """Loads and preprocesses the next run's batch meanwhile (timing.prefetch)."""
    meter: Callable[[], int | None] | None = None
    """Reads the device's energy counter, in mJ."""


@dataclass(frozen=True)
class Run:
    """What came of one run. Per-sample tuples are in the order of the batch."""

    status: Status
    reason: str | None = None
    times: StageTimes | None = None
    tokens: Tokens | None = None
    prompt_tokens: tuple[int, ...] = ()
    visual_tokens: tuple[int, ...] = ()
    feature_hashes: tuple[str, ...] = ()
    encoder_calls: int | None = None
    """Forward calls of the vision module in the whole run; None in a plain run, which does not count."""
    encoder_calls_outside: int = 0
    """Those of them outside the encode stage."""
    borders: tuple[Reading, Reading] | None = None
    """Sensors right before the window was opened and right after it was closed, before anything else was done."""
    captures: int = 0
    """Graphs captured or programs compiled inside the window: its times are not the work's, and its encoder calls are the capture's."""


@dataclass
class _Seen:
    """What a run shows besides its times, kept until the window is closed."""

    features: Features | None = None
    prompt: Prompt | None = None
    tokens: Tokens | None = None
    borders: tuple[Reading, Reading] | None = None
    calls: list[int] = field(default_factory=list)


def run_once(
    subject: Subject,
    tasks: Sequence[Task],
    decoding: Decoding,
    *,
    plain: bool = False,
    timeout_s: float | None = None,
    following: Sequence[Task] = (),
    metered: Collection[str] = (),
    sensors: Sensors | None = None,
) -> Run:
    """Load, preprocess, copy, encode and generate once, on a fresh clock.

    plain: no hooks and no synchronisation inside the total: what the instrumented run is compared with. following: the batch of the run
    after this one, for a subject that prefetches. metered: stages at whose borders the subject's energy meter is read.
    sensors: read at the window's borders.
    Whatever the model raises becomes the run's status; memory is given back after an OOM. Raises DeviceLostError when the device is gone.
    """
    clock = subject.clock(subject.device, sync=not plain, timeout_s=timeout_s)
    if metered and subject.meter is not None:
        clock.watch(subject.meter, metered)
    seen = _Seen()
    captured = _captures(subject)
    status, reason = Status.OK, None
    try:
        if plain:
            _stages(subject, tasks, decoding, clock, seen, None, following, sensors)
        else:
            with EncoderCounter(subject.adapter.vision_module()) as counter:
                _stages(subject, tasks, decoding, clock, seen, counter, following, sensors)
                seen.calls = [counter.total, counter.outside_encode]
        times = clock.times()
        if timeout_s is not None and times.total_ms > timeout_s * 1e3:
            raise SampleTimeoutError(
                f"{times.total_ms * 1e-3:.1f} s in all, {timeout_s:g} s allowed. Raise timing.sample_timeout_s if that is its normal time."
            )
        if seen.tokens is not None and seen.tokens.nan:
            status, reason = Status.NAN, "logits were NaN or infinite"
        return _result(status, reason, times, seen, _captures(subject) - captured)
    except SampleTimeoutError as error:
        return Run(Status.TIMEOUT, str(error))
    except SourceError as error:
        return Run(Status.ERROR, f"{type(error).__name__}: {error}")
    except (torch.OutOfMemoryError, MemoryError) as error:
        status, reason = Status.OOM, _one_line(error)
    except Exception as error:  # a model may fail in any way: the failure is this sample's row
        if _out_of_memory(error):
            status, reason = Status.OOM, _one_line(error)
        elif _device_lost(error):
            raise DeviceLostError(
                f"{subject.device}: {_one_line(error)}. The job ends here and goes on from its journal when it is run again."
            ) from error
        else:
            log.warning("%s: %s", tasks[0].sample, _one_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            status, reason = Status.ERROR, failure(error)
    # outside the handlers: a live traceback would keep the failed run's tensors
    seen = _Seen()
    if status is Status.OOM:
        recover(subject.device)
    return Run(status, reason)


def _stages(
    subject: Subject,
    tasks: Sequence[Task],
    decoding: Decoding,
    clock: StageClock,
    seen: _Seen,
    counter: EncoderCounter | None,
    following: Sequence[Task],
    sensors: Sensors | None,
) -> None:
    adapter, ahead = subject.adapter, subject.ahead
    pending = ahead.take(tasks) if ahead is not None else None
    before = None if sensors is None else sensors.read()
    with torch.inference_mode(), clock.total():
        with clock.stage("load"):
            clips = [subject.loader.load(task.clip) for task in tasks] if pending is None else pending.loaded.result()
        with clock.stage("preprocess"):
            if pending is not None:
                inputs = pending.inputs.result()
            else:
                inputs = adapter.collate([adapter.preprocess(frames, task.query) for frames, task in zip(clips, tasks, strict=True)])
        if ahead is not None and following:
            ahead.begin(following)
        with clock.stage("h2d"):
            inputs = inputs.to(adapter.device, adapter.spec.dtype)
        replayed = _replays(subject)
        if counter is not None:
            counter.enter("encode")
        with clock.stage("encode"):
            features = adapter.encode(inputs)
        if counter is not None:
            if not counter.count("encode"):  # a graph replay runs the encoder without its Python, so no hook sees it
                counter.add(_replays(subject) - replayed)
            counter.enter("after")
        seen.features = features

        def merge() -> Prompt:
            seen.prompt = adapter.merge(inputs, features)
            return seen.prompt

        seen.tokens = subject.engine.run(merge, decoding, clock)
    if sensors is not None and before is not None:
        seen.borders = (before, sensors.read(closing=True))


def _replays(subject: Subject) -> int:
    """Encoder passes that the engine's captured graph has made so far; 0 for an engine that leaves encode to the adapter."""
    return int(getattr(getattr(subject.engine, "encoder", None), "calls", 0))


def _captures(subject: Subject) -> int:
    """What engine and encoder have captured or compiled without being asked to beforehand."""
    engine: Any = subject.engine
    return len(getattr(engine, "late", ())) + int(getattr(getattr(engine, "encoder", None), "captures", 0))


def explain(device: str, error: Exception) -> str:
    """A failure outside a run in one line, memory given back. Raises DeviceLostError when the device is gone."""
    reason = failure(error)
    if isinstance(error, DeviceLostError):
        raise error
    if not _out_of_memory(error) and _device_lost(error):
        raise DeviceLostError(f"{device}: {reason}. The job ends here and goes on from its journal when it is run again.") from error
    recover(device)
    return reason


def _result(status: Status, reason: str | None, times: StageTimes, seen: _Seen, captures: int) -> Run:
    """Everything that synchronises or copies, done after the window is closed."""
    features, prompt = seen.features, seen.prompt
    return Run(
        status=status,
        reason=reason,
        times=times,
        tokens=seen.tokens,
        prompt_tokens=tuple(int(n) for n in prompt.attention_mask.sum(-1).tolist()) if prompt is not None else (),
        visual_tokens=features.visual_tokens if features is not None else (),
        feature_hashes=tuple(Features((embeds,)).content_hash() for embeds in features.embeds) if features is not None else (),
        encoder_calls=seen.calls[0] if seen.calls else None,
        encoder_calls_outside=seen.calls[1] if seen.calls else 0,
        borders=seen.borders,
        captures=captures,
    )


def failure(error: BaseException) -> str:
    """Its kind and what it says, in one line."""
    return f"{type(error).__name__}: {_one_line(error)}"


def recover(device: str) -> None:
    """Give the failed run's memory back, so that the next sample finds the device as this one did.

    Outside the handler where that can be: a live traceback keeps the run's tensors.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _out_of_memory(error: BaseException) -> bool:
    """Libraries below torch say it in their own words."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text)


def _device_lost(error: BaseException) -> bool:
    """A CUDA error other than OOM: the context stays broken, and each later call fails or lies."""
    accelerator: Any = getattr(torch, "AcceleratorError", None)
    if accelerator is not None and isinstance(error, accelerator):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("CUDA error" in text or "cuDNN error" in text or "CUBLAS_STATUS" in text)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:497] + "..."
