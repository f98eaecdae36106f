"""Encode by CUDA graph: an adapter's feature function (tower, projector, adaptor, pooling) captured once per input shape.

Eager, a 24-layer tower at batch 5 is bound by the host's launches; captured, by the device. The vision module's forward
hook fires at capture, not at replay, so replays are counted here (`calls`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stagebench.engines._graphs import NotCapturable, capture
from stagebench.errors import ModelError

__all__ = ["GraphedCall", "graph_encoder"]

log = logging.getLogger(__name__)


class GraphedCall:
    """A function of tensors (by position or keyword), captured per shape. Its outputs are overwritten by the next call.

    An unknown shape is captured at its first call (`admit` does it outside a timed window). A function that cannot be captured, because
    it waits for the device, runs as it is, and `eager` says why. On a CPU it runs as it is too.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0
        """Replays since `reset`, each one pass of the encoder that no hook sees."""
        self.captures = 0
        """Shapes captured so far; more after a run than before it means that the run's encode time holds a capture."""
        self.eager: str | None = None
        self.prepare_ms: dict[str, float] = {}
        self._known: dict[tuple[Any, ...], tuple[dict[str, torch.Tensor], Callable[[], None], list[Any]]] = {}

    def reset(self) -> None:
        self.calls = 0

    def __call__(self, *positional: Any, **arguments: Any) -> Any:
        arguments = {**{str(at): value for at, value in enumerate(positional)}, **arguments}
        tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        graphed = self._captured(tensors, arguments) if tensors and next(iter(tensors.values())).is_cuda else None
        if graphed is None:
            return self._apply(arguments)
        self.calls += 1
        inputs, replay, output = graphed
        for key, value in tensors.items():
            inputs[key].copy_(value)
        replay()
        return output[0]

    @torch.inference_mode()
    def admit(self, *positional: Any, **arguments: Any) -> None:
        """Capture for these arguments' shapes."""
        arguments = {**{str(at): value for at, value in enumerate(positional)}, **arguments}
        tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        if tensors and next(iter(tensors.values())).is_cuda:
            self._captured(tensors, arguments)

    def _apply(self, arguments: Mapping[str, Any]) -> Any:
        by_place = [arguments[key] for key in sorted((key for key in arguments if key.isdigit()), key=int)]
        return self.function(*by_place, **{key: value for key, value in arguments.items() if not key.isdigit()})

    def _captured(
        self, tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]
    ) -> tuple[dict[str, torch.Tensor], Callable[[], None], list[Any]] | None:
        if self.eager is not None:
            return None
        key = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(tensors.items()))
        if key not in self._known:
            began = time.perf_counter()
            inputs = {name: tensor.clone() for name, tensor in tensors.items()}
            output: list[Any] = [None]

            def function() -> None:
                output[0] = self._apply({**arguments, **inputs})

            self.captures += 1
            try:
                replay = capture(function, next(iter(inputs.values())).device)
            except NotCapturable as error:
                self.eager = str(error)
                log.warning("encode cannot be captured and stays eager: %s", self.eager)
                return None
            self._known[key] = (inputs, replay, output)
            shapes = " ".join("x".join(map(str, tensor.shape)) for tensor in inputs.values())
            self.prepare_ms[f"encode {shapes}"] = (time.perf_counter() - began) * 1e3
        return self._known[key]


def graph_encoder(adapter: Any) -> GraphedCall:
    """Replace the adapter's feature function by its captured form and return that. Raises ModelError when it has none known."""
    for owner, name in ((adapter, "_encode"), (getattr(adapter, "model", None), "get_event_features")):
        function = getattr(owner, name, None)
        if callable(function):
            graphed = function if isinstance(function, GraphedCall) else GraphedCall(function)
            setattr(owner, name, graphed)
            return graphed
    raise ModelError(f"{type(adapter).__name__}: no feature function to capture (_encode, or model.get_event_features). Use eager encode.")
