"""The stages of one sample and the clock that times them.

Host time is `perf_counter_ns` with the device synchronised at both ends of a stage; on CUDA an event pair beside it gives
the time between the same two points on the device's own clock. `total` is timed on its own around all stages, so
`total - sum(stages)` shows what the stages missed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stagebench.errors import SampleTimeoutError

if TYPE_CHECKING:
    import torch

STAGES = ("load", "preprocess", "h2d", "encode", "prefill", "decode")
"""In the order in which a sample passes through them."""

TTFT_STAGES = STAGES[:5]
"""Time to first token: everything up to and with prefill, which yields the first token."""

VIEWS: dict[str, dict[str, tuple[str, ...]]] = {
    "3": {"1 load": ("load",), "2 preprocess": ("preprocess", "h2d"), "3 vision + LLM": ("encode", "prefill", "decode")},
    "4": {"1 load": ("load",), "2 preprocess": ("preprocess", "h2d"), "3 vision": ("encode",), "4 LLM": ("prefill", "decode")},
    "5": {
        "1 load": ("load",),
        "2 preprocess": ("preprocess", "h2d"),
        "3 vision": ("encode",),
        "4 prefill": ("prefill",),
        "5 decode": ("decode",),
    },
}
"""The coarser stage views that older papers use, as sums of ours."""

CLOSURE_SHARE = 0.01
CLOSURE_MS = 0.2


def closure_bound_ms(total_ms: float) -> float:
    """The residual above which a sample is suspect: 1 % of its total + 0.2 ms. The same bound holds between the host's and the device's
    clock over the total: the device is idle at both ends of it, so both clocks saw the same interval."""
    return CLOSURE_SHARE * total_ms + CLOSURE_MS


@dataclass(frozen=True)
class StageTimes:
    """One run of one sample (or batch). All times in milliseconds; stages that did not run are absent."""

    host_ms: dict[str, float]
    gpu_ms: dict[str, float]
    total_ms: float
    total_gpu_ms: float | None
    peak_bytes: dict[str, int]
    token_ms: tuple[float, ...] = ()
    """When each token after the first was there, in ms since prefill ended (the first token)."""
    energy_mj: dict[str, int] = field(default_factory=dict)
    """What the device's energy counter moved by over the watched stages (StageClock.watch)."""

    @property
    def residual_ms(self) -> float:
        return self.total_ms - sum(self.host_ms.values())

    @property
    def ttft_ms(self) -> float:
        """load + preprocess + h2d + encode + prefill."""
        return sum(self.host_ms.get(stage, 0.0) for stage in TTFT_STAGES)


@dataclass
class _Span:
    begin_ns: int = 0
    end_ns: int = 0
    begin_event: Any = None
    end_event: Any = None
    begin_mj: int | None = None
    end_mj: int | None = None


_SPARE: dict[int, list[Any]] = {}
"""Device -> timing events that no clock holds: an event's first record creates it on the device, which takes longer than all later ones."""

_BORDER_EVENTS = 2 * len(STAGES) + 2


def _cuda_api() -> Any:
    import torch

    return torch.cuda


@dataclass
class StageClock:
    """Times one sample. Use once: `with clock.total(): with clock.stage("load"): ...`, then `clock.times()`.

    device: where the model runs; `cuda` adds synchronisation, events and peak memory.
    sync: False leaves out every synchronisation, event and memory reading inside the total (the plain run that the
        instrumented one is compared with); stages then still appear, with times that mean nothing on CUDA.
    timeout_s: a stage or token that begins later than this after `total` opened raises SampleTimeoutError, so that a
        model that never stops costs one sample, not the job.
    """

    device: torch.device | str = "cpu"
    sync: bool = True
    timeout_s: float | None = None
    _spans: dict[str, _Span] = field(default_factory=dict)
    _open: str | None = None
    _total: _Span = field(default_factory=_Span)
    _peak: dict[str, int] = field(default_factory=dict)
    _tokens: list[tuple[int, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cuda: Any = None
        self._index = 0
        self._spare: list[Any] = []
        self._meter: Callable[[], int | None] | None = None
        self._watched: frozenset[str] = frozenset()
        self._reading: StageTimes | None = None
        if str(self.device).startswith("cuda"):
            self._cuda = _cuda_api()
            number = str(self.device).partition(":")[2]
            # a number, for torch takes microseconds to read a device's name at each call
            self._index = int(number) if number else int(self._cuda.current_device())
        self._events = self._cuda is not None and self.sync
        if self._events:
            self._spare = _SPARE.setdefault(self._index, [])
            while len(self._spare) < _BORDER_EVENTS:
                event = self._cuda.Event(enable_timing=True)
                event.record()
                self._spare.append(event)

    def watch(self, meter: Callable[[], int | None], stages: Collection[str]) -> None:
        """Read `meter` (a device's energy counter, in mJ) at both borders of these stages, outside their windows.

        A reading stands inside the total, in its residual. A plain clock has no borders to read at and takes none.
        """
        if self.sync:
            self._meter, self._watched = meter, frozenset(stages)

    @property
    def current(self) -> str | None:
        """The stage that is open now, for what is counted by stage."""
        return self._open

    @contextmanager
    def total(self) -> Iterator[None]:
        """The sample's own window, around all stages; the device is idle at both ends, also in a plain run."""
        self._synchronize(always=True)
        self._total.begin_event = self._event()
        self._total.begin_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self._total.end_event = self._event()
            self._synchronize(always=True)
            self._total.end_ns = time.perf_counter_ns()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage. Raises ValueError for an unknown, repeated or nested stage."""
        self.begin(name)
        try:
            yield
        finally:
            if self._open is not None:  # a switch inside may have moved on to the next stage
                self.end()

    def begin(self, name: str) -> None:
        if name not in STAGES:
            raise ValueError(f"stage {name!r}: expected one of {STAGES}")
        if self._open is not None or name in self._spans:
            raise ValueError(f"stage {name!r}: {'opened inside ' + self._open if self._open else 'ran twice'}")
        self._check_deadline(name)
        self._synchronize()
        if self._events:
            self._cuda.reset_peak_memory_stats(self._index)
        self._start(name)

    def end(self) -> None:
        if self._open is None:
            raise ValueError("no stage is open")
        span = self._spans[self._open]
        span.end_event = self._event()
        self._synchronize()
        span.end_ns = time.perf_counter_ns()
        if self._meter is not None and self._open in self._watched:
            span.end_mj = self._meter()
        if self._events:
            # the nested form: max_memory_allocated flattens and sorts every counter first, which takes 100 us
            self._peak[self._open] = int(self._cuda.memory.memory_stats_as_nested_dict(self._index)["allocated_bytes"]["all"]["peak"])
        self._open = None

    def switch(self, name: str) -> None:
        """End the open stage and begin `name`: for one call that holds two stages, as `generate` does.

        Between the two stands only the clock's own reading of memory, which no stage is charged with.
        """
        if self._open is None:
            raise ValueError(f"switch to {name!r}: no stage is open")
        self.end()
        if self._events:
            self._cuda.reset_peak_memory_stats(self._index)
        self._start(name)

    def token(self) -> None:
        """Note that a further token of the decode stage is there. Never synchronises."""
        self._tokens.append((time.perf_counter_ns(), self._event()))
        self._check_deadline(f"decode, token {len(self._tokens) + 1}")

    def times(self) -> StageTimes:
        """The reading. Raises ValueError while a stage or the total is still open."""
        if self._reading is not None:
            return self._reading
        if self._open is not None or not self._total.end_ns:
            raise ValueError(f"{self._open or 'total'} is still open")
        ms = 1e-6
        host = {name: (s.end_ns - s.begin_ns) * ms for name, s in self._spans.items()}
        gpu: dict[str, float] = {}
        total_gpu = None
        if self._events:
            gpu = {name: float(s.begin_event.elapsed_time(s.end_event)) for name, s in self._spans.items()}
            total_gpu = float(self._total.begin_event.elapsed_time(self._total.end_event))
        tokens = self._token_ms()
        self._give_back()
        energy = {n: s.end_mj - s.begin_mj for n, s in self._spans.items() if s.begin_mj is not None and s.end_mj is not None}
        total = (self._total.end_ns - self._total.begin_ns) * ms
        self._reading = StageTimes(host, gpu, total, total_gpu, dict(self._peak), tokens, energy)
        return self._reading

    def _give_back(self) -> None:
        """Events that were read are spare for the next clock."""
        for span in (*self._spans.values(), self._total):
            self._spare += [event for event in (span.begin_event, span.end_event) if event is not None]
        self._spare += [event for _, event in self._tokens if event is not None]

    def _token_ms(self) -> tuple[float, ...]:
        decode = self._spans.get("decode")
        if decode is None:
            return ()
        if self._events:
            return tuple(float(decode.begin_event.elapsed_time(event)) for _, event in self._tokens)
        return tuple((ns - decode.begin_ns) * 1e-6 for ns, _ in self._tokens)

    def _check_deadline(self, where: str) -> None:
        if self.timeout_s is None or not self._total.begin_ns:
            return
        spent = (time.perf_counter_ns() - self._total.begin_ns) * 1e-9
        if spent > self.timeout_s:
            raise SampleTimeoutError(
                f"{spent:.1f} s at {where}, {self.timeout_s:g} s allowed. Raise timing.sample_timeout_s if it should go on."
            )

    def _start(self, name: str) -> None:
        span = self._spans[name] = _Span()
        self._open = name
        if self._meter is not None and name in self._watched:
            span.begin_mj = self._meter()
        span.begin_event = self._event()
        span.begin_ns = time.perf_counter_ns()

    def _event(self) -> Any:
        if not self._events:
            return None
        event = self._spare.pop() if self._spare else self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def _synchronize(self, *, always: bool = False) -> None:
        if self._cuda is not None and (self.sync or always):
            self._cuda.synchronize(self._index)
