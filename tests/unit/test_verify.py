"""verify passes for the three models and fails for each wrong way to cut one."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagebench import verify
from stagebench.errors import VerifyError
from stagebench.models.base import Adapter, Features, Inputs, ModelSpec, Prompt
from stagebench.models.hooks import VisionTimingHooks
from stagebench.models.registry import create
from stagebench.verify import VerifyReport, read_report, verify_model

QUERY = "What are the key elements in this scene?"
MODELS = {
    "eventgpt": ("eventgpt", None, 5),
    "video_llava": ("hf", None, 8),
    "llava": ("hf", "grid", 8),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def adapter_of(name: str) -> Adapter:
    kind, frames_as, _ = MODELS[name]
    adapter = create(kind)
    adapter.load(ModelSpec(weights="dummy:0", architecture=name, preset="tiny", frames_as=frames_as), "cpu")
    return adapter


def frames_of(name: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(MODELS[name][2])]


def report_of(adapter: Adapter, name: str) -> VerifyReport:
    return verify_model(adapter, frames_of(name), QUERY, model=name, tokens=8)


def failed(report: VerifyReport) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_as_shipped_pass_every_check(name: str, tmp_path: Path) -> None:
    report = report_of(adapter_of(name), name)
    assert report.passed, [check for check in report.checks if not check.passed]
    report.write(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True


def test_adaptor_applied_twice_is_caught() -> None:
    """The old five-stage script: features went through the adaptor in encode and again in generate."""
    adapter = adapter_of("eventgpt")
    encode, merge = adapter.encode, adapter.merge

    def twice(inputs: Inputs, features: Features) -> Prompt:
        adaptor = next(m for n, m in adapter.language_model().named_modules() if n.endswith("feature_adaptor"))
        return merge(inputs, replace(features, embeds=tuple(adaptor(e) for e in features.embeds)))

    adapter.encode, adapter.merge = encode, twice  # type: ignore[method-assign]
    report = report_of(adapter, "eventgpt")
    assert {"logits equal", "features reused"} <= failed(report)
    with pytest.raises(VerifyError, match="feature_adaptor"):
        report.raise_if_failed()


@pytest.mark.parametrize("name", ["eventgpt", "video_llava"])
def test_features_of_one_frame_are_caught(name: str) -> None:
    """The old cached path: frame 0 stood for all."""
    adapter = adapter_of(name)
    encode = adapter.encode

    def first_frame_only(inputs: Inputs) -> Features:
        pixels: dict[str, Any] = {}
        for key, value in inputs.pixels.items():
            same = value.clone()
            frame_dim = value.dim() - 4
            first = value.select(frame_dim, 0)
            for i in range(value.shape[frame_dim]):
                same.select(frame_dim, i).copy_(first)
            pixels[key] = same
        return encode(replace(inputs, pixels=pixels))

    adapter.encode = first_frame_only  # type: ignore[method-assign]
    assert {"logits equal", "every frame counts"} <= failed(report_of(adapter, name))


@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_called_again_in_decode_is_caught(name: str) -> None:
    adapter = adapter_of(name)
    merge = adapter.merge

    def encode_again(inputs: Inputs, features: Features) -> Prompt:
        return merge(inputs, adapter.encode(inputs))

    adapter.merge = encode_again  # type: ignore[method-assign]
    report = report_of(adapter, name)
    assert {"one encoder call", "features reused"} <= failed(report)


def test_hooks_that_cost_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing hooks that slow the tower by 3 ms would be charged to encode wherever they are on."""

    class Slow(VisionTimingHooks):
        def register_hooks(self) -> None:
            super().register_hooks()
            self._slow = adapter.vision_module().register_forward_pre_hook(lambda *_: time.sleep(0.003))

        def unregister_hooks(self) -> None:
            super().unregister_hooks()
            if hasattr(self, "_slow"):
                self._slow.remove()

    adapter = adapter_of("llava")
    monkeypatch.setattr(verify, "VisionTimingHooks", Slow)
    monkeypatch.setattr(verify, "HOOKS_SECONDS", 1.0)
    found = next(c for c in report_of(adapter, "llava").checks if c.name == "hooks cost nothing")
    assert not found.passed and "with hooks" in found.detail


@pytest.mark.parametrize(
    ("cost", "noise", "low", "high"),
    [(0.0, "exponential", 0.99, 1), (0.02, "exponential", 0, 0.05), (0.02, "spikes", 0, 0.1), (0.03, "gauss", 0, 0.1)],
)
def test_what_hooks_cost_is_told_from_noise(cost: float, noise: str, low: float, high: float) -> None:
    """200 proofs of an encode of 30 ms on a simulated host: 3 % exponential noise; 1 % and now and then 30 %; 3 % Gaussian."""
    rng = np.random.default_rng(0)
    noises = {
        "exponential": lambda: rng.exponential(0.03),
        "spikes": lambda: rng.normal(0, 0.01) + (rng.random() < 0.3) * rng.exponential(0.3),
        "gauss": lambda: rng.normal(0, 0.03),
    }
    clock = [0.0]

    def encode_ms(hooked: bool) -> float:
        ms = 30.0 * (1 + cost * hooked + float(noises[noise]()))
        clock[0] += ms * 1e-3
        return ms

    passed = [verify._costs_nothing(encode_ms, 20.0, lambda: clock[0])[0] for _ in range(200)]
    assert low <= np.mean(passed) <= high


def test_the_time_to_look_is_bounded() -> None:
    clock = [0.0]

    def slow(hooked: bool) -> float:
        clock[0] += 4.0
        return 4000.0 + 100 * hooked

    passed, detail = verify._costs_nothing(slow, 20.0, lambda: clock[0])
    assert not passed and "of 3 runs" in detail


def test_features_changed_in_place_are_caught() -> None:
    adapter = adapter_of("llava")
    merge = adapter.merge

    def scale(inputs: Inputs, features: Features) -> Prompt:
        for embed in features.embeds:
            embed.mul_(1.01)
        return merge(inputs, features)

    adapter.merge = scale  # type: ignore[method-assign]
    assert "features reused" in failed(report_of(adapter, "llava"))


def test_a_check_that_raises_has_failed() -> None:
    adapter = adapter_of("llava")

    def broken(inputs: Inputs) -> torch.Tensor:
        raise RuntimeError("no such path")

    adapter.monolithic_logits = broken  # type: ignore[method-assign]
    report = report_of(adapter, "llava")
    assert failed(report) == {"logits equal"}
    assert "no such path" in next(c.detail for c in report.checks if not c.passed)


def test_a_report_without_checks_has_not_passed() -> None:
    with pytest.raises(VerifyError, match="no check ran"):
        VerifyReport("llava", ()).raise_if_failed()


def test_a_projector_of_the_adapter_s_own_is_watched() -> None:
    """It lies neither in the language model nor in the vision module; run again after encode, it is found."""
    adapter = adapter_of("llava")
    encode, merge = adapter.encode, adapter.merge
    adapter.own = torch.nn.Linear(4, 4)  # type: ignore[attr-defined]

    def projected(inputs: Inputs) -> Features:
        adapter.own(torch.zeros(4))  # type: ignore[attr-defined]
        return encode(inputs)

    def again(inputs: Inputs, features: Features) -> Prompt:
        adapter.own(torch.zeros(4))  # type: ignore[attr-defined]
        return merge(inputs, features)

    adapter.encode = projected  # type: ignore[method-assign]
    assert failed(report_of(adapter, "llava")) == set()
    adapter.merge = again  # type: ignore[method-assign]
    report = report_of(adapter, "llava")
    assert failed(report) == {"features reused"}
    assert "own" in next(check.detail for check in report.checks if not check.passed)


def test_wrong_logits_of_a_model_that_rules_tokens_out_are_caught() -> None:
    """Their deviation over the whole vocabulary is no number, and anything would lie within such a bound."""
    kind, frames_as, _ = MODELS["llava"]
    adapter = create(kind)
    adapter.load(ModelSpec("dummy:0", "llava", "tiny", dtype=torch.bfloat16, frames_as=frames_as), "cpu")

    def rule_out(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., 100:200] = torch.finfo(logits.dtype).min
        return logits

    adapter.language_model().get_output_embeddings().register_forward_hook(rule_out)
    assert "logits equal" not in failed(report_of(adapter, "llava"))
    encode = adapter.encode
    adapter.encode = lambda inputs: Features(tuple(embeds.flip(0) for embeds in encode(inputs).embeds))  # type: ignore[method-assign]
    assert "logits equal" in failed(report_of(adapter, "llava"))
