"""Part of benchmarks/engines.py: its JSON as Markdown tables, the limit beside every decode figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engines_common import CONTEXTS, NEW, SHAPES

LAYERS = 32


def write_report(folder: Path) -> Path:
    """engines.md beside engines.json; a search kept from another run lies beside it as engines-search.json."""
    parts = ["# Decode engines on one GPU\n"]
    for name, title in (("engines.json", "As it ships"), ("engines-search.json", "The search for the settings")):
        path = folder / name
        if path.exists():
            parts += [f"## {title}\n", *(f"{part}\n" for part in _sections(json.loads(path.read_text()), name))]
    target = folder / "engines.md"
    target.write_text("\n".join(parts))
    return target


def _sections(found: dict[str, Any], source: str) -> Iterator[str]:
    yield _environment(found, source)
    tables = {
        "Correct": _correct,
        "Engines, end to end": _engines,
        "One step": _steps,
        "Where a step's time goes": _parts,
        "Batches": _batches,
        "Quality": _quality,
        "Encode, and whole adapters": _adapters,
        "Linears": _linears,
    }
    for title, table in tables.items():
        text = table(found)
        if text:
            yield f"### {title}\n\n{text}"
    if found["failures"]:
        yield "### Failures\n\n" + "\n".join(f"- {k}: {v['reason']}" for k, v in found["failures"].items())


def _environment(found: dict[str, Any], source: str) -> str:
    env, bandwidth = found.get("env", {}), found.get("bandwidth", {})
    about = ", ".join(
        f"{label} {env[key]}"
        for key, label in (("gpu", ""), ("driver", "driver"), ("python", "Python"), ("torch", "torch"), ("triton", "triton"))
        if env.get(key)
    ).strip()
    speeds = ", ".join(f"{k.removesuffix('_gbs').replace('_', ' ')} {v:.0f}" for k, v in bandwidth.items() if v)
    command = f"python3 benchmarks/engines.py {found.get('arguments', '')}".strip()
    return (
        f"`{source}`, {found['seconds']:.0f} s by `{command}`. {about}, transformers {env.get('transformers')}. Bandwidth, GB/s: {speeds}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _limit(found: dict[str, Any], context: int, batch: int = 1) -> float:
    """ms: weights of all layers and the head, and the cache at the mean context of the decode."""
    weights = sum((2 if name == "gate_up" else 1) * n * k * (1 if name == "head" else LAYERS) for name, (n, k) in SHAPES.items())
    cache = 2 * LAYERS * batch * 4096 * (context + NEW // 2)
    return 2 * (weights + cache) / found["bandwidth"]["best_read_gbs"] / 1e6


def _correct(found: dict[str, Any]) -> str:
    tiny = found.get("tiny")
    if not tiny:
        return ""
    wrong = f"; not equal: {len(tiny['wrong'])}, all of them left-padded batches" if tiny["wrong"] else ""
    return f"Tiny fp32 models, ids equal to `generate`'s: {tiny['checked'] - len(tiny['wrong'])} of {tiny['checked']}{wrong}."


def _engines(found: dict[str, Any]) -> str:
    rows = []
    for key, run in found.get("engines", {}).items():
        name, context = key.split()
        limit = _limit(found, CONTEXTS[context])
        rows.append(
            [
                context,
                str(CONTEXTS[context]),
                name,
                f"{run['prefill_ms']:.1f}",
                f"{run['decode_ms']:.0f}",
                f"{run['total_ms']:.0f}",
                f"{run['ms_per_token']:.2f}",
                f"{limit:.2f}",
                f"{limit / run['ms_per_token']:.0%}",
                f"{run['prepare_ms']:.0f}",
                "yes" if run["same_ids_every_run"] else "no",
            ]
        )
    head = [
        "model",
        "prompt",
        "engine",
        "prefill ms",
        f"decode({NEW}) ms",
        "sum ms",
        "ms/token",
        "limit",
        "share",
        "prepare ms",
        "same ids",
    ]
    return _table(head, rows) if rows else ""


def _steps(found: dict[str, Any]) -> str:
    steps = found.get("step", {})
    limits = steps.get("limit_ms", {})
    rows = [
        [label, *(f"{value[m]:.3f} ({limits[m] / value[m]:.0%})" if value.get(m) else "-" for m in limits)]
        for label, value in steps.items()
        if isinstance(value, dict) and "config" in value
    ]
    return _table(["settings", *(f"{m}, ms (limit {ms:.2f})" for m, ms in limits.items())], rows) if rows else ""


def _parts(found: dict[str, Any]) -> str:
    read = {name: 2 * (2 if name == "gate_up" else 1) * n * k * (1 if name == "head" else LAYERS) for name, (n, k) in SHAPES.items()}
    rows = []
    for model in ("eventgpt", "video_llava"):
        cache = 4 * LAYERS * 4096 * (CONTEXTS[model] + NEW // 2)
        for name, ms in (found.get("step", {}).get(f"parts {model}") or {}).items():
            limit = (cache if name == "attention" else read.get(name, 0)) / found["bandwidth"]["best_read_gbs"] / 1e6
            rows.append([model, name, f"{ms:.3f}", f"{limit:.3f}", f"{ms - limit:.3f}"])
    return _table(["model", "kernels, all layers", "ms", "limit", "over it"], rows) if rows else ""


def _batches(found: dict[str, Any]) -> str:
    rows = []
    for batch, run in found.get("batch", {}).items():
        if "step_ms" not in run:
            others = sorted((k, v) for k, v in run.items() if k.startswith("skinny") and v)
            best = min(others, key=lambda item: item[1])
            rows.append(
                [batch, f"{run['cublas']:.2f}", f"{run['limit_ms']:.2f}", f"{run['limit_ms'] / run['cublas']:.0%}", f"{best[1]:.2f}"]
            )
            continue
        right, ms, limit = run["logits"], run["step_ms"], run["limit_ms"]
        speed = [batch, f"{ms:.2f}", f"{limit:.2f}", f"{limit / ms:.0%}", f"{int(batch) / ms * 1e3:.0f}"]
        rows.append([*speed, f"{right['agreement']:.3f}", f"{right['max_kl']:.1e}"])
    if not rows:
        return ""
    if len(rows[0]) == 5:
        return _table(["batch", "cuBLAS, ms/step", "limit", "share", "best skinny Triton product, ms/step"], rows)
    head = ["batch", "ms/step", "limit", "share", "tokens/s", "argmax agreement with one HF forward", "KL max"]
    return (
        _table(head, rows) + "\n\nPrompts of 642 tokens, rows padded by 0 to 31. A row's argmax may differ by a bf16 tie; KL is the test."
    )


def _quality(found: dict[str, Any]) -> str:
    rows = [
        [name, f"{q['agreement']:.3f}", f"{q['mean_kl']:.2e}", f"{q['max_kl']:.2e}", f"{q['relative_error']:.3f}", str(q["positions"])]
        for name, q in found.get("quality", {}).items()
    ]
    head = ["bf16 logits against fp32 in one pass", "argmax agreement", "KL mean", "KL max", "relative error", "positions"]
    return _table(head, rows) if rows else ""


def _adapters(found: dict[str, Any]) -> str:
    rows = [
        [name, f"{run['encode_eager_ms']:.2f}", f"{run['encode_graph_ms']:.2f}", "; ".join(run["runs"])]
        for name, run in found.get("adapters", {}).items()
    ]
    return _table(["model", "encode eager, ms", "encode graph, ms", "runs"], rows) if rows else ""


def _linears(found: dict[str, Any]) -> str:
    rows = [
        [key.split()[0], one["how"], f"{one['gbs']:.0f}", f"{one['error']:.1e}"]
        for key, tried in found.get("tune", {}).items()
        for one in tried[:4]
    ]
    head = ["linear", "kernel: rows x inputs, warps, stages", "GB/s", "relative error"]
    return _table(head, rows) + "\n\nThe four fastest of each, in captured chains over more matrices than the L2 holds." if rows else ""
