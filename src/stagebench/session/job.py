"""One timing job: a model in one variant over one block of samples, from the plan to a Parquet file of rows."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stagebench import engines, machine
from stagebench.config import canonical
from stagebench.engines.base import EngineInfo
from stagebench.errors import TimingError
from stagebench.models.base import Adapter
from stagebench.session.admission import Admission
from stagebench.session.build import Limits
from stagebench.session.busy import DeviceBusy, device_busy
from stagebench.session.core import Outcome, Settings, time_samples
from stagebench.session.cost import JobCost
from stagebench.session.divergence import check_divergences
from stagebench.session.fidelity import PlainAnswer, plain_answers, quality
from stagebench.session.journal import Journal
from stagebench.session.judge import Surroundings, judge, mark, measured_rows
from stagebench.session.model import load_adapter, step_bytes, study_fingerprint, weights_bytes
from stagebench.session.null import harness_ms
from stagebench.session.order import Task
from stagebench.session.output import write_rows
from stagebench.session.reuse import earlier_rows
from stagebench.session.run import Subject
from stagebench.session.signals import Terminated, terminated
from stagebench.session.validity import Finding

if TYPE_CHECKING:
    from stagebench.plan import Plan, TimingJob

__all__ = ["JobReport", "run_job"]


@dataclass(frozen=True)
class JobReport:
    """What a job did."""

    output: Path
    rows: int
    statuses: Mapping[str, int]
    findings: tuple[Finding, ...]
    resumed: int
    reused: int
    seconds: float
    metadata: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def valid(self) -> bool:
        return not any(finding.code.invalid for finding in self.findings)


def run_job(
    plan: Plan,
    job: TimingJob,
    output: Path,
    *,
    cache: Path,
    device: str | None = None,
    threads: int | None = None,
    lock_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    log: logging.Logger | None = None,
    own_process: bool = False,
) -> JobReport:
    """Time every sample of the job's block and write `output`.

    cache: where the plan's shards lie. device: cpu, cuda, cuda:<n>; null takes a free GPU, or the CPU. threads: torch's CPU threads;
    null leaves torch's own number. progress: called with (samples done, of), watch with their
    rows before that. own_process: the process was started for this job and measures nothing afterwards. Its start then counts as the
    job's, and on a GPU the host-bound share is measured at the end: the profiler slows every launch that comes after it.

    A killed job goes on from `<output>.journal` when it is called again. Samples that fail are rows, and so is a job all of whose samples
    fail. Raises TimingError when no device is free, on SIGTERM, or when the disk is full; ModelError, StoreError as their modules do.
    """
    log = log or logging.getLogger("stagebench.session")
    cost = JobCost(own_process=own_process)
    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        lease = stack.enter_context(machine.pick_device(device, folder=lock_folder))
        if lease.device.startswith("cuda"):
            torch.cuda.set_device(lease.device)
        stack.enter_context(terminated())
        try:
            return _Job(plan, job, output, cache, lease, progress, watch, log, stack, cost, own_process=own_process).run()
        except Terminated:
            raise TimingError(
                f"{output}: SIGTERM. Finished samples are in {_journal_path(output).name}; run the job again and it goes on after them."
            ) from None


@dataclass(frozen=True)
class _Loaded:
    """What a job has before it measures."""

    host: Mapping[str, Any]
    monitor: machine.Monitor
    loader: Any
    verify_ms: float
    plain: tuple[PlainAnswer, ...]
    adapter: Adapter
    tasks: Sequence[Task]
    study: dict[str, Any]
    machine: dict[str, Any]
    journal: Journal


@dataclass(frozen=True)
class _Measured:
    """What came of the measurement."""

    subject: Subject
    outcome: Outcome
    seen: Surroundings
    limits: Limits
    harness_ms: Mapping[str, float]
    counter: machine.EnergyCounter | None
    quality: Mapping[str, Any] | None


class _Job:
    def __init__(
        self,
        plan: Plan,
        job: TimingJob,
        output: Path,
        cache: Path,
        lease: machine.Lease,
        progress: Callable[[int, int], None] | None,
        watch: Callable[[Sequence[Mapping[str, Any]]], None] | None,
        log: logging.Logger,
        stack: ExitStack,
        cost: JobCost,
        *,
        own_process: bool,
    ) -> None:
        self.plan, self.job, self.output, self.cache = plan, job, output, cache
        self.lease, self.progress, self.watch, self.log, self.stack = lease, progress, watch, log, stack
        self.device, self.own_process = lease.device, own_process
        self.config = plan.config
        self.settings = Settings.of(plan.config, job.variant.settings)
        self.cost = cost
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    def run(self) -> JobReport:
        loaded = self._load()
        measured = self._measure(loaded)
        findings = self._judge(loaded, measured)
        self.cost.mark("checks")
        worked = self._device_busy(measured.subject, loaded.tasks) if self.own_process and measured.outcome.fresh else None
        self.cost.mark("profile")
        mark(measured.outcome, findings)
        about = self._about(loaded, measured, findings) | {"device_busy": None if worked is None else asdict(worked)}
        return self._write(loaded, measured.outcome, findings, about)

    def _load(self) -> _Loaded:
        """Clips verified, the model in memory, and what earlier runs left."""
        from stagebench.loading import open_loader

        host = machine.host(self.device)
        monitor = machine.Monitor(self.device, self.lease.pids_before)
        loader = open_loader(self.plan, self.job, cache=self.cache)
        self.stack.callback(loader.close)
        verify_ms = loader.open()
        tasks = self._tasks(loader)
        self.cost.mark("open")
        plain = plain_answers(self.config, self.job, loader, tasks, self.device)
        self.cost.mark("plain model")
        adapter = load_adapter(self.config, self.job, device=self.device)
        self.cost.mark("model load")
        study = study_fingerprint(self.config, self.job, adapter.spec, adapter, self._reading())
        # as planned: the merge holds this against its own plan, so that no file of another config, code or weights gets in
        study["applied"] = dict(self.plan.timing_fingerprint(self.job))
        here = machine.fingerprint(self.device, torch.get_num_threads())
        journal = self.stack.enter_context(Journal(_journal_path(self.output), self._identity(study, here, tasks)))
        return _Loaded(host, monitor, loader, verify_ms, plain, adapter, tasks, study, here, journal)

    def _measure(self, on: _Loaded) -> _Measured:
        """All samples, between two looks at the machine."""
        reuse = {}
        if self.config.timing.reuse and self.settings.batch == 1:
            reuse = earlier_rows(
                self.output, on.tasks, self.settings.lengths, study=on.study, machine=on.machine, block=self.job.block.name
            )
        before = machine.anchor(self.device)
        harness = harness_ms(self.device)
        limits = Limits(step_bytes(on.adapter), machine.bandwidth(self.device))
        counter = machine.energy_counter(on.monitor.energy_mj)
        self.cost.mark("anchors")
        engine = engines.create(self.job.variant.settings["engine"])
        subject = Subject(on.adapter, engine, on.loader, self.device, meter=on.monitor.energy_mj)
        others = machine.CpuShare()
        outcome = time_samples(
            subject,
            on.tasks,
            self.settings,
            constant=self._constant(on.adapter) | {"harness_ms": harness["total"]},
            limits=limits,
            monitor=on.monitor,
            journal=on.journal,
            reuse=reuse,
            progress=self.progress,
            watch=self.watch,
            counter=counter,
        )
        runs = {"warm-up": outcome.prepare_s, "samples": outcome.samples_s, "failed runs": outcome.failed_s}
        self.cost.mark("between samples", runs)
        busy = others.others()
        after = machine.anchor(self.device)
        self.cost.mark("anchors")
        seen = Surroundings(self.device, before, after, on.host, on.monitor, busy, self.config.timing.exclusive)
        return _Measured(subject, outcome, seen, limits, harness, counter, quality(on.plain, on.adapter))

    def _judge(self, on: _Loaded, measured: _Measured) -> list[Finding]:
        rows = measured_rows(measured.outcome)
        findings = judge(measured.outcome, measured.seen)
        return findings + check_divergences(rows, on.tasks, on.adapter, on.loader, temperature=self.settings.temperature)

    def _about(self, on: _Loaded, measured: _Measured, findings: Sequence[Finding]) -> dict[str, Any]:
        """The file's metadata: what is said of the job as a whole."""
        outcome, seen = measured.outcome, measured.seen
        quantized = getattr(on.adapter, "quantized", None)
        return {
            "job": self.job.path,
            "id": self._id,
            "started": self.started,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": self.device,
            "host": on.host,
            "shards": list(self.job.block.shards),
            "block": self.job.block.name,
            "samples": len(on.tasks),
            "statuses": _count(outcome.rows),
            "codes": sorted({finding.code.value for finding in findings}),
            "findings": [{"code": finding.code.value, "text": finding.text} for finding in findings],
            "anchors": {"before": seen.before, "after": seen.after, "drift": machine.anchor_drift(seen.before, seen.after)},
            "energy_counter": None if measured.counter is None else asdict(measured.counter),
            "bandwidth_gb_s": measured.limits.bandwidth * 1e-9,
            "step_bytes": measured.limits.step_bytes,
            "harness_ms": measured.harness_ms,
            "verify_ms": on.verify_ms,
            "model_load_ms": self.cost.parts["model load"] * 1e3,
            "engine": None if outcome.engine is None else _told(outcome.engine, outcome.admission),
            "quality": measured.quality,
            "quantized": None if quantized is None else asdict(quantized),
            "first_call": outcome.first_call,
            "warmup": outcome.warmup,
            "resumed": outcome.resumed,
            "reused": outcome.reused,
            "unmet": outcome.unmet,
            "measuring_s": outcome.measuring_s,
            "cost": self.cost.summary(outcome.samples_s),
            "cpu_share_of_others": seen.busy,
            "threads": torch.get_num_threads(),
        }

    def _write(self, on: _Loaded, outcome: Outcome, findings: Sequence[Finding], about: Mapping[str, Any]) -> JobReport:
        write_rows(self.output, outcome.rows, {"job": dict(about), "study": on.study, "machine": on.machine})
        on.journal.remove()
        for finding in findings:
            self.log.log(logging.ERROR if finding.code.invalid else logging.WARNING, "%s: %s", finding.code.value, finding.text)
        share, seconds = about["cost"]["share"], about["cost"]["wall_s"]
        self.log.info("%s: %d rows, %s", self.output, len(outcome.rows), about["statuses"])
        self.log.info("%.1f %% of the job's %.1f s passed inside measured samples; seconds: %s", 100 * share, seconds, self.cost)
        statuses, n = about["statuses"], len(outcome.rows)
        return JobReport(self.output, n, statuses, tuple(findings), outcome.resumed, outcome.reused, seconds, about)

    def _device_busy(self, subject: Subject, tasks: Sequence[Task]) -> DeviceBusy | None:
        there = [task for task in tasks if task.skip is None]
        if not there:
            return None
        batch = [there[n % len(there)] for n in range(self.settings.batch)]
        return device_busy(subject, batch, self.settings.decoding(self.settings.lengths[0], (), batch[0].sample))

    def _tasks(self, loader: Any) -> list[Task]:
        tasks = []
        for key in self.job.block.samples:
            sample = self.plan.sample(self.job.dataset, key)
            status, reason = loader.status(sample.clip)
            tasks.append(
                Task(
                    sample=sample.key,
                    clip=sample.clip,
                    sequence=sample.sequence,
                    id=sample.id,
                    query=sample.query,
                    clip_digest=self._digest(sample.clip),
                    skip=None if status == "ok" else f"{status}: {reason}",
                )
            )
        return tasks

    def _digest(self, clip: str) -> str:
        from stagebench.plan import origin

        dataset = self.plan.datasets[self.job.dataset]
        settings = self.job.variant.settings
        return dataset.digest(clip, origin(dataset.clip(clip), settings["input"], settings["source"]))

    def _reading(self) -> Mapping[str, Any]:
        return self.plan.specs[self.job.block.spec_id]

    def _identity(self, study: Mapping[str, Any], here: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
        """What a journal's rows must agree in with this run. The clips' content too."""
        content = [(task.sample, task.clip_digest, task.skip) for task in tasks]
        return {"job": self.job.path, "study": _digest_of(study), "machine": here["digest"], "samples": _digest_of(content)}

    @property
    def _id(self) -> str:
        """Tells this start of the job from others of it."""
        return f"{self.job.block.name}@{self.started}"

    def _constant(self, adapter: Adapter) -> dict[str, Any]:
        settings, spec = self.job.variant.settings, adapter.spec
        return {
            "study": self.config.study,
            "dataset": self.job.dataset,
            "model": self.job.model,
            "variant": self.job.variant.name,
            "engine": settings["engine"],
            "quantization": settings["quantization"],
            "batch": settings["batch"],
            "frames": settings["frames"],
            "input": settings["input"],
            "source": settings["source"],
            "dtype": str(spec.dtype).removeprefix("torch."),
            "attention": settings["attention"],
            "keep_visual": settings.get("keep_visual", 1.0),
            "preprocess": settings.get("preprocess", "pil"),
            "preset": spec.preset,
            "weights": spec.weights,
            "block": self.job.block.name,
            "weights_bytes": weights_bytes(adapter),
            "job": self._id,
        }


def _told(engine: EngineInfo, admission: Admission) -> dict[str, Any]:
    return {"name": engine.name, "prepare_ms": engine.prepare_ms, "note": engine.note, "admission": asdict(admission)}


def _count(rows: list[dict[str, Any]]) -> dict[str, int]:
    statuses: dict[str, int] = {}
    for row in rows:
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    return dict(sorted(statuses.items()))


def _digest_of(value: Any) -> str:
    return hashlib.blake2b(canonical(value).encode(), digest_size=8).hexdigest()


def _journal_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.journal")
