"""How far a variant's answers are from the plain model's on the same samples: the quality that stands beside its speed.

A variant that changes the numbers (quantised weights, fewer visual tokens, other pixels) is held against the model without these settings,
on the job's first samples. The plain model answers greedily; then both score that answer, token by token, with the tokens given (teacher
forcing), since free-running texts part at the first near-tie. All of it lies outside the timed windows.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stagebench.config import Config
from stagebench.engines.quality import compare_logits
from stagebench.engines.scoring import forced_logits, greedy_answer
from stagebench.models.base import Adapter, Inputs, Prompt
from stagebench.session.model import load_adapter
from stagebench.session.order import Task
from stagebench.session.run import FrameLoader

if TYPE_CHECKING:
    from stagebench.plan import TimingJob

__all__ = ["CHANGING", "SAMPLES", "TOKENS", "PlainAnswer", "plain_answers", "quality"]

log = logging.getLogger(__name__)

SAMPLES = 4
"""Samples of a job that are compared."""
TOKENS = 32
"""Tokens of each answer."""

CHANGING: Mapping[str, Any] = {"quantization": "none", "keep_visual": 1.0, "preprocess": "pil"}
"""Settings that change the model's numbers, and their plain values."""


@dataclass(frozen=True)
class PlainAnswer:
    """What the plain model said of one sample."""

    frames: tuple[np.ndarray, ...]
    query: str
    pixels: Mapping[str, torch.Tensor]
    ids: tuple[int, ...]
    logits: torch.Tensor
    """[TOKENS, V] float32 on the host, each token's given those before it."""


def plain_answers(
    config: Config, job: TimingJob, loader: FrameLoader, tasks: Sequence[Task], device: str, samples: int = SAMPLES
) -> tuple[PlainAnswer, ...]:
    """Load the job's model without the settings that change its numbers, let it answer, and give its memory back.

    Empty for a job that has no such setting. Raises what loading the model and the samples raise.
    """
    settings = job.variant.settings
    if all(settings.get(name, plain) == plain for name, plain in CHANGING.items()):
        return ()
    without = {name: value for name, value in settings.items() if name not in ("keep_visual", "preprocess")}
    variant = replace(job.variant, settings={**without, "quantization": "none", "engine": "generate"})
    adapter = load_adapter(config, replace(job, variant=variant), device=device)
    answers = []
    for task in [task for task in tasks if task.skip is None][:samples]:
        frames = tuple(np.array(frame) for frame in loader.load(task.clip))  # the loader's buffer is used again
        answers.append(_answer(adapter, frames, task.query))
    del adapter
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return tuple(answers)


@torch.inference_mode()
def quality(answers: Sequence[PlainAnswer], adapter: Adapter) -> dict[str, Any] | None:
    """The variant against the plain model; None without answers to compare with.

    agreement: share of tokens whose argmax is the same. mean_kl, max_kl: KL(plain || variant) in nats. pixel_max_abs: largest difference of
    the pixels that the models were given (in normalised units), pixel_changed_share: share of pixels that differ by more than 1e-5.
    """
    if not answers:
        return None
    plain, variant, largest, changed, count = [], [], 0.0, 0, 0
    for answer in answers:
        inputs = adapter.collate([adapter.preprocess(answer.frames, answer.query)])
        for name, pixels in inputs.pixels.items():
            difference = (pixels.float().cpu() - answer.pixels[name].float().cpu()).abs()
            largest, changed, count = (
                max(largest, float(difference.max())),
                changed + int((difference > 1e-5).sum()),
                count + pixels.numel(),
            )
        plain.append(answer.logits)
        variant.append(forced_logits(adapter, _prompt(adapter, inputs), answer.ids).cpu())
    found = asdict(compare_logits(torch.cat(plain), torch.cat(variant)))
    found |= {"mean_kl": max(0.0, found["mean_kl"]), "max_kl": max(0.0, found["max_kl"])}  # rounding can leave a negative zero of them
    return {"samples": len(answers), **found, "pixel_max_abs": largest, "pixel_changed_share": changed / max(1, count)}


@torch.inference_mode()
def _answer(adapter: Adapter, frames: tuple[np.ndarray, ...], query: str) -> PlainAnswer:
    inputs = adapter.collate([adapter.preprocess(frames, query)])
    prompt = _prompt(adapter, inputs)
    ids = greedy_answer(adapter, prompt, TOKENS)
    return PlainAnswer(frames, query, dict(inputs.pixels), ids, forced_logits(adapter, prompt, ids).cpu())


def _prompt(adapter: Adapter, inputs: Inputs) -> Prompt:
    inputs = inputs.to(adapter.device, adapter.spec.dtype)
    return adapter.merge(inputs, adapter.encode(inputs))
