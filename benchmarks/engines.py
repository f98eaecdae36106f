"""Decode engines on a GPU at full size: checks, then times, every engine and every variant of the fused step.

    PYTHONPATH=src python3 benchmarks/engines.py            # about 6 minutes on an H200; needs 60 GB of device memory
    PYTHONPATH=src python3 benchmarks/engines.py --sections env,step --budget 240

Random bf16 weights at the shape of LLaVA-1.5's decoder (LLaMA-2-7B, vocabulary 32064). Each part is tried by itself; one
that fails prints its reason and the rest goes on. Results: a table last, everything in engines.json under $OUT or --output, and as
tables in engines.md beside it. docs/results/engines.md is made so:

    python3 benchmarks/engines.py --report docs/results
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engines_common import BEGAN, BUDGET, CONTEXTS, RESULTS, TABLE, attempt, say
from engines_linears import environment, precompile, start_workers, tune
from engines_report import write_report
from engines_runs import adapters, batches, encoder, engine_times, quality, tiny_equality
from engines_step import build_model, search_step

# --- main -------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default="env,tiny,tune,step,engines,quality,batch,encode,adapters")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no new variant is begun")
    parser.add_argument("--static", action="store_true", help="also engine static, which compiles for half a minute")
    parser.add_argument("--engines", default="fused,graph,generate", help="those of section engines")
    parser.add_argument("--no-search", action="store_true", help="section step measures the shipped settings only")
    parser.add_argument("--report", help="only write engines.md from the JSON files in this folder")
    parser.add_argument("--output", default=os.environ.get("OUT", "."))
    parser.add_argument("--precompile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.report:
        print(write_report(Path(arguments.report)))
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark measures one. The engines' CPU tests are tests/unit/test_engines_*.py.")
    if arguments.precompile:
        part, parts = map(int, arguments.precompile.split("/"))
        precompile(part, parts)
        return
    BUDGET[0] = arguments.budget
    sections = arguments.sections.split(",")
    torch.manual_seed(0)
    RESULTS["arguments"] = re.sub(r"--output[ =]\S+ ?", "", " ".join(sys.argv[1:])).strip()
    workers = attempt("workers", start_workers) if "tune" in sections else None
    try:
        run_sections(sections, workers, arguments)
    finally:
        chosen = RESULTS.pop("chosen", {})
        RESULTS["chosen"] = {k: dataclasses.asdict(v) for k, v in chosen.items()}
        RESULTS["seconds"] = time.perf_counter() - BEGAN
        path = Path(arguments.output) / "engines.json"
        path.write_text(json.dumps(RESULTS, indent=1, default=str))
        attempt("report", write_report, path.parent)
        print("\n" + "=" * 40 + " summary " + "=" * 40)
        print("\n".join(TABLE))
        for where, config in RESULTS["chosen"].items():
            print(f"chosen {where}: " + " ".join(f"{k}={tuple(v.values()) if isinstance(v, dict) else v}" for k, v in config.items()))
        print(
            f"failures: {len(RESULTS['failures'])}: "
            + "; ".join(f"{k}: {v['reason'][:140]}" for k, v in list(RESULTS["failures"].items())[:12])
        )
        print(f"{RESULTS['seconds']:.0f} s; full numbers in {path}")


def run_sections(sections: list[str], workers: Any, arguments: argparse.Namespace) -> None:
    ranking = chosen = model = None
    if "tiny" in sections:
        attempt("tiny", tiny_equality)
    if workers:
        for worker in workers:
            attempt("worker", worker.wait, max(1.0, 150.0 - (time.perf_counter() - BEGAN)))
            if worker.poll() is None:
                worker.kill()
        say("variants compiled")
    if "env" in sections:  # after the workers, which share the device
        attempt("env", environment)
    if "tune" in sections:
        ranking = attempt("tune", tune, 16, True)
    if {"step", "engines", "quality", "batch"} & set(sections):
        model = attempt("model", build_model)
    if model is not None:
        if "step" in sections:
            attempt("step", search_step, model, ranking, not arguments.no_search)
            chosen = RESULTS.get("chosen")
        if "engines" in sections:
            for context, name in itertools.product(CONTEXTS, arguments.engines.split(",")):
                attempt(f"engine {name} {context}", engine_times, model, name, context, chosen, 2 if name == "generate" else 5)
            if arguments.static:
                attempt("engine static", engine_times, model, "static", "eventgpt", chosen, 3)
        if "quality" in sections:
            attempt("quality", quality, model, chosen)
        if "batch" in sections:
            attempt("batch", batches, model)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    if "encode" in sections:
        attempt("encode", encoder)
    if "adapters" in sections:
        attempt("adapters", adapters)


if __name__ == "__main__":
    main()
