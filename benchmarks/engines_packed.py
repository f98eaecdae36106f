"""The fused step on packed weights at full size: right, then launch settings tried in the whole step, then where its time goes.

    PYTHONPATH=src python3 benchmarks/engines_packed.py            # about 2 minutes on an H200; needs 40 GB of device memory
    PYTHONPATH=src python3 benchmarks/engines_packed.py --no-search --schemes int8

Random weights at the shape of LLaVA-1.5's decoder. Limits are from packed bytes (codes, scales) plus the head and the cache.
Results: a table last, everything in packed.json under $OUT or --output. docs/results/packed.md is made from it, and from the search's
packed-search.json beside it, by

    python3 benchmarks/engines_packed.py --report docs/results
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engines_common import BEGAN, BUDGET, CONTEXTS, NEW, RESULTS, TABLE, attempt, event_ms, out_of_time, row, say
from engines_linears import environment
from engines_step import build_model, fused_session, limit_ms, parts_ms, prompt_of, step_ms

PARTS = ("gate_up", "down", "qkv", "out")


def candidates(scheme: str, part: str) -> list[Any]:
    """Launch settings to try: rows a program, columns a chunk (of a row), warps, programs a multiprocessor."""
    from stagebench.engines._launch import Linear

    gated, down = part == "gate_up", part == "down"
    wide = 4096 if scheme != "int8" else 2048  # columns that 128 threads read at once
    if down:
        found = [("rows", n, c, w, 0) for n in (2, 4, 8) for c, w in ((wide, 4), (wide // 2, 2), (wide * 2, 8))]
        if scheme == "int8":
            found += [("persistent", 1, 0, 16, 2), ("persistent", 2, 0, 16, 1), ("persistent", 2, 0, 16, 2), ("rows", 4, 4096, 4, 0)]
        else:
            found += [("persistent", n, 0, w, s) for n, w, s in ((2, 16, 1), (2, 16, 2), (4, 16, 1), (2, 8, 2), (4, 8, 2))]
    elif scheme == "int8":
        shapes = ((4, 4, 2), (4, 4, 3), (4, 4, 4), (8, 4, 2), (8, 8, 2), (4, 8, 2), (4, 8, 3), (4, 8, 4), (2, 4, 4), (2, 4, 6))
        found = [("persistent", max(1, n // 2) if gated else n, 0, w, s) for n, w, s in shapes]
        found += [("rows", 2 if gated else 4, 4096, 4, 0), ("rows", 2 if gated else 4, 4096, 8, 0)]
    else:
        shapes = ((4, 4, 2), (4, 4, 3), (4, 4, 4), (2, 4, 4), (2, 4, 5), (2, 4, 6), (8, 4, 2), (4, 2, 6), (4, 2, 8), (2, 2, 8))
        found = [("persistent", max(1, n // 2) if gated else n, 0, w, s) for n, w, s in shapes]
        found += [("rows", 1 if gated else 2, 4096, 4, 0), ("rows", 2 if gated else 4, 4096, 4, 0)]
    return [Linear(*each) for each in found]


def packed_model(scheme: str, layers: int = 32) -> Any:
    from stagebench.models import quantize

    model = build_model(layers=layers)
    with torch.no_grad():
        quantize.apply(model, scheme=scheme, device=torch.device("cpu"), vision=torch.nn.Identity())  # rows are not compiled: unused here
    return model


def precompile(part: int, parts: int, schemes: list[str]) -> None:
    """A worker: its share of all variants once, on one layer, so that the compiler's disk cache holds them."""
    from stagebench.engines._launch import Form, launch_linear
    from stagebench.engines._stepped import decoder_of
    from stagebench.engines._weights import pack

    number = 0
    for scheme in schemes:
        model = packed_model(scheme, 1)
        layer = pack(model, decoder_of(model)).layers[0]
        for name in PARTS:
            w = getattr(layer, name)
            n = w.shape[0] // (2 if name == "gate_up" else 1)
            normed, residual = name in ("qkv", "gate_up"), name in ("out", "down")
            x = torch.randn(1, w.shape[1], device="cuda", dtype=torch.float32 if normed else torch.bfloat16)
            y = torch.zeros(1, n, device="cuda", dtype=torch.float32 if residual else torch.bfloat16)
            for how in candidates(scheme, name):
                number += 1
                if number % parts == part:
                    try:
                        norm = layer.norm_in if normed else None
                        form = Form(norm=norm, eps=1e-5, gated=name == "gate_up", residual=residual, pdl=True)
                        launch_linear(how, x, w, y, form)
                        torch.cuda.synchronize()
                    except Exception as error:
                        print(f"worker {part}: {scheme} {name} {how}: {type(error).__name__}: {str(error)[:200]}", flush=True)


@torch.inference_mode()
def step_logits(session: Any, config: Any, token: torch.Tensor) -> torch.Tensor:
    """Logits of the step after `token` with these settings, the state put back."""
    from stagebench.engines._triton_step import TritonStep

    old, state = session.step, session.state
    saved = [t.clone() for t in (state.slot, state.positions, state.count, state.done, state.token)]
    state.token.copy_(token)
    step = TritonStep(session.weights, state, old._cos, old._sin, None, config)
    step.begin()
    step.layers(range(len(session.weights.layers)))
    step.finish()
    for tensor, value in zip((state.slot, state.positions, state.count, state.done, state.token), saved, strict=True):
        tensor.copy_(value)
    return step.logits.clone()


@torch.inference_mode()
def dense_logits(model: Any, session: Any, prompt: Any) -> torch.Tensor:
    """The same step's logits by the HF model's own forward over prompt and token, on the same packed weights (unpacked to multiply)."""
    embeds = torch.cat([prompt.embeds, model.model.embed_tokens(session.state.token)[:, None]], 1)
    return model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1]


@torch.inference_mode()
def prefill_ms(session: Any, prompt: Any) -> float:
    replay = session.prefills[(prompt.length, False)]
    return event_ms(lambda: replay(prompt), 5, 1)


def scheme_results(scheme: str, search: bool) -> None:
    from stagebench.engines.quality import compare_logits

    model = packed_model(scheme)
    found = RESULTS.setdefault("packed", {}).setdefault(scheme, {})
    prompts = {name: prompt_of(model, CONTEXTS[name]) for name in ("eventgpt", "video_llava")}
    sessions = {name: fused_session(model, prompt) for name, prompt in prompts.items()}
    short = sessions["eventgpt"]
    limits = {name: limit_ms(s, CONTEXTS[name] + NEW // 2) for name, s in sessions.items()}
    found["step_bytes"], found["limit_ms"] = short.weights.step_bytes, limits
    plain, token = dense_logits(model, short, prompts["eventgpt"]), short.state.token.clone()
    best = short.step.config

    def note(label: str, config: Any) -> None:
        times = {name: attempt(f"{scheme} {label} {name}", step_ms, s, config) for name, s in sessions.items()}
        right = attempt(f"{scheme} {label} logits", lambda: compare_logits(plain, step_logits(short, config, token)))
        found[label] = {"ms": times, "config": {f.name: str(getattr(config, f.name)) for f in dataclasses.fields(config)}}
        found[label]["logits"] = dataclasses.asdict(right) if right else None
        text = "  ".join(f"{name} {ms:.3f} ({limits[name] / ms:.0%} of {limits[name]:.2f})" for name, ms in times.items() if ms)
        row(
            f"{scheme:5} step {label:12} {text}  against one HF forward: rel {right.relative_error:.1e} KL {right.max_kl:.1e}"
            if right
            else f"{label} {text}"
        )

    note("as shipped", best)
    if search:
        now = attempt("first", step_ms, short, best, 16) or float("inf")
        for part in PARTS:
            tried = []
            for how in candidates(scheme, part):
                if out_of_time():
                    break
                trial = dataclasses.replace(best, **{part: how})
                ms = attempt(f"{scheme} {part} {how}", step_ms, short, trial, 16)
                if ms is None:
                    continue
                tried.append((ms, how))
            tried.sort(key=lambda item: item[0])
            say(
                f"  {scheme} {part}: "
                + "  ".join(f"{how} {ms:.3f}" for ms, how in tried[:6])
                + (f"  worst {tried[-1][0]:.3f}" if tried else "")
            )
            found[f"search {part}"] = [{"how": str(how), "ms": ms} for ms, how in tried]
            if tried and tried[0][0] < now - 0.002:
                now, best = tried[0][0], dataclasses.replace(best, **{part: tried[0][1]})
        note("best", best)
        row(f"{scheme:5} best: " + "  ".join(f"{part}={getattr(best, part)}" for part in PARTS))
    parts = found["parts"] = attempt(f"{scheme} parts", parts_ms, short, best)
    speed = RESULTS.get("bandwidth", {}).get("best_read_gbs", 4414.0) * 1e6
    ideal = {p: sum(getattr(layer, p).nbytes for layer in short.weights.layers) / speed for p in PARTS}
    found["parts_limit"] = ideal
    row(f"{scheme:5} parts ms (limit): " + "  ".join(f"{k} {v:.3f} ({ideal.get(k, 0):.3f})" for k, v in (parts or {}).items()))
    found["prefill_ms"] = {}
    for name, session in sessions.items():
        ms = attempt(f"{scheme} prefill {name}", prefill_ms, session, prompts[name])
        found["prefill_ms"][name] = ms
    row(f"{scheme:5} prefill ms: {found['prefill_ms']}")


def report(folder: Path) -> None:
    """packed.md from packed.json and packed-search.json."""
    ships, searched = (json.loads((folder / name).read_text()) for name in ("packed.json", "packed-search.json"))
    env, plain = ships["env"], json.loads((folder / "engines-attention.json").read_text())["step"]["as it ships, by capacity"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("driver", "python", "torch", "triton", "transformers"))
    command = "PYTHONPATH=src python3 benchmarks/engines_packed.py"
    lines = [
        "# The fused step on packed weights",
        "",
        f"`packed.json`, {ships['seconds']:.0f} s by `{command} {ships['arguments']}` (commit {ships.get('commit', 'unknown')}).",
        f"{env['gpu']}, {versions}. Best read {ships['bandwidth']['best_read_gbs']:.0f} GB/s.",
        "LLaMA-2-7B shape, random weights, batch 1. The limit is of packed bytes: codes, scales, the bf16 head, and the cache.",
        "bf16's row is of `engines-attention.json`, by `benchmarks/engines.py --sections env,step --no-search` in the same minutes.",
        "",
        "| weights | GB a step | step at 642, ms (share of limit) | at 2078 | prefill of 642, 2078, ms | KL to one forward, max |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| bf16 | 13.2 | {plain['eventgpt']:.3f} | {plain['video_llava']:.3f} | | |",
    ]
    for scheme, found in ships["packed"].items():
        own = found["as shipped"]
        steps = " | ".join(f"{ms:.3f} ({found['limit_ms'][name] / ms:.0%})" for name, ms in own["ms"].items())
        prefill = ", ".join(f"{ms:.1f}" for ms in found["prefill_ms"].values())
        lines.append(f"| {scheme} | {found['step_bytes'] * 1e-9:.2f} | {steps} | {prefill} | {own['logits']['max_kl']:.1e} |")
    lines += ["", "## Where a step's time goes", "", "Context 642; each group of kernels alone in a graph, all layers.", ""]
    lines += ["| weights | kernels | ms | limit |", "| --- | --- | ---: | ---: |"]
    for scheme, found in ships["packed"].items():
        for part, ms in found["parts"].items():
            limit = found["parts_limit"].get(part)
            lines.append(f"| {scheme} | {part} | {ms:.3f} | {'' if limit is None else f'{limit:.3f}'} |")
    lines += ["", "## The search for the settings", ""]
    lines += [f"`packed-search.json`, {searched['seconds']:.0f} s by `{command} {searched['arguments']}` (commit {searched['commit']})."]
    lines += ["Whole steps at context 642; kind:rows x columns, warps, programs a multiprocessor. The best two and the worst of each.", ""]
    lines += ["| weights | linear | best | second | worst |", "| --- | --- | --- | --- | --- |"]
    for scheme, found in searched["packed"].items():
        for part in PARTS:
            tried = found[f"search {part}"]
            picked = " | ".join(f"{tried[at]['how']} {tried[at]['ms']:.3f}" for at in (0, 1, -1))
            lines.append(f"| {scheme} | {part} | {picked} |")
    (folder / "packed.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", default="int8,int4,nf4")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which no new variant is begun")
    parser.add_argument("--no-search", action="store_true", help="the shipped settings only")
    parser.add_argument("--output", default=os.environ.get("OUT", "."))
    parser.add_argument("--commit", default="unknown", help="what is measured; written into the results")
    parser.add_argument("--report", type=Path, help="only write packed.md from the JSON files in this folder")
    parser.add_argument("--precompile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.report)
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark measures one. The CPU tests are in tests/unit/test_engines_packed.py.")
    schemes = arguments.schemes.split(",")
    torch.set_grad_enabled(False)
    if arguments.precompile:
        part, parts = map(int, arguments.precompile.split("/"))
        precompile(part, parts, schemes)
        return
    BUDGET[0] = arguments.budget
    RESULTS["arguments"] = " ".join(a for a in sys.argv[1:] if not a.startswith("--output"))
    if not arguments.no_search:
        count = max(1, min(12, (os.cpu_count() or 2) - 2))
        command = [sys.executable, __file__, "--schemes", arguments.schemes, "--precompile"]
        workers = [subprocess.Popen([*command, f"{i}/{count}"], env=os.environ) for i in range(count)]
        for worker in workers:
            worker.wait()
        say("variants compiled")
    try:
        attempt("env", environment)
        for scheme in schemes:
            attempt(scheme, scheme_results, scheme, not arguments.no_search)
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        RESULTS["seconds"], RESULTS["commit"] = time.perf_counter() - BEGAN, arguments.commit
        (Path(arguments.output) / "packed.json").write_text(json.dumps(RESULTS, indent=1, default=str))
        print("\n".join(["=" * 40, *TABLE]))
        for name, failure in RESULTS["failures"].items():
            print(f"FAILED {name}: {failure['reason']}\n{failure['trace'][-600:]}")


if __name__ == "__main__":
    main()
