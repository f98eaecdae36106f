"""One timing job: a model in one variant over one block of samples, from the plan to a Parquet file of rows."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from stagebench import engines, machine
from stagebench.config import canonical
from stagebench.errors import TimingError
from stagebench.rows import Code
from stagebench.session import validity
from stagebench.session.build import Limits
from stagebench.session.busy import DeviceBusy, device_busy
from stagebench.session.core import Outcome, Settings, time_samples
from stagebench.session.cost import JobCost
from stagebench.session.divergence import check_divergences
from stagebench.session.fidelity import plain_answers, quality
from stagebench.session.journal import Journal
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

LOAD_SHARE = 0.5
"""A load average above this share of the cores is a busy host."""
NEIGHBOUR_SHARE = 0.1
"""Other processes that took more than this share of the cores' time during the measurement were neighbours."""


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
    profile: bool = False,
) -> JobReport:
    """Time every sample of the job's block and write `output`.

    cache: where the plan's shards lie. device: cpu, cuda, cuda:<n>; null takes a free GPU, or the CPU. threads: torch's CPU threads;
    null leaves torch's own number. progress: called with (samples done, of), watch with their
    rows before that. profile: measure the host-bound share at the end, on a GPU;
    only for a process that measures nothing afterwards, for the profiler slows every launch that comes after it.

    A killed job goes on from `<output>.journal` when it is called again. Samples that fail are rows, and so is a job all of whose samples
    fail. Raises TimingError when no device is free, on SIGTERM, or when the disk is full; ModelError, StoreError as their modules do.
    """
    log = log or logging.getLogger("stagebench.session")
    cost = JobCost()
    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        lease = stack.enter_context(machine.pick_device(device, folder=lock_folder))
        if lease.device.startswith("cuda"):
            torch.cuda.set_device(lease.device)
        stack.enter_context(terminated())
        try:
            return _Job(plan, job, output, cache, lease, progress, watch, log, stack, cost, profile=profile).run()
        except Terminated:
            raise TimingError(
                f"{output}: SIGTERM. Finished samples are in {_journal_path(output).name}; run the job again and it goes on after them."
            ) from None


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
        profile: bool,
    ) -> None:
        self.plan, self.job, self.output, self.cache = plan, job, output, cache
        self.lease, self.progress, self.watch, self.log, self.stack = lease, progress, watch, log, stack
        self.device, self.profile = lease.device, profile
        self.config = plan.config
        self.settings = Settings.of(plan.config, job.variant.settings)
        self.cost = cost
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    def run(self) -> JobReport:
        from stagebench.loading import open_loader

        host = machine.host(self.device)
        monitor = machine.Monitor(self.device, self.lease.pids_before)
        loader = open_loader(self.plan, self.job, cache=self.cache)
        self.stack.callback(loader.close)
        verify_ms = loader.open()
        self.cost.mark("open")
        plain = plain_answers(self.config, self.job, loader, self._tasks(loader), self.device)
        self.cost.mark("plain model")
        adapter = load_adapter(self.config, self.job, device=self.device)
        self.cost.mark("model load")
        model_load_ms = self.cost.parts["model load"] * 1e3
        spec = adapter.spec
        study = study_fingerprint(self.config, self.job, spec, adapter, self._reading())
        # as planned: the merge holds this against its own plan, so that no file of another config, code or weights gets in
        study["applied"] = dict(self.plan.timing_fingerprint(self.job))
        here = machine.fingerprint(self.device, torch.get_num_threads())
        tasks = self._tasks(loader)
        journal = self.stack.enter_context(Journal(_journal_path(self.output), self._identity(study, here, tasks)))
        reuse = {}
        if self.config.timing.reuse and self.settings.batch == 1:
            reuse = earlier_rows(self.output, tasks, self.settings.lengths, study=study, machine=here, block=self.job.block.name)

        before = machine.anchor(self.device)
        harness = harness_ms(self.device)
        limits = Limits(step_bytes(adapter), machine.bandwidth(self.device))
        constant = self._constant(adapter, spec) | {"harness_ms": harness["total"]}
        counter = machine.energy_counter(monitor.energy_mj)
        self.cost.mark("anchors")
        subject = Subject(adapter, engines.create(self.job.variant.settings["engine"]), loader, self.device, meter=monitor.energy_mj)
        others = machine.CpuShare()
        outcome = time_samples(
            subject,
            tasks,
            self.settings,
            constant=constant,
            limits=limits,
            monitor=monitor,
            journal=journal,
            reuse=reuse,
            progress=self.progress,
            watch=self.watch,
            counter=counter,
        )
        self.cost.mark("between samples", {"warm-up": outcome.prepare_s, "samples": outcome.samples_s})
        busy = others.others()
        after = machine.anchor(self.device)
        self.cost.mark("anchors")
        found = quality(plain, adapter)
        findings = self._judge(outcome, before, after, host, monitor, busy)
        findings += check_divergences(_measured(outcome), tasks, adapter, loader, temperature=self.settings.temperature)
        self.cost.mark("checks")
        worked = self._device_busy(subject, tasks) if self.profile and outcome.fresh else None
        self.cost.mark("profile")
        spent = self.cost.summary(outcome.samples_s)
        _mark(outcome, findings)
        statuses = _count(outcome.rows)
        about = {
            "job": self.job.path,
            "id": constant["job"],
            "started": self.started,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": self.device,
            "host": host,
            "shards": list(self.job.block.shards),
            "block": self.job.block.name,
            "samples": len(tasks),
            "statuses": statuses,
            "codes": sorted({finding.code.value for finding in findings}),
            "findings": [{"code": finding.code.value, "text": finding.text} for finding in findings],
            "anchors": {"before": before, "after": after, "drift": machine.anchor_drift(before, after)},
            "energy_counter": None if counter is None else asdict(counter),
            "device_busy": None if worked is None else asdict(worked),
            "bandwidth_gb_s": limits.bandwidth * 1e-9,
            "step_bytes": limits.step_bytes,
            "harness_ms": harness,
            "verify_ms": verify_ms,
            "model_load_ms": model_load_ms,
            "engine": None
            if outcome.engine is None
            else {
                "name": outcome.engine.name,
                "prepare_ms": outcome.engine.prepare_ms,
                "note": outcome.engine.note,
                "admission": asdict(outcome.admission),
            },
            "quality": found,
            "quantized": None if getattr(adapter, "quantized", None) is None else asdict(cast(Any, adapter).quantized),
            "first_call": outcome.first_call,
            "warmup": outcome.warmup,
            "resumed": outcome.resumed,
            "reused": outcome.reused,
            "unmet": outcome.unmet,
            "measuring_s": outcome.measuring_s,
            "cost": spent,
            "cpu_share_of_others": busy,
            "threads": torch.get_num_threads(),
        }
        write_rows(self.output, outcome.rows, {"job": about, "study": study, "machine": here})
        journal.remove()
        for finding in findings:
            self.log.log(logging.ERROR if finding.code.invalid else logging.WARNING, "%s: %s", finding.code.value, finding.text)
        seconds = spent["wall_s"]
        self.log.info("%s: %d rows, %s", self.output, len(outcome.rows), statuses)
        self.log.info("%.1f %% of the job's %.1f s passed inside measured samples; seconds: %s", 100 * spent["share"], seconds, self.cost)
        return JobReport(self.output, len(outcome.rows), statuses, tuple(findings), outcome.resumed, outcome.reused, seconds, about)

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

    def _identity(self, study: Mapping[str, Any], here: Mapping[str, Any], tasks: list[Task]) -> dict[str, Any]:
        """What a journal's rows must agree in with this run. The clips' content too."""
        content = [(task.sample, task.clip_digest, task.skip) for task in tasks]
        return {"job": self.job.path, "study": _digest_of(study), "machine": here["digest"], "samples": _digest_of(content)}

    def _constant(self, adapter: Any, spec: Any) -> dict[str, Any]:
        settings = self.job.variant.settings
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
            "job": f"{self.job.block.name}@{self.started}",
        }

    def _judge(
        self,
        outcome: Outcome,
        before: Mapping[str, float],
        after: Mapping[str, float],
        host: Mapping[str, Any],
        monitor: machine.Monitor,
        busy: float,
    ) -> list[Finding]:
        """What the job as a whole shows. Row codes of single samples are set here too, where they need the others.

        Rows from the journal were measured for this job and are judged with the rest; those taken over were judged in their own.
        """
        measured = _measured(outcome)
        found = list(validity.check_clocks(measured))
        for one in _by_process(measured):  # a process has a first sample, and a drift, of its own
            found += [*validity.check_first(one), *validity.check_drift(one)]
        found += [*validity.check_plain(measured), *validity.check_outputs(measured), *validity.check_harness(measured)]
        drift = machine.anchor_drift(before, after)
        bound = machine.ANCHOR_BOUND["cuda" if self.device.startswith("cuda") else "cpu"]
        if drift > bound:
            found.append(Finding(Code.WARN_ANCHOR_DRIFT, f"anchor workloads moved by {drift:.1%} over the job, {bound:.0%} allowed"))
        unseen = monitor.unseen()
        if unseen:
            text = f"{self.device} does not show {', '.join(unseen)} (a container may hide them): rules on them saw nothing"
            found.append(Finding(Code.WARN_UNSEEN, text))
        pids = monitor.neighbours()
        if pids:
            found.append(Finding(Code.WARN_NEIGHBOURS, f"other processes on {self.device}: pids {', '.join(map(str, pids))}"))
        elif busy > NEIGHBOUR_SHARE:
            found.append(Finding(Code.WARN_NEIGHBOURS, f"other processes took {busy:.0%} of the cores while this job measured"))
        load, cores = host.get("load_average"), torch.get_num_threads()
        if load is not None and load > LOAD_SHARE * max(cores, 1):
            found.append(Finding(Code.WARN_LOAD_AVERAGE, f"load average {load:.1f} when the job began, on {cores} threads"))
        if not self.config.timing.exclusive:
            found.append(Finding(Code.WARN_SIDE_BY_SIDE, "timing.exclusive is false: other jobs may have run beside this one"))
        if outcome.resumed:
            found.append(Finding(Code.RESUMED, f"{outcome.resumed} samples were measured by an earlier process"))
        if outcome.unmet:
            found.append(Finding(Code.WARN_NOISY, f"{len(outcome.unmet)} samples missed repeats.target_cv; the first: {outcome.unmet[0]}"))
        return found + validity.mark_accepted(outcome.rows)


_ON_ALL_ROWS = {
    Code.WARN_ANCHOR_DRIFT,
    Code.WARN_NEIGHBOURS,
    Code.WARN_LOAD_AVERAGE,
    Code.WARN_SIDE_BY_SIDE,
    Code.WARN_DRIFT,
    Code.INVALID_PLAIN_DIFFERS,
    Code.RESUMED,
}
"""Findings about the job that every row measured in it carries. Rows taken over carry those of their own job."""


def _mark(outcome: Outcome, findings: list[Finding]) -> None:
    whole = {finding.code.value for finding in findings if finding.code in _ON_ALL_ROWS}
    for row in _measured(outcome):
        row["codes"] = sorted({*row["codes"], *whole})


def _measured(outcome: Outcome) -> list[dict[str, Any]]:
    """Rows that this job measured, be it before it was killed; those taken over from other jobs left out."""
    return [row for row in outcome.rows if Code.REUSED.value not in row["codes"]]


def _by_process(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each process that worked on this job stamps its rows with its own start."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["job"], []).append(row)
    return list(found.values())


def _count(rows: list[dict[str, Any]]) -> dict[str, int]:
    statuses: dict[str, int] = {}
    for row in rows:
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    return dict(sorted(statuses.items()))


def _digest_of(value: Any) -> str:
    return hashlib.blake2b(canonical(value).encode(), digest_size=8).hexdigest()


def _journal_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.journal")
