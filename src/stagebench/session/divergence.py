"""Where a plain run says other tokens than the instrumented runs, below float32: whether rounding explains it, asked of the model.

The statistical rule (validity.check_outputs) needs many pairs before it can speak. A sample whose instrumented runs all agree, and whose
plain run does not, can be judged alone: its texts may part only where two tokens' logits were close.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stagebench.models.base import Adapter
from stagebench.models.ties import first_divergence
from stagebench.rows import Code
from stagebench.session.order import Task
from stagebench.session.run import FrameLoader, failure, recover
from stagebench.session.validity import Finding

__all__ = ["BEYOND", "check_divergences"]

log = logging.getLogger(__name__)

JUDGED = 8
"""Samples that are looked at: each costs an encode and a decode of the common text, eight of them where the first finds no tie."""

BEYOND = 2.5
"""Times the bound of a tie (models/ties.py) by which the two tokens' logits must be apart. Rounding adds up over the tokens before, and
the judging forward has its own. A healthy pair of a 7b model in bfloat16 on an H200 parted at 0.6 times it."""


def check_divergences(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[Task], adapter: Adapter, loader: FrameLoader, *, temperature: float
) -> list[Finding]:
    """INVALID_PLAIN_DIFFERS for the first sample whose plain run parts from its instrumented ones where rounding cannot have done it,
    and WARN_UNJUDGED where asking the model failed: all is measured by then, and must not be lost for it.

    Only greedy runs below float32 are judged: in float32 any difference is a fault already, and a drawn token needs no tie to differ.
    Samples that differ among their own instrumented runs are left to the statistical rule. Never inside a timed window.
    """
    if temperature > 0 or adapter.spec.dtype is torch.float32:
        return []
    by_key = {task.sample: task for task in tasks}
    failed: list[str] = []
    findings: list[Finding] = []
    for (sample, length), (ours, plain) in sorted(_parted(rows).items())[:JUDGED]:
        found, why = _tried(adapter, loader, by_key[sample], ours, plain)
        if why is not None:
            failed.append(f"{sample} at length {length} ({why})")
        elif found is not None and found.gap > BEYOND * found.bound:
            text = f"tokens of {sample} at length {length} differ without instrumentation, and rounding does not explain it: {found}"
            findings.append(Finding(Code.INVALID_PLAIN_DIFFERS, text))
            break
    if failed:
        text = f"tokens of {len(failed)} samples differ without instrumentation, and the model could not be asked whether rounding did it: "
        findings.append(Finding(Code.WARN_UNJUDGED, f"{text}{failed[0]}"))
    return findings


def _tried(adapter: Adapter, loader: FrameLoader, task: Task, ours: Sequence[int], plain: Sequence[int]) -> tuple[Any, str | None]:
    """(divergence, None), or (None, why there is none)."""
    try:
        return _first(adapter, loader, task, ours, plain), None
    except Exception as error:  # out of memory, a path of the adapter that nothing else takes, a lost device: no row depends on it
        log.warning("%s: its divergence cannot be judged: %s", task.sample, error, exc_info=log.isEnabledFor(logging.DEBUG))
        why, full = failure(error), isinstance(error, torch.OutOfMemoryError)
    if full:
        recover(str(adapter.device))
    return None, why


def _parted(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[list[int], list[int]]]:
    """(sample, length) -> the instrumented runs' ids, on which they agree, and a plain run's other ids."""
    runs: dict[tuple[str, str], tuple[list[list[int]], list[list[int]]]] = {}
    for row in rows:
        if row["token_ids"] is not None:
            found = runs.setdefault((row["sample"], row["length"]), ([], []))
            found[0].append(list(row["token_ids"]))
            if row["plain_token_ids"] is not None:
                found[1].append(list(row["plain_token_ids"]))
    parted = {}
    for key, (ours, plain) in runs.items():
        other = next((ids for ids in plain if ids != ours[0]), None)
        if other is not None and all(ids == ours[0] for ids in ours):
            parted[key] = (ours[0], other)
    return parted


@torch.inference_mode()
def _first(adapter: Adapter, loader: FrameLoader, task: Task, ours: Sequence[int], plain: Sequence[int]) -> Any:
    inputs = adapter.collate([adapter.preprocess(loader.load(task.clip), task.query)]).to(adapter.device, adapter.spec.dtype)
    return first_divergence(adapter, adapter.merge(inputs, adapter.encode(inputs)), ours, plain)
