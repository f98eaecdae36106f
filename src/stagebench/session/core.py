"""The inner loop: samples of one model, in random order, warmed up, repeated, journaled. Shared by the rule and by `stagebench run`."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from stagebench.config import Config, RepeatsConfig
from stagebench.engines.base import EngineInfo
from stagebench.machine import ENERGY_PERIODS, EnergyCounter, Monitor
from stagebench.models.base import Decoding
from stagebench.rows import Code, Status
from stagebench.session.admission import Admission, admit_shapes
from stagebench.session.build import Limits, Measured, rows_of, skipped_rows
from stagebench.session.journal import Journal
from stagebench.session.order import Group, Task, groups, is_plain, sampling_seed
from stagebench.session.prefetch import SUFFIX, Ahead
from stagebench.session.repeats import go_on, unmet
from stagebench.session.run import DeviceLostError, Run, Subject, run_once

__all__ = ["Outcome", "Settings", "metered_stages", "time_samples"]

log = logging.getLogger(__name__)

NATURAL = "natural"

METER_SHARE = 0.001
"""What reading the energy counter inside a sample's total may cost of it: the harness's own bound."""

FATAL_TRIES = 2
"""A group whose run has lost the device this often becomes an error row: the fault is its own, not the device's."""


@dataclass(frozen=True)
class Settings:
    """How samples are measured."""

    lengths: tuple[str, ...] = (NATURAL,)
    """"natural", or a number as text: exactly that many tokens."""
    max_new_tokens: int = 512
    repeats: RepeatsConfig = field(default_factory=lambda: RepeatsConfig.model_validate({}))
    warmup: int = 2
    batch: int = 1
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    plain_share: float = 0.0
    sample_timeout_s: float | None = None
    prefetch: bool = False
    """Load and preprocess of the next run on a worker meanwhile; plain_share must be 0, for a plain run has no total of its own then."""

    @classmethod
    def of(cls, config: Config, variant: Mapping[str, Any]) -> Settings:
        """A study's timing section with a variant's settings."""
        timing = config.timing
        return cls(
            lengths=tuple(str(length) for length in timing.lengths),
            max_new_tokens=timing.max_new_tokens,
            repeats=timing.repeats,
            warmup=timing.warmup,
            batch=variant["batch"],
            seed=timing.seed,
            temperature=variant["temperature"],
            top_p=variant["top_p"],
            plain_share=timing.plain_share,
            sample_timeout_s=timing.sample_timeout_s,
            prefetch=timing.prefetch,
        )

    def decoding(self, length: str, eos: Sequence[int], sample: str = "") -> Decoding:
        """Stop rule of one length mode; the seed is the sample's own."""
        fixed = None if length == NATURAL else int(length)
        return Decoding(
            max_new_tokens=fixed or self.max_new_tokens,
            min_new_tokens=fixed or 0,
            eos_token_ids=tuple(eos),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=sampling_seed(self.seed, sample),
        )


@dataclass
class Outcome:
    """What the inner loop gives: rows in the order measured, and what is reported apart from them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    fresh: list[dict[str, Any]] = field(default_factory=list)
    """Those of `rows` that this process measured."""
    engine: EngineInfo | None = None
    admission: Admission = field(default_factory=Admission)
    """What the engine captured and compiled before the first window."""
    first_call: dict[str, Any] | None = None
    warmup: list[dict[str, Any]] = field(default_factory=list)
    resumed: int = 0
    reused: int = 0
    """Samples whose rows an earlier process, or another job, measured."""
    unmet: list[str] = field(default_factory=list)
    """Why the noise target was missed, by sample and length."""
    prepare_s: float = 0.0
    """Engine preparation, first call and warm-up."""
    measuring_s: float = 0.0
    samples_s: float = 0.0
    """Of that, what passed inside timed runs, plain ones too: the rest is readings, synchronisation and the journal."""
    failed_s: float = 0.0
    """And what passed in runs that failed, which have no times."""


def time_samples(
    subject: Subject,
    tasks: Sequence[Task],
    settings: Settings,
    *,
    constant: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    monitor: Monitor | None = None,
    journal: Journal | None = None,
    reuse: Mapping[str, list[dict[str, Any]]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    counter: EnergyCounter | None = None,
) -> Outcome:
    """Measure every task in every length mode.

    constant: row columns that are the same for all. limits: for the limit columns. journal: finished groups are taken from it and
    added to it. reuse: rows by sample key that stand for a sample's measurement (batch 1 only). progress: called with (samples done, of).
    watch: called with the rows of each group before that; both run between samples and must be quick.
    counter: how finely the device counts energy; with it, and a meter in `subject`, long stages get an energy of their own (in fixed
    lengths).

    Raises DeviceLostError when the device fails for good, TimingError when the journal cannot be written.
    """
    outcome = Outcome()
    columns = dict(constant or {})
    if settings.prefetch:
        columns["source"] = f"{columns.get('source') or ''}{SUFFIX}"
    loop = _Loop(subject, settings, columns, limits, monitor or Monitor("cpu"), outcome, counter)
    done = 0
    for task in tasks:
        if task.skip is not None:
            outcome.rows += skipped_rows(task, settings.lengths, loop.constant)
            done += 1
    order = groups(tasks, seed=settings.seed, batch=settings.batch)
    ready: dict[int, list[dict[str, Any]]] = {}
    for group in order:
        if journal is not None and group.key in journal.groups:
            ready[group.order] = [dict(row) for row in journal.groups[group.key]]
            outcome.resumed += len(group.tasks)
        elif reuse and settings.batch == 1 and group.tasks[0].sample in reuse:
            ready[group.order] = [dict(row, order=group.order) for row in reuse[group.tasks[0].sample]]
            outcome.reused += 1
    due = [group for group in order if group.order not in ready]
    loop.next_of = {first.order: second for first, second in pairwise(due)}
    with ExitStack() as stack:
        if settings.prefetch:
            loop.subject = replace(subject, ahead=stack.enter_context(Ahead(subject)))
        if due:
            begin = time.monotonic()
            loop.prepare(due, journal)
            outcome.prepare_s = time.monotonic() - begin
        stack.enter_context(_quiet_collector())
        loop.monitor.look_around()
        for group in order:
            if group.order in ready:
                rows = ready[group.order]
                outcome.rows += rows
            else:
                rows = loop.measure(group, journal)
                if journal is not None:
                    journal.append(group.key, rows)
                outcome.rows += rows
                outcome.fresh += rows
                gc.collect()
                loop.monitor.look_around()
            done += len(group.tasks)
            if watch is not None:
                watch(rows)
            if progress is not None:
                progress(done, len(tasks))
    return outcome


class _Loop:
    """Warm-up and measurement of groups, with what they share."""

    def __init__(
        self,
        subject: Subject,
        settings: Settings,
        constant: dict[str, Any],
        limits: Limits | None,
        monitor: Monitor,
        outcome: Outcome,
        counter: EnergyCounter | None,
    ) -> None:
        self.subject, self.settings, self.constant, self.limits = subject, settings, constant, limits
        self.monitor, self.outcome, self.counter = monitor, outcome, counter
        self.metered: dict[str, frozenset[str]] = {}
        """By fixed length: the stages at whose borders the energy counter is read."""
        self.eos = tuple(subject.adapter.eos_token_ids())
        self.next_of: Mapping[int, Group] = {}
        """The group measured after the one of that order."""

    def prepare(self, due: Sequence[Group], journal: Journal | None) -> None:
        """Engine preparation, the first call, and the warm-up; none of it enters the rows."""
        fatal = {} if journal is None else journal.fatal
        due = sorted((g for g in due if fatal.get(g.key, 0) < FATAL_TRIES), key=lambda g: (fatal.get(g.key, 0), g.order))
        settings = self.settings
        longest = max((settings.decoding(length, self.eos) for length in settings.lengths), key=lambda d: d.max_new_tokens)
        self.outcome.engine = self.subject.engine.prepare(self.subject.adapter, longest, settings.batch)
        decodings = [settings.decoding(length, self.eos) for length in settings.lengths]
        self.outcome.admission = admit_shapes(self.subject, due, decodings, lambda group: _noted(group, journal))
        for number in range(1 + settings.warmup if due else 0):
            group = due[number % len(due)]
            length = settings.lengths[number % len(settings.lengths)]
            with _noted(group, journal):
                run = self._run(group, length)
            record = {"sample": group.tasks[0].sample, "length": length, "status": run.status.value, "reason": run.reason} | _brief(run)
            if number == 0:
                self.outcome.first_call = record
            else:
                self.outcome.warmup.append(record)
        if self.counter is not None and self.outcome.first_call is not None:
            for length in settings.lengths:
                if length == NATURAL:
                    continue  # an answer far shorter than the warm-up's would be disturbed by readings that warm-up could afford
                seen = [record for record in self.outcome.warmup if record["length"] == length and "stages_ms" in record]
                self.metered[length] = metered_stages(seen, self.counter)

    def measure(self, group: Group, journal: Journal | None) -> list[dict[str, Any]]:
        if journal is not None and journal.fatal.get(group.key, 0) >= FATAL_TRIES:
            lost = Run(Status.ERROR, f"its run lost the device {journal.fatal[group.key]} times")
            return [row for length in self.settings.lengths for row in self._rows(Measured(group, length, 0, lost, None, *self._idle()))]
        with _noted(group, journal):
            return [row for length in self.settings.lengths for row in self._length(group, length)]

    def _length(self, group: Group, length: str) -> list[dict[str, Any]]:
        """All repeats of one group in one length mode."""
        repeats = self.settings.repeats
        paired = is_plain(group.order, self.settings.plain_share)
        rows: list[dict[str, Any]] = []
        totals: list[float] = []
        begin = time.monotonic()
        repeat = 0
        while go_on(totals, time.monotonic() - begin, repeats):
            plain_first = paired and repeat % 2 == 1  # either one goes first in turn, so that neither always finds warm caches
            plain = self._counted(group, length, plain=True) if plain_first else None
            following, metered = self._following(group, length, repeat), self.metered.get(length, ())
            run = self._counted(group, length, following=following, metered=metered, sensors=self.monitor)
            before, after = run.borders or self._idle()
            if paired and not plain_first and run.status is Status.OK:
                plain = self._counted(group, length, plain=True)
            if plain is not None and plain.captures:
                plain = None
            rows += self._rows(Measured(group, length, repeat, run, plain, before, after, self.counter))
            if run.status is not Status.OK or run.times is None:
                break  # what failed once is a row; running it again would cost a timeout or an OOM each time
            if not (run.captures and repeat == 0):  # that row is kept out of means, so it is no repeat either
                totals.append(run.times.total_ms)
            repeat += 1
        spent = time.monotonic() - begin
        self.outcome.measuring_s += spent
        noisy = unmet(totals, spent, repeats)
        if noisy is not None:
            self.outcome.unmet.append(f"{group.tasks[0].sample} {length}: {noisy}")
            for row in rows:
                row["codes"] = [*row["codes"], Code.WARN_NOISY.value]
        return rows

    def _counted(self, group: Group, length: str, **how: Any) -> Run:
        """A run whose seconds count as those of samples, or of failures."""
        begin = time.monotonic()
        run = self._run(group, length, **how)
        if run.times is None:
            self.outcome.failed_s += time.monotonic() - begin
        else:
            self.outcome.samples_s += run.times.total_ms * 1e-3
        return run

    def _run(
        self,
        group: Group,
        length: str,
        *,
        plain: bool = False,
        following: Sequence[Task] = (),
        metered: Collection[str] = (),
        sensors: Monitor | None = None,
    ) -> Run:
        decoding, timeout_s = self.settings.decoding(length, self.eos, group.tasks[0].sample), self.settings.sample_timeout_s
        return run_once(
            self.subject, group.all, decoding, plain=plain, timeout_s=timeout_s, following=following, metered=metered, sensors=sensors
        )

    def _following(self, group: Group, length: str, repeat: int) -> Sequence[Task]:
        """What the run after this one reads, as far as that can be told: noise may ask for more repeats."""
        if not self.settings.prefetch:
            return ()
        if repeat + 1 < self.settings.repeats.min or length != self.settings.lengths[-1]:
            return group.all
        return self.next_of[group.order].all if group.order in self.next_of else ()

    def _rows(self, measured: Measured) -> list[dict[str, Any]]:
        decoding = self.settings.decoding(measured.length, self.eos)
        tokens = measured.run.tokens
        texts = [None] * len(measured.group.all) if tokens is None else [self._text(ids) for ids in tokens.ids]
        return rows_of(measured, decoding, texts, self.constant, limits=self.limits)

    def _text(self, ids: Sequence[int]) -> str | None:
        try:
            return self.subject.adapter.detokenize([i for i in ids if i not in self.eos])
        except Exception as error:  # random weights can give ids that the tokenizer has no word for; the ids are in the row
            log.debug("ids cannot be turned into text: %s", error)
            return None

    def _idle(self) -> tuple[Any, Any]:
        reading = self.monitor.read()
        return reading, reading


def metered_stages(warmup: Sequence[Mapping[str, Any]], counter: EnergyCounter) -> frozenset[str]:
    """Stages that warm-up runs show to be far longer than the energy counter's period; none where reading it would cost 0.1 % of the total.

    warmup: records with `stages_ms` and `total_ms`, of one length mode.
    """
    if not warmup:
        return frozenset()
    shortest = ENERGY_PERIODS * counter.period_ms
    long = frozenset(s for s in warmup[0]["stages_ms"] if min(record["stages_ms"].get(s, 0.0) for record in warmup) >= shortest)
    reading = 2 * len(long) * counter.read_ms
    return long if reading <= METER_SHARE * min(record["total_ms"] for record in warmup) else frozenset()


def _brief(run: Run) -> dict[str, Any]:
    if run.times is None:
        return {}
    return {"total_ms": run.times.total_ms, "stages_ms": dict(run.times.host_ms), "peak_bytes": dict(run.times.peak_bytes)}


@contextmanager
def _noted(group: Group, journal: Journal | None) -> Iterator[None]:
    """The journal is told when a group's run loses the device."""
    try:
        yield
    except DeviceLostError:
        if journal is not None:
            journal.note_fatal(group.key)
        raise


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """No garbage collection inside timed windows: it is done between samples, over what the samples made."""
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
