"""What engines `graph` and `fused` share: sessions of captured prefill and step, one per (batch, capacity, sampling)."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stagebench.engines._graphs import NotCapturable, Replay, capture, capture_split, prompt_mask_as_eager
from stagebench.engines._loop import DoneFlag, collect, decode
from stagebench.engines._state import EOS_SLOTS, SlotCache, StepState, choose
from stagebench.engines.base import EngineInfo
from stagebench.engines.encoder import GraphedCall, graph_encoder
from stagebench.engines.generate import GenerateEngine
from stagebench.errors import ModelError
from stagebench.models.base import Adapter, Decoding, Prompt, Tokens
from stagebench.stages import StageClock

__all__ = ["CAPACITY_STEP", "Session", "SteppedEngine", "Unsupported", "decoder_of"]

log = logging.getLogger(__name__)

CAPACITY_STEP = 256
"""Cache capacities are multiples of this, so that prompts of similar lengths share one captured step."""

_PREFILLS = 128
"""Captured prompt lengths that a session keeps: they share one memory pool, so each costs its input and a few MB of graph."""
_SESSIONS = 4
_HARMLESS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Prompt extras that only `generate` needs: a step is driven by explicit positions. `*_grid_thw` likewise."""


class Unsupported(Exception):
    """Why this engine cannot drive this model; becomes EngineInfo.note and a fallback, never an error to the user."""


def decoder_of(model: nn.Module) -> Any:
    """The text decoder inside a causal or multimodal model: the module with `embed_tokens` and a list `layers`.

    Raises Unsupported when there is none, or more than one.
    """
    found = [
        m
        for m in model.modules()
        if isinstance(getattr(m, "layers", None), nn.ModuleList) and isinstance(getattr(m, "embed_tokens", None), nn.Module)
    ]
    if len(found) != 1:
        raise Unsupported(f"{type(model).__name__} has {len(found)} text decoders (modules with embed_tokens and layers), expected one")
    return found[0]


class Session:
    """Buffers and captured work for one (batch, capacity, sampling). Engine `graph`; `fused` replaces the step."""

    def __init__(self, model: nn.Module, decoder: Any, batch: int, capacity: int, planes: int, decoding: Decoding) -> None:
        config = decoder.config
        heads = int(config.num_attention_heads)
        self.model = model
        self.decoder = decoder
        self.decoding = decoding
        weight = decoder.embed_tokens.weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self.state = StepState.build(
            layers=int(config.num_hidden_layers),
            batch=batch,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            capacity=capacity,
            planes=planes,
            dtype=self.dtype,
            device=self.device,
        )
        self.additive = config._attn_implementation == "eager"
        self.cache = SlotCache(self.state)
        self.flag = DoneFlag(self.state)
        self.pool: Any = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.prefills: OrderedDict[tuple[int, bool], Callable[[Prompt], None]] = OrderedDict()
        self.parts: list[Replay] = []
        self.logits: torch.Tensor | None = None

    def mask(self, allowed: torch.Tensor) -> torch.Tensor:
        """A 4-D bool mask in the form that the model's attention takes."""
        if not self.additive:
            return allowed
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, torch.finfo(self.dtype).min)

    def forward(self, **inputs: Any) -> torch.Tensor:
        """Logits [B, V] of the last position."""
        output = self.model(past_key_values=self.cache, use_cache=True, logits_to_keep=1, return_dict=True, **inputs)
        return output.logits[:, -1]

    def choose(self, logits: torch.Tensor) -> None:
        choose(self.state, logits, self.decoding)
        self.flag.publish()

    def build_step(self) -> list[Replay]:
        """One token: the HF model's own forward on the static cache, then the choice."""

        def step() -> None:
            state = self.state
            state.visible.index_fill_(3, state.slot[:1], True)
            positions = state.positions[:, :, None]
            self.cache.prefill = False
            self.choose(
                self.forward(
                    input_ids=state.token[:, None],
                    attention_mask=self.mask(state.visible),
                    position_ids=positions[0] if len(positions) == 1 else positions,
                )
            )

        layers = self.decoder.layers
        at = layers[max(1, len(layers) // 8)] if len(layers) > 1 else None  # an eighth of a step hides the host's reaction time
        return capture_split(step, at, self.device, self.pool)

    def build_prefill(self, prompt: Prompt, padded: bool) -> Callable[[Prompt], None]:
        """Prefill of this exact length, through the HF model's forward, and the first choice."""
        embeds = torch.empty_like(prompt.embeds, dtype=self.dtype)
        positions = torch.empty_like(prompt.position_ids)
        visible = torch.empty_like(prompt.attention_mask, dtype=torch.bool)
        # (eager attention would make its own mask by a copy from the host, which a capture refuses)
        masked = padded or self.additive
        causal = torch.ones(prompt.length, prompt.length, dtype=torch.bool, device=self.device).tril_() if masked else None

        def fill(given: Prompt) -> None:
            embeds.copy_(given.embeds)
            positions.copy_(given.position_ids)
            visible.copy_(given.attention_mask)

        def prefill() -> None:
            self.cache.prefill = True
            mask = None
            if causal is not None:
                # a padding row may look at itself: a row of nothing but -inf gives NaN in some kernels
                own = torch.eye(prompt.length, dtype=torch.bool, device=self.device)
                mask = self.mask((causal & visible[:, None, None, :]) | own)
            self.choose(self.forward(inputs_embeds=embeds, attention_mask=mask, position_ids=positions))

        fill(prompt)
        with prompt_mask_as_eager() if causal is None and self.device.type == "cuda" else nullcontext():
            replay = capture(prefill, self.device, self.pool)

        def run(given: Prompt) -> None:
            fill(given)
            replay()

        return run

    def admit(self, prompt: Prompt, padded: bool) -> dict[str, float]:
        """Capture what this prompt needs and is not there yet; ms by name."""
        spent: dict[str, float] = {}
        key = (prompt.length, padded)
        if key not in self.prefills:
            began = time.perf_counter()
            self.state.begin(prompt, replace(self.decoding, max_new_tokens=1))
            self.prefills[key] = self.build_prefill(prompt, padded)
            if len(self.prefills) > _PREFILLS:
                self.prefills.popitem(last=False)
            spent[f"prefill {self.state.batch}x{prompt.length}"] = (time.perf_counter() - began) * 1e3
        if not self.parts:
            began = time.perf_counter()
            self.state.begin(prompt, replace(self.decoding, max_new_tokens=1))
            self.parts = self.build_step()
            spent[f"step {self.state.batch}x{self.state.capacity}"] = (time.perf_counter() - began) * 1e3
        return spent

    def padded(self, prompt: Prompt) -> bool:
        """Which prefill serves this prompt. Asking the device would stall a sample of its own, which is padded only where it was
        admitted so; the rows of a batch are looked at."""
        if prompt.embeds.shape[0] == 1:
            return (prompt.length, True) in self.prefills
        return not bool(prompt.attention_mask.all())

    def prefill(self, prompt: Prompt, padded: bool, decoding: Decoding) -> None:
        self.state.begin(prompt, decoding)
        self.prefills[(prompt.length, padded)](prompt)
        self.flag.mark()


class SteppedEngine:
    """Engines that capture a prefill and a one-token step, and replay them."""

    name = "stepped"

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._decoder: Any = None
        self._fallback: Any = None
        self._sessions: OrderedDict[tuple[Any, ...], Session] = OrderedDict()
        self._most_new = 0
        self.prepare_ms: dict[str, float] = {}
        """Capture times so far, by what was captured; grows when `admit` meets a new length. EngineInfo holds this very dict."""
        self.late: list[str] = []
        """What had to be captured inside a timed run, because nobody called `admit`: such a sample's prefill is not valid."""
        self.encoder: GraphedCall | None = None
        """The adapter's feature function, captured; None where encode stays the adapter's own."""
        self.note: str | None = None
        """What is otherwise than asked for, also where that showed only at a capture."""
        self._prepared: Any = None

    def prepare(self, adapter: Adapter, decoding: Decoding, batch: int) -> EngineInfo:
        """Look at the model. Captures need a prompt's length and so come with `admit`. Never raises for a model that the
        engine cannot drive: it falls back and says so in the note."""
        model = adapter.language_model()
        self._most_new = max(self._most_new, decoding.max_new_tokens)
        try:
            if len(decoding.eos_token_ids) > EOS_SLOTS:
                raise Unsupported(f"{len(decoding.eos_token_ids)} EOS ids, at most {EOS_SLOTS}")
            decoder = decoder_of(model)
            _check_attention(decoder)
            note = self._set_up(model, decoder, batch)
        except Unsupported as reason:
            return self._fall_back(str(reason), adapter, decoding, batch)
        self._prepared = (adapter, decoding, batch)
        self._model, self._decoder = model, decoder
        notes = [note] if note else []
        self.encoder, eager = _captured_encoder(adapter, self.prepare_ms)
        if eager:
            notes.append(f"encode stays eager: {eager}")
        if decoder.embed_tokens.weight.device.type != "cuda":
            notes.append("no CUDA device: the captured functions run directly")
        if decoding.temperature > 0:
            notes.append("sampling on the device with its own random stream")
        self.note = "; ".join(notes) or None
        return EngineInfo(self.name, self.prepare_ms, self.note)

    def _fall_back(self, reason: str, adapter: Adapter, decoding: Decoding, batch: int) -> EngineInfo:
        """From now on another engine does the work; its note says why."""
        self._sessions.clear()
        self._fallback = self._make_fallback()
        info: EngineInfo = self._fallback.prepare(adapter, decoding, batch)
        self.late, self.encoder = getattr(self._fallback, "late", self.late), getattr(self._fallback, "encoder", self.encoder)
        self.note = f"{self.name} falls back to {self._fallback.name}: {reason}" + (f"; {info.note}" if info.note else "")
        log.warning("%s", self.note)
        return EngineInfo(self.name, info.prepare_ms, self.note)

    @torch.inference_mode()
    def admit(self, prompt: Prompt, decoding: Decoding) -> dict[str, float]:
        """Make ready for prompts of this shape, outside any timed window: capture what is missing, return ms by name.

        Idempotent and cheap when nothing is missing. Falls back when the model turns out not to be capturable. Raises ModelError
        before `prepare`, and for right-padded prompts.
        """
        if self._fallback is not None:
            if not hasattr(self._fallback, "admit"):
                return {}
            found: dict[str, float] = self._fallback.admit(prompt, decoding)
            theirs = getattr(self._fallback, "note", None)
            if theirs and theirs not in (self.note or ""):
                self.note = f"{self.note}; {theirs}"
            return found
        if bool((prompt.attention_mask[:, 1:] < prompt.attention_mask[:, :-1]).any()):
            raise ModelError("a prompt padded on the right: its last position is not its last token. Pad on the left (Adapter.collate).")
        self._most_new = max(self._most_new, decoding.max_new_tokens)
        session, _ = self._session(prompt, decoding)
        try:
            spent = session.admit(prompt, not bool(prompt.attention_mask.all()))
        except NotCapturable as reason:
            self._fall_back(str(reason), *self._prepared)
            return self.admit(prompt, decoding)
        self.prepare_ms.update(spent)
        return spent

    @torch.inference_mode()
    def run(self, merge: Callable[[], Prompt], decoding: Decoding, clock: StageClock) -> Tokens:
        """Prefill and decode on the clock. A prompt shape that was not admitted is captured here and recorded in `late`.

        Raises ModelError when `prepare` was not called.
        """
        if self._fallback is not None:
            tokens: Tokens = self._fallback.run(merge, decoding, clock)
            return tokens
        with clock.stage("prefill"):
            prompt = merge()
            session, fresh = self._session(prompt, decoding)
            padded = session.padded(prompt)
            if fresh or (prompt.length, padded) not in session.prefills or not session.parts:
                padded = not bool(prompt.attention_mask.all())
                spent = session.admit(prompt, padded)
                self.late += spent
                self.prepare_ms.update(spent)
                log.warning("%s: captured %s inside a timed run; call admit(prompt, decoding) before", self.name, ", ".join(spent))
            if decoding.temperature > 0:
                torch.manual_seed(decoding.seed)
            session.prefill(prompt, padded, decoding)
        with clock.stage("decode"):
            produced = decode(session.parts, session.flag, decoding, clock)
            tokens = collect(session.state, prompt.length, produced, decoding)
        return replace(tokens, nan=bool(session.state.bad.any()))

    def _session(self, prompt: Prompt, decoding: Decoding) -> tuple[Session, bool]:
        """The session that holds this prompt, and whether it is new."""
        if self._model is None or self._decoder is None:
            raise ModelError(f"engine {self.name} ran before prepare: call prepare(adapter, decoding, batch) once per model")
        odd = [key for key in prompt.extra if key not in _HARMLESS and not key.endswith("_grid_thw")]
        if odd:
            raise ModelError(
                f"engine {self.name}: the prompt carries {', '.join(odd)}, which a captured step cannot pass on. Use engine generate."
            )
        need = prompt.length + max(self._most_new, decoding.max_new_tokens)
        capacity = -(-need // CAPACITY_STEP) * CAPACITY_STEP
        planes = 1 if prompt.position_ids.dim() == 2 else int(prompt.position_ids.shape[0])
        batch = int(prompt.embeds.shape[0])
        key = (batch, capacity, planes, decoding.temperature, decoding.top_p)
        session = self._sessions.get(key)
        if session is not None:
            self._sessions.move_to_end(key)
            return session, False
        if len(self._sessions) >= _SESSIONS:
            self._sessions.popitem(last=False)
        session = self._sessions[key] = self._make_session(self._model, self._decoder, batch, capacity, planes, decoding)
        return session, True

    def _make_session(self, model: nn.Module, decoder: Any, batch: int, capacity: int, planes: int, decoding: Decoding) -> Session:
        return Session(model, decoder, batch, capacity, planes, decoding)

    def _set_up(self, model: nn.Module, decoder: Any, batch: int) -> str | None:
        """Engine-specific part of prepare; a note. Raises Unsupported."""
        return None

    def _make_fallback(self) -> Any:
        return GenerateEngine()


def _captured_encoder(adapter: Any, prepare_ms: dict[str, float]) -> tuple[GraphedCall | None, str | None]:
    """The adapter's encode as a graph, or why not. Its capture times go to `prepare_ms`."""
    if getattr(adapter, "device", torch.device("cpu")).type != "cuda":
        return None, None  # already said: everything runs directly
    if getattr(getattr(adapter, "spec", None), "keep_visual", 1.0) < 1:
        return None, "visual tokens are chosen by a hook, which a replay does not run"
    try:
        encoder = graph_encoder(adapter)
    except ModelError as error:
        return None, str(error)
    encoder.prepare_ms = prepare_ms
    return encoder, None


def _check_attention(decoder: Any) -> None:
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise Unsupported(f"layers of kinds {', '.join(sorted(kinds))}; only full attention is captured")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise Unsupported(f"a sliding window of {config.sliding_window}")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise Unsupported(f"attention {config._attn_implementation}; sdpa and eager are captured")
