"""The reference engine: one call of the model's own `generate` on the embedded prompt.

Prefill ends where a synchronising logits processor sees the first logits; everything after that mark is decode. The
sampling loop is transformers' own, so its host overhead (which is most of a 7B model's decode time on a fast GPU) is
measured as users meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from stagebench.engines.base import EngineInfo
from stagebench.errors import ModelError
from stagebench.models.base import Adapter, Decoding, Prompt, Tokens
from stagebench.stages import StageClock

__all__ = ["GenerateEngine", "cache_bytes", "cut_at_eos", "generation_config"]


class GenerateEngine:
    """`generate` as transformers has it, eager, dynamic cache."""

    name = "generate"

    def __init__(self) -> None:
        self._model: Any = None

    def prepare(self, adapter: Adapter, decoding: Decoding, batch: int) -> EngineInfo:
        """Nothing is captured or compiled. Raises ModelError when the language model has no `generate`."""
        model = adapter.language_model()
        if not callable(getattr(model, "generate", None)):
            raise ModelError(
                f"{type(model).__name__}: no generate method, which engine generate calls. Set variants.engine to one that steps itself."
            )
        self._model = model
        return EngineInfo(self.name)

    @torch.inference_mode()
    def run(self, merge: Callable[[], Prompt], decoding: Decoding, clock: StageClock) -> Tokens:
        """Prefill and decode on the clock: ids [B][n] of new tokens, EOS included.

        Raises ModelError when `prepare` was not called.
        """
        if self._model is None:
            raise ModelError("engine generate ran before prepare: call prepare(adapter, decoding, batch) once per model")
        if decoding.temperature > 0:
            torch.manual_seed(decoding.seed)
        mark = _PrefillMark(clock, sampled=decoding.temperature > 0)
        clock.begin("prefill")
        prompt = merge()
        output = self._model.generate(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention_mask,
            # from embeds alone generate would count text positions, which is another model where images have 3-D ones (M-RoPE)
            position_ids=prompt.position_ids,
            generation_config=generation_config(decoding),
            logits_processor=[mark],
            stopping_criteria=[_TokenMark(clock)],
            **prompt.extra,
        )
        # ids on the host are the stage's product, so their copy belongs to it
        rows = output.sequences.tolist()
        clock.end()
        if "input_ids" in prompt.extra:  # with ids given, generate returns prompt and new tokens; from embeds alone, new tokens only
            rows = [row[prompt.length :] for row in rows]
        ids = tuple(cut_at_eos(row, decoding.eos_token_ids) for row in rows)
        return Tokens(
            ids=ids,
            finish_reasons=tuple("eos" if row and row[-1] in decoding.eos_token_ids else "length" for row in ids),
            kv_bytes=cache_bytes(output.past_key_values),
            nan=mark.not_finite(),
        )


def generation_config(decoding: Decoding) -> GenerationConfig:
    """Settings of one `generate` call, every one that could change the tokens stated.

    transformers fills what is unset from the checkpoint's generation_config.json; a repetition penalty or a temperature
    that came in that way would make one model's decoding another than the next one's.
    """
    sampled = decoding.temperature > 0
    eos = list(decoding.eos_token_ids)
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens,
        do_sample=sampled,
        temperature=decoding.temperature if sampled else 1.0,
        top_p=decoding.top_p if sampled else 1.0,
        top_k=0 if sampled else 50,  # 0 is off; without sampling it is not read, and anything but the default warns
        typical_p=1.0,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        return_dict_in_generate=True,
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
    )


def cut_at_eos(row: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """A row's ids up to and with its first EOS: what follows in a batch is padding."""
    for position, token in enumerate(row):
        if token in eos_token_ids:
            return tuple(row[: position + 1])
    return tuple(row)


def cache_bytes(cache: Any) -> int | None:
    """Bytes of keys and values that a transformers cache holds; None when it does not show its layers."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    tensors = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


class _PrefillMark(LogitsProcessor):
    """Moves the clock from prefill to decode at the first logits, and notes on the device whether any row had none finite."""

    def __init__(self, clock: StageClock, *, sampled: bool) -> None:
        self._clock = clock
        self._sampled = sampled
        self._first = True
        self._bad: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._first:
            self._first = False
            self._clock.switch("decode")
        # The largest logit is NaN if any is, and +inf if any is. -inf alone is legitimate: it is how EOS is held back
        # for fixed lengths. Kept on the device: reading it here would stall every token.
        bad = ~torch.isfinite(scores.amax())
        self._bad = bad if self._bad is None else self._bad | bad
        # sampling from NaN is a device-side assert on CUDA, which would end the process rather than the sample
        return torch.nan_to_num(scores, nan=0.0, posinf=1e4, neginf=-torch.inf) if self._sampled else scores

    def not_finite(self) -> bool:
        return self._bad is not None and bool(self._bad.item())


class _TokenMark(StoppingCriteria):
    """Tells the clock of each token after the first; never stops anything."""

    def __init__(self, clock: StageClock) -> None:
        self._clock = clock
        self._seen = 0
        self._go_on: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._seen += 1
        if self._seen > 1:
            self._clock.token()
        if self._go_on is None:
            self._go_on = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self._go_on
