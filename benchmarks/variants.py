"""What settings are worth on a GPU at full size: quantisation, batches, guessing ahead, fewer visual tokens, pixels made on the device.

    PYTHONPATH=src python3 benchmarks/variants.py --budget 160       # H200; needs 70 GB of device memory

Random bf16 weights of the published shapes: times are those of real weights, answers and their quality are not. Every part is tried by
itself. Results: a table last, everything in variants.json under $OUT or --output. Inside the pipeline the same settings are the keys of
`variants` in a study's config.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines_common import BEGAN, BUDGET, RESULTS, TABLE, attempt, event_ms, out_of_time, row, say
from stagebench.engines import create
from stagebench.engines.quality import compare_logits
from stagebench.engines.scoring import forced_logits, greedy_answer
from stagebench.models import quantize
from stagebench.models.base import Decoding, ModelSpec
from stagebench.models.registry import create as create_adapter
from stagebench.stages import StageClock

NEW = 45
QUERY = "What are the key elements in this scene?"
CASES = {"llava": ("hf", 8, "grid"), "eventgpt": ("eventgpt", 5, None), "video_llava": ("hf", 8, None)}


def load(name: str, **spec: Any) -> Any:
    kind, _, frames_as = CASES[name]
    adapter = create_adapter(kind)
    with torch.inference_mode():
        adapter.load(ModelSpec("dummy:0", name, "7b", torch.bfloat16, frames_as=frames_as, **spec), "cuda")
    return adapter


def frames(name: str, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (CASES[name][1], 480, 640, 3), dtype=np.uint8))


def wall_ms(function: Any, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[1:])


def bandwidth() -> float:
    """Bytes a second of a bf16 matrix-vector product."""
    weight, x = torch.randn(32768, 8192, device="cuda", dtype=torch.bfloat16), torch.randn(8192, 1, device="cuda", dtype=torch.bfloat16)
    return weight.nbytes / (event_ms(lambda: weight @ x, 10) * 1e-3)


@torch.inference_mode()
def timed(adapter: Any, engine_name: str, batch: int = 1, runs: int = 3, case: str = "llava") -> dict[str, Any]:
    """Median of the runs after the first: prefill ms, ms a token, tokens a second over the batch, peak GB, what was accepted."""
    inputs = adapter.collate([adapter.preprocess(frames(case, seed), QUERY) for seed in range(batch)]).to("cuda", torch.bfloat16)
    features = adapter.encode(inputs)
    decoding = Decoding(NEW, NEW, adapter.eos_token_ids())
    gc.collect()  # a graph of an engine before that is freed while another is captured would spoil the capture
    engine = create(engine_name)
    info = engine.prepare(adapter, decoding, batch)
    began = time.perf_counter()
    if hasattr(engine, "admit"):
        engine.admit(adapter.merge(inputs, features), decoding)
    prepare_s = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    seen = []
    for _ in range(runs):
        clock = StageClock("cuda")
        with clock.total():
            tokens = engine.run(lambda: adapter.merge(inputs, features), decoding, clock)
        seen.append(clock.times().host_ms)
    prefill, decode = (statistics.median(t[stage] for t in seen[1:]) for stage in ("prefill", "decode"))
    found = {"prefill_ms": prefill, "ms_per_token": decode / (NEW - 1), "tokens_per_s": batch * NEW / (prefill + decode) * 1e3}
    found |= {"peak_gb": torch.cuda.max_memory_allocated() * 1e-9, "note": info.note, "prepare_s": prepare_s}
    if tokens.drafted is not None:
        found |= {"drafted": tokens.drafted, "accepted": tokens.accepted}
    return found


def text(found: dict[str, Any] | None) -> str:
    if found is None:
        return "failed"
    speed = f"prefill {found['prefill_ms']:.1f} ms  {found['ms_per_token']:.3f} ms/token  {found['tokens_per_s']:.0f} tokens/s"
    return f"{speed}  peak {found['peak_gb']:.1f} GB"


def told(found: dict[str, Any] | None) -> str:
    return "no quality" if found is None else f"KL {found['mean_kl']:.2e} max {found['max_kl']:.2e} agree {found['agreement']:.3f}"


@torch.inference_mode()
def answers(adapter: Any, name: str, samples: int = 2) -> list[tuple[list[np.ndarray], tuple[int, ...], torch.Tensor]]:
    found = []
    for seed in range(samples):
        prompt = prompt_of(adapter, frames(name, seed))
        ids = greedy_answer(adapter, prompt, 32)
        found.append((frames(name, seed), ids, forced_logits(adapter, prompt, ids).cpu()))
    return found


@torch.inference_mode()
def prompt_of(adapter: Any, given: list[np.ndarray]) -> Any:
    inputs = adapter.preprocess(given, QUERY).to("cuda", torch.bfloat16)
    return adapter.merge(inputs, adapter.encode(inputs))


def quality(adapter: Any, plain: list[Any]) -> dict[str, Any]:
    mine = torch.cat([forced_logits(adapter, prompt_of(adapter, given), ids).cpu() for given, ids, _ in plain])
    return dataclasses.asdict(compare_logits(torch.cat([logits for _, _, logits in plain]), mine))


def model(name: str, schemes: tuple[str, ...], batches: tuple[int, ...], speed: float) -> None:
    results: dict[str, Any] = RESULTS.setdefault(name, {})
    adapter = load(name)
    given = frames(name)
    plain = answers(adapter, name)

    def put(key: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        if out_of_time():
            return None
        results[key] = attempt(f"{name} {key}", function, *args, **kwargs)
        return results[key]

    for engine in ("generate", "graph", "fused"):
        row(f"{name:11} {engine:13} none  {text(put(f'{engine} none', timed, adapter, engine, case=name))}")
    if name == "llava":
        adapter.draft = create_adapter("hf")
        adapter.draft.load(ModelSpec("dummy:1", "llava", "tiny", torch.bfloat16), "cuda")
        for engine in ("prompt_lookup", "speculative"):
            found = put(engine, timed, adapter, engine, case=name)
            guesses = f"accepted {found['accepted']} of {found['drafted']}" if found else ""
            row(f"{name:11} {engine:13} none  {text(found)}  {guesses}")
        adapter.draft = None
    for batch in batches:
        for engine in ("generate", "graph"):
            if not out_of_time():
                row(f"{name:11} {engine:13} b{batch:<4} {text(put(f'{engine} b{batch}', timed, adapter, engine, batch, 2, name))}")
            gc.collect()
            torch.cuda.empty_cache()

    def pixels() -> dict[str, Any]:
        host = wall_ms(lambda: adapter.preprocess(given, QUERY), 3)
        expected = adapter.preprocess(given, QUERY).pixels
        adapter._preprocess_on_device()
        device = wall_ms(lambda: adapter.preprocess(given, QUERY), 10)
        found = adapter.preprocess(given, QUERY).pixels
        difference = torch.cat([(found[k].cpu() - expected[k]).abs().flatten() for k in expected])
        return {
            "pil_ms": host,
            "device_ms": device,
            "max_abs": float(difference.max()),
            "changed_share": float((difference > 1e-5).float().mean()),
        }

    found = put("preprocess", pixels)
    if found:
        row(
            f"{name:11} preprocess    pil {found['pil_ms']:.1f} ms  device {found['device_ms']:.2f} ms"
            f"  max {found['max_abs']:.4f}  changed {found['changed_share']:.2e}"
        )

    def half() -> dict[str, Any]:
        adapter._keep_visual(0.5)
        inputs = adapter.preprocess(given, QUERY).to("cuda", torch.bfloat16)
        encode = wall_ms(lambda: adapter.encode(inputs))
        return {
            **timed(adapter, "graph", case=name),
            "quality": quality(adapter, plain),
            "encode_ms": encode,
            "prompt": prompt_of(adapter, given).length,
        }

    found = put("keep 0.5", half)
    if found:
        row(f"{name:11} graph keep0.5 L={found['prompt']} {text(found)}  encode {found['encode_ms']:.1f}  {told(found['quality'])}")
    adapter = None  # its memory is needed
    gc.collect()
    torch.cuda.empty_cache()
    for scheme in schemes:
        if out_of_time():
            return
        attempt(f"{name} {scheme}", quantised, name, scheme, plain, results, speed)
        gc.collect()
        torch.cuda.empty_cache()


def quantised(name: str, scheme: str, plain: list[Any], results: dict[str, Any], speed: float) -> None:
    began = time.perf_counter()
    adapter = load(name, quantization=scheme)
    seconds = time.perf_counter() - began
    layers = quantize.text_layers(adapter.model)
    size = sum(p.nbytes for p in layers.parameters()) + sum(p.nbytes for p in adapter.model.get_output_embeddings().parameters())
    limit = size / speed * 1e3
    results[scheme] = {"load_s": seconds, "quantized": dataclasses.asdict(adapter.quantized), "step_bytes": size, "limit_ms": limit}
    results[scheme]["quality"] = attempt(f"{name} {scheme} quality", quality, adapter, plain)
    say(f"{name} {scheme}: loaded and compiled in {seconds:.1f} s, kernel {adapter.quantized.kernel}")
    scored = told(results[scheme]["quality"])
    for engine in ("graph", "generate"):
        if out_of_time():
            return
        found = results[scheme][engine] = attempt(f"{name} {scheme} {engine}", timed, adapter, engine, case=name)
        share = limit / found["ms_per_token"] if found else float("nan")
        row(f"{name:11} {engine:13} {scheme:5} {text(found)}  weights limit {limit:.2f} ms ({share:.0%})  {scored}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=160.0, help="seconds after which no new part is begun")
    parser.add_argument("--output", default=os.environ.get("OUT", "."))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark measures one. The variants' CPU tests are in tests/unit.")
    BUDGET[0] = arguments.budget
    torch.set_grad_enabled(False)
    import transformers

    RESULTS["env"] = {"torch": torch.__version__, "transformers": transformers.__version__, "gpu": torch.cuda.get_device_name()}
    speed = RESULTS["bandwidth"] = bandwidth()
    row(f"{RESULTS['env']}  matrix-vector {speed * 1e-9:.0f} GB/s")
    try:
        attempt("llava", model, "llava", ("int8", "int4", "nf4"), (4, 16, 32), speed)
        attempt("eventgpt", model, "eventgpt", ("int8",), (), speed)
        attempt("video_llava", model, "video_llava", ("int8",), (), speed)
    finally:
        RESULTS["seconds"] = time.perf_counter() - BEGAN
        (Path(arguments.output) / "variants.json").write_text(json.dumps(RESULTS, indent=1, default=str))
        print("\n".join(["=" * 40, *TABLE]))
        for name, failure in RESULTS["failures"].items():
            print(f"FAILED {name}: {failure['reason']}\n{failure['trace'][-700:]}")


if __name__ == "__main__":
    main()
