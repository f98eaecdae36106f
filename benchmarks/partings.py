"""Where greedy decodings of one prompt part below float32, and how far apart the judge then finds the two tokens' logits.

    PYTHONPATH=src python3 benchmarks/partings.py                               # the three models at their published shapes, bf16, a GPU
    PYTHONPATH=src python3 benchmarks/partings.py --preset tiny --device cpu    # anywhere; a CPU's decodings do not part

The bound of models/ties.py stands on this: each prompt is decoded several times by engine `generate`, with and without synchronisation in
turn, and at each place where two texts part the model is asked as often as the judge would ask it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import torch

from stagebench import engines
from stagebench.models import registry, ties
from stagebench.models.base import Adapter, Decoding, ModelSpec
from stagebench.stages import StageClock

MODELS = {"eventgpt": ("eventgpt", 5, None), "llava": ("hf", 8, "grid"), "video_llava": ("hf", 8, None)}
"""Architecture -> adapter, frames, frames_as."""
DECODINGS, TOKENS, PLACES = 6, 24, 4


def partings(adapter: Adapter, seed: int, frames: int) -> Iterator[tuple[int, list[float]]]:
    """(step, logit of the one token less that of the other in each pass, in standard deviations) of each place where texts part."""
    rng = np.random.default_rng(seed)
    pixels = [rng.integers(0, 255, (480, 640, 3), dtype=np.uint8) for _ in range(frames)]
    inputs = adapter.preprocess(pixels, "What is happening in this scene?").to(adapter.device, adapter.spec.dtype)
    features = adapter.encode(inputs)
    decoding = Decoding(TOKENS, TOKENS, eos_token_ids=tuple(adapter.eos_token_ids()))
    engine = engines.create("generate")
    engine.prepare(adapter, decoding, 1)
    texts = []
    for number in range(DECODINGS):
        clock = StageClock(adapter.device, sync=bool(number % 2))
        with clock.total():
            texts.append(engine.run(lambda: adapter.merge(inputs, features), decoding, clock).ids[0])
    prompt = adapter.merge(inputs, features)
    places: dict[tuple[tuple[int, ...], frozenset[int]], tuple[int, int]] = {}
    for a, b in combinations(dict.fromkeys(texts), 2):
        step = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        places.setdefault((tuple(a[:step]), frozenset((a[step], b[step]))), (a[step], b[step]))
    for (before, _), (one, other) in list(places.items())[:PLACES]:
        yield len(before), [ties.gap_after(adapter, prompt, before, one, other) for _ in range(ties.PASSES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seeds", type=int, default=2, help="prompts a model")
    parser.add_argument("--quantization", default="none")
    arguments = parser.parse_args()
    print("| model | prompt | parts at token | gap in each pass | mean | deviation |\n| --- | ---: | ---: | --- | ---: | ---: |")
    for name, (kind, frames, frames_as) in MODELS.items():
        adapter = registry.create(kind)
        spec = ModelSpec("dummy:0", name, arguments.preset, torch.bfloat16, frames_as=frames_as, quantization=arguments.quantization)
        with torch.inference_mode():
            adapter.load(spec, arguments.device)
            for seed in range(arguments.seeds):
                for step, gaps in partings(adapter, seed, frames):
                    each = " ".join(f"{gap:+.3f}" for gap in gaps)
                    print(
                        f"| {name} | {seed} | {step} | {each} | {statistics.fmean(gaps):+.3f} | {statistics.stdev(gaps):.3f} |", flush=True
                    )
        del adapter
        gc.collect()


if __name__ == "__main__":
    main()
