"""Count and time a model's vision encoder from outside, by forward hooks.

Hooks see the module's own forward and nothing else: a projector or adaptor behind it is not in their time, and without CUDA events they
would see launch time only. They are an independent second reading, which `verify` holds against encode; stages are timed otherwise.
"""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch import nn

from stagebench.errors import EncoderNotFoundError

__all__ = ["TOWER_NAMES", "EncoderCounter", "VisionTimingHooks", "find_vision_modules"]

TOWER_NAMES = ("vision_tower", "video_tower", "image_tower", "visual", "visual_tower", "vision_model")
"""Attribute names under which Hugging Face models, and EventGPT, keep their vision encoder."""


def find_vision_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> the outermost vision encoders in `model`; Video-LLaVA has two, most models one.

    Raises EncoderNotFoundError when no module has a name of TOWER_NAMES.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TOWER_NAMES and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    if not found:
        children = ", ".join(name for name, _ in model.named_children()) or "none"
        raise EncoderNotFoundError(
            f"{type(model).__name__}: no vision encoder found. Looked for a module named {', '.join(TOWER_NAMES)}; "
            f"its children are: {children}. Pass the encoder itself: VisionTimingHooks(model, module=model.my_encoder)."
        )
    return found


class VisionTimingHooks:
    """Sum of the time that a model's vision encoder takes, over all its calls since the last `reset`.

    model: any model; its encoders are found by name (TOWER_NAMES). A module that holds none, but whose own class is an encoder,
        is meant by `module=`.
    module: the encoder itself, where the name tells nothing; then `model` is not searched.

    On CUDA, event pairs time the work on the device's own clock and nothing is synchronised until the time is asked for; elsewhere
    `perf_counter_ns`. Use: `hooks.register_hooks(); model(...); hooks.get_vision_time()`, or as a context manager.
    """

    def __init__(self, model: nn.Module, module: nn.Module | None = None) -> None:
        if module is not None:
            self.modules: dict[str, nn.Module] = {type(module).__name__: module}
        else:
            try:
                self.modules = find_vision_modules(model)
            except EncoderNotFoundError:
                if not _looks_like_encoder(model):
                    raise
                self.modules = {type(model).__name__: model}
        self._handles: list[Any] = []
        self._open: dict[int, list[Any]] = {}
        self._spans: list[tuple[Any, Any]] = []

    @property
    def calls(self) -> int:
        """Forward calls since the last reset, over all encoders."""
        return len(self._spans)

    def register_hooks(self) -> None:
        """Begin timing. A second call changes nothing."""
        if self._handles:
            return
        for module in self.modules.values():
            self._handles.append(module.register_forward_pre_hook(self._before))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))

    def unregister_hooks(self) -> None:
        """Stop timing and leave the model as it was. What was timed stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open.clear()

    def reset(self) -> None:
        """Forget all calls so far."""
        self._open.clear()
        self._spans.clear()

    def get_vision_time(self) -> float:
        """Seconds in the encoder, summed over its calls; 0.0 when it was not called. Waits for the device."""
        total = 0.0
        for begin, end in self._spans:
            if isinstance(begin, int):
                total += (end - begin) * 1e-9
            else:
                end.synchronize()
                total += begin.elapsed_time(end) * 1e-3
        return total

    def __enter__(self) -> VisionTimingHooks:
        self.register_hooks()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.unregister_hooks()

    def _before(self, module: nn.Module, _: Any) -> None:
        self._open.setdefault(id(module), []).append(_now(module))

    def _after(self, module: nn.Module, *_: Any) -> None:
        begun = self._open.get(id(module))
        if begun:  # registered in the middle of a call: nothing to close
            self._spans.append((begun.pop(), _now(module)))


class EncoderCounter:
    """Counts forward calls of a vision module, by the stage that was under way.

    Use: `with EncoderCounter(adapter.vision_module()) as counter: counter.enter("encode"); ...; counter.count("encode")`. A call outside
    any named stage is counted under "". An engine that replays a graph, which no hook sees, reports its replays by `add`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._stage = ""
        self._counts: Counter[str] = Counter()
        self._handle: Any = None

    def __enter__(self) -> EncoderCounter:
        self._handle = self.module.register_forward_pre_hook(self._called)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def enter(self, stage: str) -> None:
        """Calls from now on belong to `stage`."""
        self._stage = stage

    def add(self, calls: int = 1) -> None:
        """Count calls that a graph replayed without Python."""
        self._counts[self._stage] += calls

    def reset(self) -> None:
        self._stage = ""
        self._counts.clear()

    def count(self, stage: str) -> int:
        return self._counts[stage]

    @property
    def total(self) -> int:
        return self._counts.total()

    @property
    def outside_encode(self) -> int:
        """Calls in any stage but `encode`: each of them makes a sample invalid."""
        return self.total - self._counts["encode"]

    def _called(self, *_: Any) -> None:
        self._counts[self._stage] += 1


def _looks_like_encoder(module: nn.Module) -> bool:
    """A vision transformer given directly: it takes patches of pixels and generates no text."""
    if hasattr(module, "generate"):
        return False
    return getattr(module, "main_input_name", "") == "pixel_values" or hasattr(getattr(module, "config", None), "patch_size")


def _now(module: nn.Module) -> Any:
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(parameter.device))
        return event
    return time.perf_counter_ns()
