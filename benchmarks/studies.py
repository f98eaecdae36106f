"""Several studies in one process, one after the other: what Snakemake does job by job, without its start-up costs. For a GPU on loan.

    PYTHONPATH=src python3 benchmarks/studies.py config/quantization_7b.yaml config/batches_7b.yaml --budget 500

Extraction, verification, timing jobs, merge and report are the pipeline's own functions, and a result is where Snakemake would put it;
what is there already is kept, so a run that was cut short goes on when called again. After --budget seconds no further job is begun.
"""

from __future__ import annotations

import argparse
import gc
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.0f}s] {text}", flush=True)


def clean() -> None:
    """A dead job's model and graphs are gone before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_models() -> None:
    """Timing jobs whose models are alike share one: an engine leaves a model as it found it, and loading is most of a short job."""
    from stagebench.session import job as jobs
    from stagebench.session.model import load_adapter, model_spec

    kept: dict[str, Any] = {}

    def load(config: Any, job: Any, *, device: str) -> Any:
        key = f"{config.models[job.model].adapter} {model_spec(config, job, device)}"
        drafted = job.variant.settings["engine"] == "speculative"  # a draft comes with its job, and goes with it
        if drafted or key not in kept:
            kept.clear()
            clean()
            loaded = load_adapter(config, job, device=device)
            if drafted:
                return loaded
            kept[key] = loaded
        return kept[key]

    jobs.load_adapter = load


def study(configfile: Path, results: Path, cache: Path, budget: float, skip_verify: bool, only: re.Pattern[str]) -> list[str]:
    """Run one, of its timing jobs those whose paths match; what went wrong or was left over."""
    from stagebench.config import load_config
    from stagebench.extract import extract_shard
    from stagebench.merge import merge
    from stagebench.plan import build_plan
    from stagebench.session import run_job
    from stagebench.standalone import stands
    from stagebench.verify import run_verify

    config = load_config(configfile)
    results = results / config.study
    plan = build_plan(config, cache)
    plan.write(results / "plan.json")
    for shard in plan.shards:
        output = cache / f"{shard.name}.parquet"
        if not output.exists():
            extract_shard(plan, shard, output, cache=cache)
    wrong: list[str] = []
    say(f"{config.study}: {len(plan.jobs)} jobs, {len(plan.verify_paths)} proofs")
    for proof in [] if skip_verify else plan.verify_paths:
        if not (results / proof).exists() and time.perf_counter() - BEGAN < budget:
            try:
                run_verify(plan, plan.verify_job(proof), results / proof, cache=cache)
            except Exception as error:
                wrong.append(f"{config.study} {proof}: {type(error).__name__}: {str(error)[:300]}")
            clean()
    say(f"{config.study}: verified")
    for job in plan.jobs:
        output = results / job.path
        if not only.search(job.path) or (output.exists() and stands(output, plan.timing_fingerprint(job))):
            continue
        if time.perf_counter() - BEGAN > budget:
            wrong.append(f"{config.study}: out of time before {job.path}")
            break
        began = time.perf_counter()
        try:
            run_job(plan, job, output, cache=cache)
        except Exception as error:
            wrong.append(f"{config.study} {job.path}: {type(error).__name__}: {str(error)[:300]}")
        clean()
        say(f"{config.study} {job.path}: {time.perf_counter() - began:.1f} s")
    try:
        merge(plan, results)
        from stagebench.report import write_report  # its libraries are not everywhere

        write_report(results)
    except Exception as error:
        wrong.append(f"{config.study} merge: {type(error).__name__}: {str(error)[:300]}")
    return wrong


def table(results: Path) -> str:
    """Medians of every timing file below a study's folder, also of a study that was cut short. A batch's times are the batch's."""
    import polars as pl

    lines = ["| model | engine | settings | n | status | prompt | encode ms | prefill ms | ms a token | tokens/s | ms a sample |"]
    lines[0] += " share of limit | weights GB | KV GB | peak GB |"
    lines.append("| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    frames = [pl.read_parquet(path) for path in sorted(results.glob("timings/*/*/*/*.parquet"))]
    for frame in sorted(frames, key=lambda frame: frame.select("model", "engine", "batch").row(0)):
        first = frame.row(0, named=True)
        usual = {"quantization": "none", "attention": "sdpa", "preprocess": "pil", "keep_visual": 1.0, "batch": 1}
        settings = ", ".join(f"{name} {first[name]}" for name, plain in usual.items() if first[name] != plain) or "–"
        status = " ".join(f"{row['count']} {row['status']}" for row in frame["status"].value_counts().sort("status").iter_rows(named=True))
        ok = frame.filter(pl.col("status") == "ok")
        head = f"| {first['model']} | {first['engine']} | {settings} | {ok['sample'].n_unique()} | {status} |"
        if ok.is_empty():
            lines.append(head + " – |" * 10)
            continue
        batch, new = first["batch"], ok["new_tokens"][0]
        encode, prefill, decode, total = (float(ok[name].median() or 0) for name in ("encode_ms", "prefill_ms", "decode_ms", "total_ms"))
        peak = max(int(ok[name].max() or 0) for name in ("encode_peak_bytes", "prefill_peak_bytes", "decode_peak_bytes")) * 1e-9
        lines.append(
            f"{head} {ok['prompt_tokens'][0]} | {encode:.2f} | {prefill:.1f} | {decode / (new - 1):.3f} |"
            f" {batch * new / (prefill + decode) * 1e3:.0f} |"
            f" {total / batch:.1f} | {float(ok['share_of_limit'].median() or 0):.0%} | {first['weights_bytes'] * 1e-9:.2f} |"
            f" {ok['kv_bytes'][0] * 1e-9:.2f} | {peak:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configfiles", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no job is begun")
    parser.add_argument(
        "--table", action="store_true", help="only print medians of the studies whose results folders are given as configfiles"
    )
    parser.add_argument("--skip-verify", action="store_true")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="regular expression on the paths of timing jobs")
    parser.add_argument("--keep-models", action="store_true", help="load a model once for all its timing jobs")
    parser.add_argument("--memory-gb", type=float, help="as if the device had only this much memory: to see out-of-memory rows")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if arguments.table:
        print("\n\n".join(table(path) for path in arguments.configfiles))
        return
    if arguments.memory_gb:
        import torch

        torch.cuda.set_per_process_memory_fraction(arguments.memory_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    if arguments.keep_models:
        keep_models()
    wrong = [
        w
        for path in arguments.configfiles
        for w in study(path, arguments.results, arguments.cache, arguments.budget, arguments.skip_verify, arguments.only)
    ]
    for each in wrong:
        say(f"WRONG {each}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
