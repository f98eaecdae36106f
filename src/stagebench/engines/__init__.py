"""Engines by name: how tokens are produced from an embedded prompt."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from stagebench.errors import ModelError

if TYPE_CHECKING:
    from stagebench.engines.base import Engine

__all__ = ["available", "create"]

_ENGINES = {
    "fused": ("stagebench.engines.fused", "FusedEngine"),
    "generate": ("stagebench.engines.generate", "GenerateEngine"),
    "graph": ("stagebench.engines.graph", "GraphEngine"),
    "prompt_lookup": ("stagebench.engines.prompt_lookup", "PromptLookupEngine"),
    "speculative": ("stagebench.engines.speculative", "SpeculativeEngine"),
    "static": ("stagebench.engines.static", "StaticEngine"),
}
"""Name -> module and class; a module is imported only when its engine is asked for (some need CUDA or a compiler)."""


def available() -> tuple[str, ...]:
    """The names that `create` takes."""
    return tuple(sorted(_ENGINES))


def create(name: str) -> Engine:
    """A fresh engine. Raises ModelError for an unknown name."""
    try:
        module, attribute = _ENGINES[name]
    except KeyError:
        raise ModelError(f"engine {name!r}: expected one of {', '.join(available())}. Set variants.engine to one of these.") from None
    return getattr(import_module(module), attribute)()
