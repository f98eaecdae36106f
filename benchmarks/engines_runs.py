"""Part of benchmarks/engines.py: correctness, quality, engines end to end, batches, encode, adapters."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from typing import Any

import torch

from engines_common import CONTEXTS, NEW, RESULTS, attempt, event_ms, out_of_time, row, say
from engines_linears import linear_error
from engines_step import Plain, build_model, fused_session, limit_ms, prompt_of, step_ms

# --- 4 right: tiny fp32 ids, and full-size bf16 logits ----------------------------------------------------------------


def tiny_equality() -> None:
    """Ids of graph and fused against generate, fp32: fixed, natural with EOS anywhere, padded batch, grouped heads, biases."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from stagebench.engines import create
    from stagebench.models.base import Decoding, Prompt
    from stagebench.stages import StageClock

    torch.backends.cuda.matmul.allow_tf32 = False
    checked, wrong = 0, []
    for family, kv in (("llama", 2), ("qwen2", 2)):
        torch.manual_seed(3)
        kind, cls = (LlamaConfig, LlamaForCausalLM) if family == "llama" else (Qwen2Config, Qwen2ForCausalLM)
        config = kind(
            hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=kv, vocab_size=211
        )
        with torch.device("cuda"):
            model = cls(config).eval().requires_grad_(False)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.12) if p.dim() > 1 else None
        reference = create("generate")
        reference.prepare(Plain(model), Decoding(40), 1)
        engines = {name: create(name) for name in ("graph", "fused")}
        for engine in engines.values():
            info = engine.prepare(Plain(model), Decoding(40, 40, (2,)), 1)
            if info.note:
                say(f"note: {info.note}")
        for batch, length in ((1, 11), (1, 250), (3, 37), (20, 30)):
            pads = [3 * i % (length - 2) for i in range(batch)] if batch > 1 else None
            mask = torch.ones(batch, length, dtype=torch.int64, device="cuda")
            for at, pad in enumerate(pads or []):
                mask[at, :pad] = 0
            prompt = Prompt(torch.randn(batch, length, 128, device="cuda"), mask, (mask.cumsum(1) - 1).clamp(min=0))

            def ids(engine: Any, decoding: Any, prompt: Any = prompt) -> Any:
                clock = StageClock("cuda")
                with clock.total():
                    tokens = engine.run(lambda: prompt, decoding, clock)
                return tokens.ids, tokens.finish_reasons

            fixed = Decoding(40, 40, (2,))
            want = ids(reference, fixed)
            cases = [fixed] + [
                Decoding(40, minimum, (want[0][0][at], want[0][-1][7])) for at, minimum in ((0, 0), (1, 0), (13, 0), (13, 20), (39, 0))
            ]
            for decoding in cases:
                expected = ids(reference, decoding)
                for name, engine in engines.items():
                    engine.admit(prompt, decoding)
                    got = attempt(f"tiny {family} {name} B{batch}", ids, engine, decoding)
                    checked += 1
                    if got != expected:
                        wrong.append(f"{family}/kv{kv} {name} B{batch} L{length} {decoding.min_new_tokens}/{decoding.eos_token_ids}")
    RESULTS["tiny"] = {"checked": checked, "wrong": wrong}
    row(f"tiny fp32 ids equal generate's: {checked - len(wrong)} of {checked}" + (f"; wrong: {wrong[:8]}" if wrong else ""))


@torch.inference_mode()
def quality(model: Any, chosen: Any) -> None:
    """Teacher-forced bf16 logits of eager HF steps, graph and fused against an fp32 one-pass forward on the same ids."""
    from transformers import DynamicCache

    from stagebench.engines.quality import compare_logits

    steps, length = 32, 642
    prompt = prompt_of(model, length)
    generator = torch.Generator(device="cuda").manual_seed(9)
    forced = torch.randint(3, 32000, (1, steps), device="cuda", generator=generator)
    embeds = torch.cat([prompt.embeds, model.model.embed_tokens(forced)], 1)
    wide = build_model(torch.float32)
    for to, source in zip(wide.parameters(), model.parameters(), strict=True):
        to.copy_(source)
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = wide(inputs_embeds=embeds.float(), use_cache=False, logits_to_keep=steps + 1).logits[0, :-1]
    del wide
    gc.collect()
    torch.cuda.empty_cache()
    found: dict[str, Any] = {}
    cache = DynamicCache(config=model.config)
    logits = [model(inputs_embeds=prompt.embeds, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()]
    logits += [
        model(input_ids=forced[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1].float() for at in range(steps - 1)
    ]
    found["eager bf16 steps"] = compare_logits(reference, torch.cat(logits))
    first = logits[0]

    def fused(config: Any) -> Any:
        session = fused_session(model, prompt, config)
        step, rows = session.step, [first]
        for at in range(steps - 1):
            session.state.token.copy_(forced[:, at])
            step.begin()
            for part in session.parts:
                part()
            rows.append(step.logits.clone())
        runs.append(torch.cat(rows))
        return compare_logits(reference, runs[-1])

    runs: list[torch.Tensor] = []
    found["fused default"] = attempt("quality fused", fused, None)
    attempt("quality fused again", fused, None)
    if len(runs) == 2:  # a race shows as an error that moves
        row(f"fused logits bit-identical in two sessions: {torch.equal(runs[0], runs[1])}, finite: {bool(runs[0].isfinite().all())}")
    if chosen and chosen.get("eventgpt"):
        found["fused chosen"] = attempt("quality fused chosen", fused, chosen["eventgpt"])
    RESULTS["quality"] = {k: dataclasses.asdict(v) for k, v in found.items() if v}
    for name, q in found.items():
        if q:
            errors = f"KL mean {q.mean_kl:.2e} max {q.max_kl:.2e}  rel {q.relative_error:.2e}"
            row(f"quality {name:18} argmax agreement {q.agreement:.3f}  {errors}  (n={q.positions})")


# --- 5 engines, end to end --------------------------------------------------------------------------------------------


def engine_times(model: Any, name: str, context: str, chosen: Any, repeats: int = 5) -> Any:
    """Medians of a fixed-length run after warm-up, and what a natural stop costs."""
    from stagebench.engines import create
    from stagebench.engines.fused import FusedEngine
    from stagebench.models.base import Decoding
    from stagebench.stages import StageClock

    config = (chosen or {}).get("video_llava" if context == "video_llava" else "eventgpt")
    engine = FusedEngine(config) if name == "fused" else create(name)
    decoding = Decoding(NEW, NEW, (2,))
    prompt = prompt_of(model, CONTEXTS[context])
    info = engine.prepare(Plain(model), decoding, 1)
    began = time.perf_counter()
    if hasattr(engine, "admit"):
        engine.admit(prompt, decoding)
    prepare = (time.perf_counter() - began) * 1e3

    def once(d: Any) -> tuple[Any, Any]:
        clock = StageClock("cuda")
        with clock.total():
            tokens = engine.run(lambda: prompt, d, clock)
        return tokens, clock.times()

    for _ in range(2):
        tokens, _ = once(decoding)
    both = [once(decoding) for _ in range(repeats)]
    runs = [times for _, times in both]
    repeatable = all(again.ids == tokens.ids for again, _ in both)
    prefill = statistics.median(t.host_ms["prefill"] for t in runs)
    decode = statistics.median(t.host_ms["decode"] for t in runs)
    token = statistics.median((t.token_ms[-1] - t.token_ms[4]) / (len(t.token_ms) - 5) for t in runs)
    found = {"prefill_ms": prefill, "decode_ms": decode, "ms_per_token": decode / (NEW - 1), "event_ms_per_token": token}
    found |= {"total_ms": prefill + decode, "prepare_ms": prepare, "note": info.note, "late": getattr(engine, "late", [])}
    found["same_ids_every_run"] = repeatable
    found["gpu_decode_ms"] = statistics.median(t.gpu_ms.get("decode", 0.0) for t in runs)
    natural = Decoding(NEW, 0, (tokens.ids[0][20],))
    stops = [once(natural) for _ in range(3)]
    produced = len(stops[-1][0].ids[0])
    found["natural"] = {"tokens": produced, "decode_ms": statistics.median(t.host_ms["decode"] for _, t in stops)}
    found["natural"]["overshoot_ms"] = found["natural"]["decode_ms"] - token * (produced - 1)
    found["natural"]["same_prefix"] = stops[-1][0].ids[0] == tokens.ids[0][:produced]
    stop = found["natural"]
    row(
        f"engine {name:8} {context:11} prefill {prefill:6.1f}  decode({NEW}) {decode:7.1f}  ms/token {found['ms_per_token']:.3f}"
        f" (events {token:.3f})  sum {prefill + decode:6.1f}  prepare {prepare:.0f}  repeatable={repeatable}"
        f"  natural {produced} tok overshoot {stop['overshoot_ms']:.2f} same={stop['same_prefix']}"
    )
    RESULTS.setdefault("engines", {})[f"{name} {context}"] = found
    gc.collect()
    torch.cuda.empty_cache()
    return found


@torch.inference_mode()
def batches(model: Any) -> None:
    """Whole fused steps at batch 1..32, context 642, rows padded by 0..31; the step's logits against the HF model's own forward."""
    from stagebench.engines._launch import Linear
    from stagebench.engines.quality import compare_logits

    for name, batch in itertools.product(("qkv", "gate_up", "down"), (4, 32)):
        error = attempt(f"cublas {name} {batch}", linear_error, name, Linear("cublas"), batch)
        if error is None or not error < 1.5e-2:
            row(f"cublas {name} batch {batch}: WRONG, relative error {error}")
    for batch in (1, 2, 4, 8, 16, 32):
        if out_of_time():
            return
        prompt = prompt_of(model, 642, batch, [7 * at % 32 for at in range(batch)] if batch > 1 else None)
        session = attempt(f"batch {batch} session", fused_session, model, prompt)
        if session is None:
            continue
        token = session.state.token.clone()
        for part in session.parts:
            part()
        got = session.step.logits.clone()
        again = model(
            inputs_embeds=torch.cat([prompt.embeds, model.model.embed_tokens(token)[:, None]], 1),
            attention_mask=torch.nn.functional.pad(prompt.attention_mask, (0, 1), value=1),
            position_ids=torch.cat([prompt.position_ids, prompt.position_ids[:, -1:] + 1], 1),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
        right = compare_logits(again, got)
        ms, limit = attempt(f"batch {batch}", step_ms, session, session.step.config, 10), limit_ms(session, 664)
        RESULTS.setdefault("batch", {})[batch] = {"step_ms": ms, "limit_ms": limit, "logits": dataclasses.asdict(right)}
        row(
            f"batch {batch:2} step {ms or float('nan'):.3f} ms (limit {limit:.2f})  against one HF forward: argmax agreement"
            f" {right.agreement:.3f}  KL max {right.max_kl:.1e}  rel {right.relative_error:.1e}"
        )
        del session, again
        gc.collect()
        torch.cuda.empty_cache()


def encoder() -> None:
    """CLIP ViT-L/14-336 and a two-layer projector on 5 frames: eager against a captured graph."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from stagebench.engines.encoder import GraphedCall

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            tower = CLIPVisionModel(config).eval()
            projector = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096))
    finally:
        torch.set_default_dtype(torch.float32)
    pixels = torch.randn(5, 3, 336, 336, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        encode = GraphedCall(lambda pixel_values: projector(tower(pixel_values).last_hidden_state))

        def wall(function: Any) -> float:
            times = []
            for _ in range(12):
                torch.cuda.synchronize()
                began = time.perf_counter()
                function()
                torch.cuda.synchronize()
                times.append((time.perf_counter() - began) * 1e3)
            return statistics.median(times[3:])

        eager = wall(lambda: encode.function(pixels))
        encode.admit(pixel_values=pixels)
        graphed = wall(lambda: encode(pixel_values=pixels))
        same = bool(torch.allclose(encode.function(pixels), encode(pixel_values=pixels), atol=2e-2, rtol=2e-2))
    RESULTS["encode"] = {"eager_ms": eager, "graph_ms": graphed, "same": same, "prepare_ms": encode.prepare_ms}
    row(f"encode CLIP-L/336 x5 + projector: eager {eager:.2f} ms, graph {graphed:.2f} ms, same={same}")


def adapters() -> None:
    """The three real model classes at full size through their adapters: encode graph, prefill, fused decode."""
    import numpy as np

    from stagebench.engines import create
    from stagebench.engines.encoder import graph_encoder
    from stagebench.models.base import Decoding, ModelSpec
    from stagebench.models.registry import create as create_adapter
    from stagebench.stages import StageClock

    cases = {"eventgpt": ("eventgpt", 5), "llava": ("hf", 8), "video_llava": ("hf", 8)}
    query = "What are the key elements in this scene?"
    for name, (kind, count) in cases.items():
        if out_of_time():
            return

        def one(name: str = name, kind: str = kind, count: int = count) -> None:
            adapter = create_adapter(kind)
            adapter.load(ModelSpec("dummy:0", name, "7b", torch.bfloat16, frames_as="grid" if name == "llava" else None), "cuda")
            frames = list(np.random.default_rng(0).integers(0, 256, (count, 480, 640, 3), dtype=np.uint8))
            inputs = adapter.preprocess(frames, query).to("cuda", torch.bfloat16)
            with torch.inference_mode():
                eager = event_ms(lambda: adapter.encode(inputs), 5)
                encode = graph_encoder(adapter)
                graphed = attempt(f"encode graph {name}", event_ms, lambda: adapter.encode(inputs), 10)
                if graphed is None:  # go on with the eager one
                    owner, attribute = (adapter, "_encode") if hasattr(adapter, "_encode") else (adapter.model, "get_event_features")
                    setattr(owner, attribute, encode.function)
                decoding = Decoding(NEW, NEW, adapter.eos_token_ids())
                texts = []
                for engine_name in ("graph", "fused"):
                    engine = create(engine_name)
                    info = engine.prepare(adapter, decoding, 1)
                    prompt = adapter.merge(inputs, adapter.encode(inputs))
                    engine.admit(prompt, decoding)
                    for _ in range(3):
                        clock = StageClock("cuda")
                        with clock.total():
                            features = adapter.encode(inputs)
                            engine.run(lambda features=features: adapter.merge(inputs, features), decoding, clock)
                    times = clock.times()
                    per_token = times.host_ms["decode"] / (NEW - 1)
                    texts.append(f"{engine_name} prefill {times.host_ms['prefill']:.1f} ms/token {per_token:.3f} note={info.note}")
            RESULTS.setdefault("adapters", {})[name] = {"encode_eager_ms": eager, "encode_graph_ms": graphed, "runs": texts}
            row(
                f"adapter {name:11} L={prompt.length} encode eager {eager:.2f} graph {graphed or float('nan'):.2f} (calls {encode.calls})  "
                + "  ".join(texts)
            )

        attempt(f"adapter {name}", one)
        gc.collect()
        torch.cuda.empty_cache()
