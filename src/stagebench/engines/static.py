"""Engine `static`: transformers' own `generate` with a StaticCache, its step compiled by torch.compile on CUDA.

The settings are transformers' defaults for `cache_implementation="static"`; the first call at a prompt length compiles
(24-30 s measured on an H200), which `admit` does outside the timed window. Prefill stays eager.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from stagebench.engines.base import EngineInfo
from stagebench.engines.generate import GenerateEngine, _PrefillMark, _TokenMark, cache_bytes, cut_at_eos, generation_config
from stagebench.errors import ModelError
from stagebench.models.base import Adapter, Decoding, Prompt, Tokens
from stagebench.stages import StageClock

__all__ = ["StaticEngine"]


class StaticEngine(GenerateEngine):
    """`generate` with a static cache; compiled on CUDA only."""

    name = "static"

    def __init__(self) -> None:
        super().__init__()
        self.prepare_ms: dict[str, float] = {}
        self.late: list[str] = []
        """What was compiled inside a timed run, because nobody called `admit`."""
        self._warm: set[tuple[int, int, int, bool]] = set()

    def prepare(self, adapter: Adapter, decoding: Decoding, batch: int) -> EngineInfo:
        super().prepare(adapter, decoding, batch)
        note = None if adapter.device.type == "cuda" else "no CUDA device: static cache without compilation"
        return EngineInfo(self.name, self.prepare_ms, note)

    def admit(self, prompt: Prompt, decoding: Decoding) -> dict[str, float]:
        """Compile for this prompt's length and number of new tokens (transformers sizes the cache by their sum)."""
        key = _shape(prompt, decoding)
        if key in self._warm:
            return {}
        self._warm.add(key)
        began = time.perf_counter()
        clock = StageClock(prompt.embeds.device)
        with clock.total():
            self.run(lambda: prompt, decoding, clock)
        spent = {f"compile {key[0]}x{key[1]}+{key[2]}": (time.perf_counter() - began) * 1e3}
        self.prepare_ms.update(spent)
        return spent

    @torch.inference_mode()
    def run(self, merge: Callable[[], Prompt], decoding: Decoding, clock: StageClock) -> Tokens:
        """As engine generate, with a static cache. Raises ModelError when `prepare` was not called."""
        if self._model is None:
            raise ModelError("engine static ran before prepare: call prepare(adapter, decoding, batch) once per model")
        if decoding.temperature > 0:
            torch.manual_seed(decoding.seed)
        config = generation_config(decoding)
        config.cache_implementation = "static"
        mark = _PrefillMark(clock, sampled=decoding.temperature > 0)
        clock.begin("prefill")
        prompt = merge()
        key = _shape(prompt, decoding)
        if key not in self._warm:
            self._warm.add(key)
            self.late.append(f"compile {key[0]}x{key[1]}+{key[2]}")
        output = self._model.generate(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention_mask,
            generation_config=config,
            logits_processor=[mark],
            stopping_criteria=[_TokenMark(clock)],
            **prompt.extra,
        )
        rows = output.sequences.tolist()
        clock.end()
        if "input_ids" in prompt.extra:
            rows = [row[prompt.length :] for row in rows]
        ids = tuple(cut_at_eos(row, decoding.eos_token_ids) for row in rows)
        reasons = tuple("eos" if row and row[-1] in decoding.eos_token_ids else "length" for row in ids)
        return Tokens(ids=ids, finish_reasons=reasons, kv_bytes=cache_bytes(output.past_key_values), nan=mark.not_finite())


def _shape(prompt: Prompt, decoding: Decoding) -> tuple[int, int, int, bool]:
    """What transformers compiles anew for."""
    return (int(prompt.embeds.shape[0]), prompt.length, decoding.max_new_tokens, decoding.temperature > 0)
