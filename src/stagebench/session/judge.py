"""What a whole job shows: rules that need all its rows, and what the machine was doing around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stagebench import machine
from stagebench.rows import Code
from stagebench.session import validity
from stagebench.session.core import Outcome
from stagebench.session.validity import Finding

__all__ = ["Surroundings", "judge", "mark", "measured_rows"]

LOAD_SHARE = 0.5
"""A load average above this share of the cores is a busy host."""
NEIGHBOUR_SHARE = 0.1
"""Other processes that took more than this share of the cores' time during the measurement were neighbours."""


@dataclass(frozen=True)
class Surroundings:
    """What was seen of the machine before, during and after the measurement."""

    device: str
    before: Mapping[str, float]
    """Anchor workloads, in ms."""
    after: Mapping[str, float]
    host: Mapping[str, Any]
    monitor: machine.Monitor
    busy: float
    """Share of all cores' time that other processes took meanwhile."""
    exclusive: bool
    """timing.exclusive: no other job of ours ran beside this one."""


def judge(outcome: Outcome, seen: Surroundings) -> list[Finding]:
    """What the job as a whole shows. Row codes of single samples are set here too, where they need the others.

    Rows from the journal were measured for this job and are judged with the rest; those taken over were judged in their own.
    """
    measured = measured_rows(outcome)
    found = list(validity.check_clocks(measured))
    for one in _by_process(measured):  # a process has a first sample, and a drift, of its own
        found += [*validity.check_first(one), *validity.check_drift(one)]
    found += [*validity.check_plain(measured), *validity.check_outputs(measured), *validity.check_harness(measured)]
    found += _of_the_machine(seen)
    if outcome.resumed:
        found.append(Finding(Code.RESUMED, f"{outcome.resumed} samples were measured by an earlier process"))
    if outcome.unmet:
        found.append(Finding(Code.WARN_NOISY, f"{len(outcome.unmet)} samples missed repeats.target_cv; the first: {outcome.unmet[0]}"))
    return found + validity.mark_accepted(outcome.rows)


def _of_the_machine(seen: Surroundings) -> list[Finding]:
    device, monitor, found = seen.device, seen.monitor, list[Finding]()
    drift = machine.anchor_drift(seen.before, seen.after)
    bound = machine.ANCHOR_BOUND["cuda" if device.startswith("cuda") else "cpu"]
    if drift > bound:
        found.append(Finding(Code.WARN_ANCHOR_DRIFT, f"anchor workloads moved by {drift:.1%} over the job, {bound:.0%} allowed"))
    unseen = monitor.unseen()
    if unseen:
        text = f"{device} does not show {', '.join(unseen)} (a container may hide them): rules on them saw nothing"
        found.append(Finding(Code.WARN_UNSEEN, text))
    pids = monitor.neighbours()
    if pids:
        found.append(Finding(Code.WARN_NEIGHBOURS, f"other processes on {device}: pids {', '.join(map(str, pids))}"))
    elif seen.busy > NEIGHBOUR_SHARE:
        found.append(Finding(Code.WARN_NEIGHBOURS, f"other processes took {seen.busy:.0%} of the cores while this job measured"))
    load, cores = seen.host.get("load_average"), torch.get_num_threads()
    if load is not None and load > LOAD_SHARE * max(cores, 1):
        found.append(Finding(Code.WARN_LOAD_AVERAGE, f"load average {load:.1f} when the job began, on {cores} threads"))
    if not seen.exclusive:
        found.append(Finding(Code.WARN_SIDE_BY_SIDE, "timing.exclusive is false: other jobs may have run beside this one"))
    return found


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


def mark(outcome: Outcome, findings: Sequence[Finding]) -> None:
    """Put what concerns every row measured in this job onto those rows."""
    whole = {finding.code.value for finding in findings if finding.code in _ON_ALL_ROWS}
    for row in measured_rows(outcome):
        row["codes"] = sorted({*row["codes"], *whole})


def measured_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Rows that this job measured, be it before it was killed; those taken over from other jobs left out."""
    return [row for row in outcome.rows if Code.REUSED.value not in row["codes"]]


def _by_process(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each process that worked on this job stamps its rows with its own start."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["job"], []).append(row)
    return list(found.values())
