"""Part of benchmarks/engines.py: whole steps at full size, and where their time goes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from engines_common import CONTEXTS, NEW, RESULTS, SHAPES, attempt, graph_ms, out_of_time, row, say
from engines_linears import ATTENTION

# --- 3 the whole step -------------------------------------------------------------------------------------------------


def build_model(dtype: torch.dtype = torch.bfloat16, layers: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32064,
        max_position_embeddings=4096, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = 2
    return model.eval().requires_grad_(False)


class Plain:
    """The little of an adapter that engines look at."""

    name = "llama"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = model.model.embed_tokens.weight.device

    def language_model(self) -> Any:
        return self.model


def prompt_of(model: Any, length: int, batch: int = 1, pads: Any = None, seed: int = 0) -> Any:
    from stagebench.models.base import Prompt

    weight = model.model.embed_tokens.weight
    generator = torch.Generator(device="cuda").manual_seed(seed)
    ids = torch.randint(3, 32000, (batch, length), device="cuda", generator=generator)
    mask = torch.ones_like(ids)
    for at, pad in enumerate(pads or []):
        mask[at, :pad] = 0
    with torch.inference_mode():
        return Prompt(torch.nn.functional.embedding(ids, weight), mask, (mask.cumsum(1) - 1).clamp(min=0))


def fused_session(model: Any, prompt: Any, config: Any = None, decoding: Any = None) -> Any:
    """A FusedSession made ready for `prompt`, holding it."""
    from stagebench.engines.fused import FusedEngine
    from stagebench.models.base import Decoding

    decoding = decoding or Decoding(NEW, NEW, (2,))
    engine = FusedEngine(config)
    engine.prepare(Plain(model), decoding, prompt.embeds.shape[0])
    engine.admit(prompt, decoding)
    session, _ = engine._session(prompt, decoding)
    with torch.inference_mode():
        session.prefill(prompt, prompt.embeds.shape[0] > 1 and not bool(prompt.attention_mask.all()), decoding)
    return session


@torch.inference_mode()
def step_ms(session: Any, config: Any, repeats: int = 24) -> float:
    """ms of one whole step with these settings, replayed in a row as in a decode; the counters are put back first."""
    from stagebench.engines._graphs import capture
    from stagebench.engines._triton_step import TritonStep

    old, state = session.step, session.state
    step = TritonStep(session.weights, state, old._cos, old._sin, None, config)
    step.begin()
    saved = [t.clone() for t in (state.slot, state.positions, state.count, state.done)]
    layers = range(len(session.weights.layers))

    def whole() -> None:
        step.layers(layers)
        step.finish()

    replay = capture(whole, session.device, session.pool)
    times = []
    for _ in range(3):
        for tensor, value in zip((state.slot, state.positions, state.count, state.done), saved, strict=True):
            tensor.copy_(value)
        replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    for tensor, value in zip((state.slot, state.positions, state.count, state.done), saved, strict=True):
        tensor.copy_(value)
    return min(times)


@torch.inference_mode()
def parts_ms(session: Any, config: Any) -> dict[str, float]:
    """Where a step's time goes: each group of kernels alone in a graph, over all layers."""
    from stagebench.engines._launch import Form, launch_linear
    from stagebench.engines._triton_step import TritonStep

    old, state, w = session.step, session.state, session.weights
    step = TritonStep(w, state, old._cos, old._sin, None, config)
    step.begin()
    every = range(len(w.layers))
    saved = [t.clone() for t in (state.slot, state.positions, state.count, state.done)]

    def only(name: str) -> None:
        for index in every:
            layer = w.layers[index]
            if name == "qkv":
                launch_linear(config.qkv, step.hidden, layer.qkv, step._qkv, Form(norm=layer.norm_in, eps=w.eps, pdl=config.pdl))
            if name == "attention":
                step.attend(index)
            if name == "out":
                launch_linear(config.out, step._mixed, layer.out, step.hidden, Form(residual=True, pdl=config.pdl))
            if name == "gate_up":
                form = Form(norm=layer.norm_post, eps=w.eps, gated=True, pdl=config.pdl)
                launch_linear(config.gate_up, step.hidden, layer.gate_up, step._active, form)
            if name == "down":
                launch_linear(config.down, step._active, layer.down, step.hidden, Form(residual=True, pdl=config.pdl))

    found = {name: graph_ms(lambda name=name: only(name), 8) for name in ("qkv", "attention", "out", "gate_up", "down")}
    found["head"] = graph_ms(
        lambda: launch_linear(config.head, step.hidden, w.head, step.logits, Form(norm=w.norm, eps=w.eps, pdl=config.pdl)), 8
    )
    found["select"] = graph_ms(step.select, 8)
    for tensor, value in zip((state.slot, state.positions, state.count, state.done), saved, strict=True):
        tensor.copy_(value)
    return found


def limit_ms(session: Any, context: int) -> float:
    """Bytes of weights and cache that one step must read, over the best bandwidth measured here."""
    w = session.weights
    cache = 2 * len(w.layers) * session.state.batch * w.kv_heads * w.head_dim * context * 2
    return (w.step_bytes + cache) / RESULTS.get("bandwidth", {}).get("best_read_gbs", 4414.0) / 1e6


def search_step(model: Any, ranking: dict[str, list[tuple[float, Any]]] | None, search: bool = True) -> Any:
    """Whole-step times: as it ships and without PDL; with `search`, the tuned linears, then attention's settings at two contexts."""
    from stagebench.engines._triton_step import StepConfig

    sessions = {name: fused_session(model, prompt_of(model, CONTEXTS[name])) for name in ("eventgpt", "video_llava")}
    limits = {name: limit_ms(s, CONTEXTS[name] + NEW // 2) for name, s in sessions.items()}
    short, long = sessions["eventgpt"], sessions["video_llava"]
    found: dict[str, Any] = {"limit_ms": limits}
    RESULTS["step"] = found

    def note(label: str, config: Any) -> float:
        times = {name: attempt(f"step {label}", step_ms, s, config or s.step.config) for name, s in sessions.items()}
        shown = config or short.step.config
        found[label] = {**times, "config": {f.name: str(getattr(shown, f.name)) for f in dataclasses.fields(shown)}}
        text = "  ".join(f"{name} {ms:.3f} ({limits[name] / ms:.0%} of limit)" for name, ms in times.items() if ms)
        row(f"step {label:24} {text}")
        return times["eventgpt"] or float("inf")

    note("as it ships, by capacity", None)
    note("up to 1024 slots, no pdl", StepConfig.for_batch(1, pdl=False))
    if not search:
        for where, session in sessions.items():
            found[f"parts {where}"] = attempt("parts", parts_ms, session, session.step.config)
            row(f"parts {where} ms: " + "  ".join(f"{k} {v:.3f}" for k, v in (found[f"parts {where}"] or {}).items()))
        return None
    best = StepConfig.for_batch(1, pdl=True)
    if ranking and all(ranking.get(name) for name in SHAPES):
        best = dataclasses.replace(best, **{name: ranking[name][0][1] for name in SHAPES})
        now = note("chain winners, pdl", best)
        for name in SHAPES:
            for _, how in ranking[name][1:5]:
                if out_of_time():
                    break
                trial = dataclasses.replace(best, **{name: how})
                ms = attempt(f"step {name} {how}", step_ms, short, trial, 16)
                if ms is not None and ms < now - 0.003:
                    say(f"  {name} -> {how}: {now:.3f} -> {ms:.3f}")
                    best, now = trial, ms
        note("tuned in the step, pdl", best)
    for where, session in (("eventgpt", short), ("video_llava", long)):
        trials = {}
        for splits, block, warps in ATTENTION:
            if out_of_time() or (splits == 32 and where == "eventgpt") or (splits == 4 and where == "video_llava"):
                continue
            trial = dataclasses.replace(best, splits=splits, block_s=block, attention_warps=warps)
            ms = attempt(f"attention {splits} {block} {warps}", step_ms, session, trial, 12)
            if ms is not None:
                trials[(splits, block, warps)] = ms
        order = sorted(trials.items(), key=lambda item: item[1])
        found[f"attention {where}"] = [{"splits": k[0], "block_s": k[1], "warps": k[2], "ms": v} for k, v in order]
        if order:
            best_few = "  ".join(f"{k} {v:.3f}" for k, v in order[:5])
            row(f"attention {where} (splits, block, warps) ms: {best_few}  worst {order[-1][0]} {order[-1][1]:.3f}")
            splits, block, warps = order[0][0]
            chosen = dataclasses.replace(best, splits=splits, block_s=block, attention_warps=warps)
            note(f"best for {where}", chosen)
            found[f"parts {where}"] = attempt("parts", parts_ms, session, chosen)
            row(f"parts {where} ms: " + "  ".join(f"{k} {v:.3f}" for k, v in (found[f"parts {where}"] or {}).items()))
            attempt("no pdl", note, f"best for {where}, no pdl", dataclasses.replace(chosen, pdl=False))
            RESULTS.setdefault("chosen", {})[where] = chosen
    return RESULTS.get("chosen")
