"""Two models on one GPU at once: what "parallel prefill" hides, measured with both at work and not by arithmetic.

    PYTHONPATH=src python3 benchmarks/overlap.py          # H200; needs 40 GB of device memory, about 40 s

The idea: while the target (Video-LLaVA) prefills, a faster model (EventGPT, or a small draft) already answers, its tokens for free.
Both models' work is captured (engine `fused`) and replayed by two host threads on two CUDA streams. Each row: A alone, B alone, their
sum, both together, and how much slower each became. Overlap is worth something where `together` is well below `sum`.
Results: a table last, everything in overlap.json under $OUT or --output, and as a table in overlap.md beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines_common import BEGAN, NEW, RESULTS, TABLE, attempt, row, say
from engines_linears import environment

QUERY = "What are the key elements in this scene?"
Work = Callable[[], None]


class Ready:
    """A model whose encode, prefill and steps are captured and can be replayed in any order."""

    def __init__(self, kind: str, name: str, preset: str, count: int) -> None:
        from stagebench.engines import create
        from stagebench.models.base import Decoding, ModelSpec
        from stagebench.models.registry import create as create_adapter

        adapter = create_adapter(kind)
        adapter.load(ModelSpec("dummy:0", name, preset, torch.bfloat16), "cuda")
        frames = list(np.random.default_rng(0).integers(0, 256, (count, 480, 640, 3), dtype=np.uint8))
        self.decoding = Decoding(NEW, NEW, adapter.eos_token_ids())
        self.engine: Any = create("fused")
        info = self.engine.prepare(adapter, self.decoding, 1)
        inputs = adapter.preprocess(frames, QUERY).to("cuda", torch.bfloat16)
        features = adapter.encode(inputs)
        self.prompt = adapter.merge(inputs, features)
        self.engine.admit(self.prompt, self.decoding)
        self.session, _ = self.engine._session(self.prompt, self.decoding)
        self.adapter, self.note = adapter, info.note
        self.session.prefill(self.prompt, False, self.decoding)
        state = self.session.state
        self._counters = [state.slot, state.positions, state.count, state.done, state.token]
        self._saved = [t.clone() for t in self._counters]
        self._steps = self.session.parts
        self._encode = next(iter(self.engine.encoder._known.values()))[1] if self.engine.encoder else lambda: None
        self._prefill = self.session.prefills[(self.prompt.length, False)]

    def encode(self) -> None:
        self._encode()

    def prefill(self) -> None:
        self.session.state.begin(self.prompt, self.decoding)
        self._prefill(self.prompt)

    def steps(self, count: int) -> Work:
        """`count` tokens after the prefill, from the same counters each time."""

        def work() -> None:
            for counter, value in zip(self._counters, self._saved, strict=True):
                counter.copy_(value)
            for _ in range(count):
                for part in self._steps:
                    part()

        return work

    def whole(self) -> None:
        self.encode()
        self.prefill()
        for _ in range(NEW - 1):
            for part in self._steps:
                part()


def once(works: list[Work]) -> tuple[float, list[float]]:
    """Host ms until all are done, and each one's own ms on its stream; they start together."""
    streams = [torch.cuda.Stream() for _ in works]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in works]
    barrier = threading.Barrier(len(works) + 1)
    failures: list[BaseException] = []

    def run(work: Work, stream: Any, events: list[Any]) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(stream):
                barrier.wait()
                events[0].record()
                work()
                events[1].record()
                stream.synchronize()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=each) for each in zip(works, streams, marks, strict=True)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    wall = (time.perf_counter() - began) * 1e3
    if failures:
        raise failures[0]
    return wall, [begin.elapsed_time(end) for begin, end in marks]


def median(works: list[Work], repeats: int = 7) -> tuple[float, list[float]]:
    runs = [once(works) for _ in range(repeats + 1)][1:]
    return statistics.median(wall for wall, _ in runs), [statistics.median(own[at] for _, own in runs) for at in range(len(works))]


def compare(name: str, a: Work, b: Work, tokens: int | None = None) -> None:
    alone_a, alone_b = median([a])[0], median([b])[0]
    together, (own_a, own_b) = median([a, b])
    found = {
        "a_ms": alone_a,
        "b_ms": alone_b,
        "sum_ms": alone_a + alone_b,
        "together_ms": together,
        "together_over_sum": together / (alone_a + alone_b),
    }
    found |= {"a_in_company_ms": own_a, "b_in_company_ms": own_b, "a_slowdown": own_a / alone_a, "b_slowdown": own_b / alone_b}
    RESULTS.setdefault("overlap", {})[name] = found | {"b_tokens": tokens}
    row(
        f"{name:58} A {alone_a:7.1f}  B {alone_b:7.1f}  sum {alone_a + alone_b:7.1f}  together {together:7.1f}"
        f" ({together / (alone_a + alone_b):.2f} of sum)  A x{own_a / alone_a:.2f}  B x{own_b / alone_b:.2f}"
    )


@torch.inference_mode()
def measure() -> None:
    target = Ready("hf", "video_llava", "7b", 8)
    say(f"target: prompt {target.prompt.length}, note {target.note}")
    event = Ready("eventgpt", "eventgpt", "7b", 5)
    draft = Ready("hf", "llava", "tiny", 1)
    say(f"EventGPT: prompt {event.prompt.length}; small draft: prompt {draft.prompt.length}")
    hidden = max(1, round(median([target.prefill])[0] / median([event.steps(8)])[0] * 8))
    RESULTS["tokens_that_fit_into_prefill_alone"] = hidden
    compare("A prefills, B decodes", target.prefill, event.steps(hidden), hidden)
    compare(
        "A encodes and prefills, B encodes and prefills",
        lambda: (target.encode(), target.prefill()),
        lambda: (event.encode(), event.prefill()),
    )
    compare("A decodes 44 tokens, B decodes 44 tokens", target.steps(44), event.steps(44), 44)
    compare("A whole (45 tokens), B whole (45 tokens)", target.whole, event.whole, 45)
    compare("A prefills, B is a tiny draft and decodes 44 tokens", target.prefill, draft.steps(44), 44)
    compare("A decodes 44 tokens, B is a tiny draft and decodes 44 tokens", target.steps(44), draft.steps(44), 44)


def report(path: Path) -> None:
    """overlap.md from overlap.json."""
    found = json.loads((path / "overlap.json").read_text())
    env = found["env"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("driver", "torch", "triton", "transformers"))
    lines = [
        "# Two models on one GPU at once",
        "",
        f"`overlap.json`, {found['seconds']:.0f} s by `PYTHONPATH=src python3 benchmarks/overlap.py` (commit {found['commit']}).",
        f"{env['gpu']}, {versions}.",
        "A is Video-LLaVA, B EventGPT where nothing else is said, both at 7B shapes, random bf16 weights, engine `fused`,",
        "two host threads on two CUDA streams. Medians of 7 after a first.",
        "",
        "| together | A alone ms | B alone ms | sum ms | both ms | both / sum | A slower by | B slower by |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, f in found["overlap"].items():
        label = name if f["b_tokens"] is None or "tokens" in name else f"{name} {f['b_tokens']} tokens"
        numbers = f"{f['a_ms']:.1f} | {f['b_ms']:.1f} | {f['sum_ms']:.1f} | {f['together_ms']:.1f} | {f['together_over_sum']:.2f}"
        lines.append(f"| {label} | {numbers} | {f['a_slowdown']:.2f} | {f['b_slowdown']:.2f} |")
    (path / "overlap.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=os.environ.get("OUT", "."))
    parser.add_argument("--commit", default="unknown", help="what is measured; written into the results")
    parser.add_argument("--report", help="only write overlap.md from overlap.json in this folder")
    arguments = parser.parse_args()
    if arguments.report:
        report(Path(arguments.report))
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark measures one.")
    torch.set_grad_enabled(False)
    try:
        attempt("env", environment)
        attempt("overlap", measure)
    finally:
        gc.collect()
        RESULTS["seconds"], RESULTS["commit"] = time.perf_counter() - BEGAN, arguments.commit
        (Path(arguments.output) / "overlap.json").write_text(json.dumps(RESULTS, indent=1, default=str))
        print("\n".join(["=" * 40, *TABLE]))
        for name, failure in RESULTS["failures"].items():
            print(f"FAILED {name}: {failure['reason']}\n{failure['trace'][-900:]}")


if __name__ == "__main__":
    main()
