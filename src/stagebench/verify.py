"""Proof that a model's decoupled stages compute what the model itself computes.

Each check compares the adapter's cut (encode, merge, then tokens from the embedded prompt) with the model's own path from pixels
to tokens, or watches which modules run when. One failed check makes every number of that model INVALID.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from stagebench import engines, machine
from stagebench.errors import SourceError, StagebenchError, VerifyError
from stagebench.files import whole_file
from stagebench.models.base import Adapter, Decoding, Features, Inputs, Tokens
from stagebench.models.hooks import EncoderCounter, VisionTimingHooks
from stagebench.models.ties import LOGIT_TOLERANCE, first_divergence, spread
from stagebench.stages import StageClock

if TYPE_CHECKING:
    from stagebench.plan import Plan, TimingJob

__all__ = ["Check", "VerifyReport", "read_report", "run_verify", "verify_model"]

log = logging.getLogger(__name__)

TOWER_TIME_SHARE = 0.35
TOWER_TIME_MS = 2.0
"""The tower's best time under hooks, decoupled against monolithic, may differ by this share + this many ms (host noise)."""

TIMED_RUNS = 5
HOOKS_SECONDS = 20.0

FIRST_LOOK, STEP, LOOKS = 20, 10, 3

HOOKS_SHARE = 0.01
HOOKS_MS = 0.1
"""What VisionTimingHooks may add to encode: 1 %, and what two readings of a clock differ by."""


@dataclass(frozen=True)
class Check:
    """One claim about a model and whether it held."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one model."""

    model: str
    checks: tuple[Check, ...]
    weights: str = ""
    dtype: str = ""
    device: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def write(self, path: Path) -> None:
        """JSON: {model, passed, weights, dtype, device, checks: [{name, passed, detail}]}."""
        body = {**asdict(self), "passed": self.passed}
        with whole_file(path, VerifyError) as temporary:
            temporary.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def raise_if_failed(self) -> None:
        """Raises VerifyError that names every failed check."""
        failed = [check for check in self.checks if not check.passed]
        if failed or not self.checks:
            lines = "\n".join(f"  {check.name}: {check.detail}" for check in failed) or "  no check ran"
            raise VerifyError(
                f"{self.model}: {len(failed)} of {len(self.checks)} checks of the decoupled stages failed:\n{lines}\n"
                "Its stage times describe another computation than the model's. Mend the adapter before timing it."
            )


def read_report(path: Path) -> VerifyReport:
    """What `VerifyReport.write` wrote."""
    body = json.loads(path.read_text(encoding="utf-8"))
    checks = tuple(Check(c["name"], bool(c["passed"]), c["detail"]) for c in body["checks"])
    return VerifyReport(body["model"], checks, body.get("weights", ""), body.get("dtype", ""), body.get("device", ""))


def verify_model(adapter: Adapter, frames: Sequence[np.ndarray], query: str, *, model: str | None = None, tokens: int = 16) -> VerifyReport:
    """Run every check on one sample.

    adapter: loaded. frames: uint8 RGB [H, W, 3]. tokens: length of the compared greedy decoding.
    A check that raises has failed; its detail is the error.
    """
    decoding = Decoding(max_new_tokens=tokens, min_new_tokens=tokens, eos_token_ids=adapter.eos_token_ids())
    with torch.inference_mode():
        subject = _Subject(adapter, frames, query, decoding)
        checks = [_run(name, check, subject) for name, check in _CHECKS.items()]
    for check in checks:
        log.log(logging.INFO if check.passed else logging.ERROR, "%s: %s: %s", model or adapter.name, check.name, check.detail)
    return VerifyReport(
        model=model or adapter.name,
        checks=tuple(checks),
        weights=adapter.revision(),
        dtype=str(adapter.spec.dtype).removeprefix("torch."),
        device=str(adapter.device),
    )


class _Subject:
    """One sample of one model, with what the checks share."""

    def __init__(self, adapter: Adapter, frames: Sequence[np.ndarray], query: str, decoding: Decoding) -> None:
        self.adapter, self.frames, self.query, self.decoding = adapter, list(frames), query, decoding
        self.inputs = self.on_device(self.frames)

    def on_device(self, frames: Sequence[np.ndarray]) -> Inputs:
        inputs = self.adapter.collate([self.adapter.preprocess(frames, self.query)])
        return inputs.to(self.adapter.device, self.adapter.spec.dtype)

    def decode(self, features: Features, clock: StageClock | None = None) -> Tokens:
        engine = engines.create("generate")
        engine.prepare(self.adapter, self.decoding, 1)
        clock = clock or StageClock(self.adapter.device)
        with clock.total():
            return engine.run(lambda: self.adapter.merge(self.inputs, features), self.decoding, clock)

    def decoupled(self) -> Tokens:
        return self.decode(self.adapter.encode(self.inputs))

    def same(self, a: Sequence[int], b: Sequence[int], what: str) -> tuple[bool, str]:
        """Equal greedy ids; below float32, also ids that part at a tie."""
        parting = first_divergence(self.adapter, self.adapter.merge(self.inputs, self.adapter.encode(self.inputs)), a, b)
        if parting is None:
            return True, f"{what}: {len(a)} greedy tokens are equal"
        return parting.tie and len(a) == len(b), f"{what}: {len(a)} and {len(b)} tokens; {parting}"


def _run(name: str, check: Any, subject: _Subject) -> Check:
    try:
        passed, detail = check(subject)
    except Exception as error:  # an adapter may fail in any way: the failure is the finding
        return Check(name, False, f"{type(error).__name__}: {error}")
    return Check(name, bool(passed), detail)


def _logits_equal(s: _Subject) -> tuple[bool, str]:
    prompt = s.adapter.merge(s.inputs, s.adapter.encode(s.inputs))
    model = s.adapter.language_model()
    output = model(
        inputs_embeds=prompt.embeds,
        attention_mask=prompt.attention_mask,
        position_ids=prompt.position_ids,
        **prompt.extra,
        use_cache=False,
        logits_to_keep=1,
    )
    ours = output.logits[:, -1].float()
    theirs = s.adapter.monolithic_logits(s.inputs).float()
    if ours.shape != theirs.shape:
        return False, f"decoupled logits have shape {tuple(ours.shape)}, monolithic {tuple(theirs.shape)}"
    deviation = spread(theirs, s.adapter.spec.dtype)
    difference = float((ours - theirs).abs().max())
    bound = LOGIT_TOLERANCE[s.adapter.spec.dtype] * deviation
    detail = f"largest difference {difference:.3g}, bound {bound:.3g} (standard deviation {deviation:.3g})"
    return difference <= bound and 0 < deviation < math.inf, detail


def _tokens_equal(s: _Subject) -> tuple[bool, str]:
    return s.same(s.decoupled().ids[0], s.adapter.monolithic(s.inputs, s.decoding).ids[0], "decoupled and monolithic")


def _one_encoder_call(s: _Subject) -> tuple[bool, str]:
    with EncoderCounter(s.adapter.vision_module()) as counter:
        counter.enter("encode")
        features = s.adapter.encode(s.inputs)
        counter.enter("after")
        s.decode(features)
    in_encode, after = counter.count("encode"), counter.outside_encode
    return in_encode == 1 and after == 0, f"{in_encode} in encode, {after} after it (expected 1 and 0)"


def _features_reused(s: _Subject) -> tuple[bool, str]:
    """From cached features: the same tokens twice, the features untouched, and no module of encode runs again (no second adaptor pass)."""
    with _ran(s.adapter) as encode_modules:
        features = s.adapter.encode(s.inputs)
    before = features.content_hash()
    with _ran(s.adapter) as later_modules:
        first = s.decode(features)
    again = sorted(encode_modules & later_modules)
    second = s.decode(features)
    if features.content_hash() != before:
        return False, "decoding changed the cached features"
    equal, detail = s.same(first.ids[0], second.ids[0], "two decodings of the same cached features")
    if not equal:
        return False, detail
    if again:
        return False, f"ran in encode and again after it: {', '.join(again[:4])}"
    if not encode_modules:
        return False, "no module was seen to run in encode, so nothing can be said of what runs after it"
    return True, f"{len(encode_modules)} modules ran in encode, none of them after it"


def _every_frame_counts(s: _Subject) -> tuple[bool, str]:
    """Another picture in place of any frame gives other features: no frame is left out."""
    whole = s.adapter.encode(s.inputs).content_hash()
    left_out = []
    used = range(1) if s.adapter.spec.frames_as == "first" else range(len(s.frames))
    for i in used:
        changed = list(s.frames)
        changed[i] = 255 - changed[i]
        if s.adapter.encode(s.on_device(changed)).content_hash() == whole:
            left_out.append(i)
    if left_out:
        return False, f"frames {left_out} of {len(s.frames)} do not change the features"
    return True, f"each of {len(used)} frames changes the features"


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a busy host a pass of many threads waits for the one that was put to sleep; a pass of one waits for none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def _hooks_agree(s: _Subject) -> tuple[bool, str]:
    """The tower's time under VisionTimingHooks: the same inside encode as inside the model's own generate, and no more than encode's.

    A busy host only ever adds time, so the least disturbed run of each is compared, and disagreeing minima are given more runs.
    """
    short = replace(s.decoding, max_new_tokens=2, min_new_tokens=2)
    inside, mono, encode = [], [], []
    hooks = VisionTimingHooks(s.adapter.vision_module())
    hooks.register_hooks()
    deadline = time.monotonic() + HOOKS_SECONDS
    try:
        while True:
            hooks.reset()
            clock = StageClock(s.adapter.device)
            with clock.total(), clock.stage("encode"):
                s.adapter.encode(s.inputs)
            inside.append(hooks.get_vision_time() * 1e3)
            encode.append(clock.times().host_ms["encode"])
            hooks.reset()
            s.adapter.monolithic(s.inputs, short)
            mono.append(hooks.get_vision_time() * 1e3)
            a, b, whole = min(inside), min(mono), encode[inside.index(min(inside))]
            allowed = TOWER_TIME_SHARE * max(a, b) + TOWER_TIME_MS
            agree = a > 0 and b > 0 and abs(a - b) <= allowed and a <= whole * 1.05 + 0.1
            if (agree and len(inside) >= TIMED_RUNS) or time.monotonic() > deadline:
                break
    finally:
        hooks.unregister_hooks()
    detail = f"tower {a:.2f} ms in encode, {b:.2f} ms in generate, encode {whole:.2f} ms; may differ by {allowed:.2f} ms"
    return agree, f"{detail}; best of {len(inside)} runs"


@_one_thread()
def _hooks_free(s: _Subject) -> tuple[bool, str]:
    """VisionTimingHooks on against off: the same features, and encode's time within 1 % (+ 0.1 ms, what a timer shows)."""
    hooks = VisionTimingHooks(s.adapter.vision_module())
    hashes: set[str] = set()

    def encode_ms(hooked: bool) -> float:
        if hooked:
            hooks.register_hooks()
        try:
            clock = StageClock(s.adapter.device)
            with clock.total(), clock.stage("encode"):
                features = s.adapter.encode(s.inputs)
        finally:
            hooks.unregister_hooks()
        hashes.add(features.content_hash())
        return clock.times().host_ms["encode"]

    cheap, detail = _costs_nothing(encode_ms, HOOKS_SECONDS)
    if len(hashes) > 1:
        return False, f"{len(hashes)} different features of one input, with and without hooks"
    return cheap, detail


def _costs_nothing(encode_ms: Callable[[bool], float], seconds: float, now: Callable[[], float] = time.monotonic) -> tuple[bool, str]:
    """Whether the bound holds at LOOKS looks in a row, STEP pairs apart, the first after FIRST_LOOK pairs; at the end of the time, at the
    last look. Looking until it holds once would let a cost through that noise hides now and then.

    encode_ms: one run, with hooks (True) or without. Compared are the means of the fastest quarters: a busy host only ever adds time, and
    a mean of several is steadier than the one fastest run.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    deadline, held = now() + seconds, 0
    while True:
        pairs = len(times[True]) + 1
        for hooked in (True, False) if pairs % 2 else (False, True):  # neither always finds the other's warm caches
            times[hooked].append(encode_ms(hooked))
        over = now() > deadline
        if not over and (pairs < FIRST_LOOK or (pairs - FIRST_LOOK) % STEP):
            continue
        on, off = (float(np.mean(sorted(times[hooked])[: max(1, pairs // 4)])) for hooked in (True, False))
        cheap = on - off <= HOOKS_SHARE * off + HOOKS_MS
        held = held + 1 if cheap else 0
        if over or held == LOOKS:
            return cheap, f"encode {on:.3f} ms with hooks, {off:.3f} ms without, features equal; fastest quarter of {pairs} runs"


def _instrumentation_free(s: _Subject) -> tuple[bool, str]:
    plain = s.decode(s.adapter.encode(s.inputs), StageClock(s.adapter.device, sync=False))
    return s.same(s.decoupled().ids[0], plain.ids[0], "with and without stage synchronisation")


_CHECKS = {
    "logits equal": _logits_equal,
    "greedy tokens equal": _tokens_equal,
    "one encoder call": _one_encoder_call,
    "features reused": _features_reused,
    "every frame counts": _every_frame_counts,
    "hooks agree": _hooks_agree,
    "hooks cost nothing": _hooks_free,
    "instrumentation changes nothing": _instrumentation_free,
}


@contextmanager
def _ran(adapter: Adapter) -> Iterator[set[str]]:
    """Names of the parameter-holding modules that run inside."""
    ran: set[str] = set()
    handles = [module.register_forward_pre_hook(lambda *_, name=name: ran.add(name)) for name, module in _watched(adapter)]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _watched(adapter: Adapter) -> list[tuple[str, nn.Module]]:
    """Modules with parameters of their own, embeddings left out: of the language model, of the vision module, and of whatever module the
    adapter holds itself, for a projector may lie in none of the two."""
    held = {name: value for name, value in vars(adapter).items() if isinstance(value, nn.Module)}
    found: dict[int, tuple[str, nn.Module]] = {}
    for root, whole in {"language model": adapter.language_model(), "vision module": adapter.vision_module(), **held}.items():
        for name, module in whole.named_modules():
            if any(True for _ in module.parameters(recurse=False)) and not isinstance(module, nn.Embedding):
                found.setdefault(id(module), (f"{root}: {name}", module))
    return list(found.values())


def run_verify(plan: Plan, job: TimingJob, output: Path, *, cache: Path, device: str | None = None) -> VerifyReport:
    """Verify a job's model on the first readable sample of its block and write the report, passed or not.

    device: cpu, cuda, cuda:<n>; null takes a free GPU, or the CPU. The GPU is leased as a timing job leases its own, so that neither
    disturbs the other.
    Raises VerifyError after writing when a check failed, StagebenchError when no sample can be read, TimingError when no GPU is free.
    """
    with machine.pick_device(device) as lease:
        if lease.device.startswith("cuda"):
            torch.cuda.set_device(lease.device)
        return _run_verify(plan, job, output, cache=cache, device=lease.device)


def _run_verify(plan: Plan, job: TimingJob, output: Path, *, cache: Path, device: str) -> VerifyReport:
    from stagebench.loading import open_loader
    from stagebench.session import load_adapter

    adapter = load_adapter(plan.config, job, device=device)
    loader = open_loader(plan, job, cache=cache)
    loader.open()
    try:
        for key in job.block.samples:
            sample = plan.sample(job.dataset, key)
            status, reason = loader.status(sample.clip)
            if status == "ok":
                try:
                    frames = [np.array(frame) for frame in loader.load(sample.clip)]
                except SourceError as error:  # a bad clip is extraction's to report; the proof takes the next
                    reason = str(error)
                else:
                    break
        else:
            raise StagebenchError(f"{job.dataset}/{job.block.name}: no sample can be read, the last one because: {reason}")
    finally:
        loader.close()
    report = verify_model(adapter, frames, sample.query, model=job.model)
    report.write(output)
    report.raise_if_failed()
    return report
