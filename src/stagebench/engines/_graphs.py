"""Capture of device work into CUDA graphs. On a CPU the same functions simply run, so that control logic is tested there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import masking_utils

from stagebench.errors import ModelError

__all__ = ["Captured", "NotCapturable", "Replay", "capture", "capture_split", "garbage_kept", "prompt_mask_as_eager"]

Replay = Callable[[], None]


class NotCapturable(ModelError):
    """The work waits for the device, or does something else that a graph cannot hold. It runs outside one."""


@dataclass(frozen=True)
class Captured:
    """A graph together with the function that it was captured from.

    A graph knows addresses only. Tensors that the function closes over would be freed with it, and their memory handed to others
    while the graph still reads it.
    """

    graph: Any
    function: Callable[[], Any]

    def __call__(self) -> None:
        self.graph.replay()


def capture(function: Callable[[], Any], device: torch.device, pool: Any = None) -> Replay:
    """`function`, run once to warm up and then captured; on a CPU, `function` itself.

    Everything that it reads and writes must be allocated beforehand and stay where it is.
    """
    return capture_split(function, None, device, pool)[0]


def capture_split(function: Callable[[], Any], at: nn.Module | None, device: torch.device, pool: Any = None) -> list[Replay]:
    """As `capture`, in two graphs: before and from `at`'s forward. One graph when `at` is None; on a CPU, one function.

    The first part of a step can then be launched while the host still waits to hear whether there is a next step.
    Raises NotCapturable when the function runs, but not inside a capture.
    """
    if device.type != "cuda":
        return [cast(Replay, function)]
    pool = pool if pool is not None else torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graphs = [torch.cuda.CUDAGraph()]

    def begin() -> None:
        graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

    def split(*_: Any) -> None:
        graphs[-1].capture_end()
        graphs.append(torch.cuda.CUDAGraph())
        begin()

    with torch.cuda.stream(stream):
        function()  # lazy initialisation (cuBLAS handles, kernel compilation) must not fall into the capture
        stream.synchronize()
        handle = at.register_forward_pre_hook(split) if at is not None else None
        try:
            with garbage_kept():
                begin()
                try:
                    function()
                finally:
                    graphs[-1].capture_end()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            cause = error.__context__ or error  # what stopped the capture, not that its end then failed
            raise NotCapturable(f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}. Use an engine without graphs.") from error
        finally:
            if handle is not None:
                handle.remove()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    return [Captured(graph, function) for graph in graphs]


@contextmanager
def garbage_kept() -> Iterator[None]:
    """No cyclic garbage is collected inside.

    A dead engine's graphs lie in reference cycles, so the collector frees them whenever it happens to run. Inside the capture of another
    graph that unregisters them from the device's random generator in the middle of its own registration, and the process can draw no
    random number on the device from then on.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def prompt_mask_as_eager() -> Any:
    """While a prefill is captured, let transformers decide about the causal mask as it does outside a capture.

    During a capture it materialises the mask (it must not look at a padding mask's values then), which costs the flash
    kernels. Without a padding mask there is nothing to look at, and the answer is the same.
    """
    before = masking_utils.is_tracing
    masking_utils.is_tracing = lambda *_args, **_kwargs: False
    try:
        yield
    finally:
        masking_utils.is_tracing = before
