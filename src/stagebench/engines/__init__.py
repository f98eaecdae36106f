"""Engines by name: how tokens are produced from an embedded prompt."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from stagebench.errors import ModelError

if TYPE_CHECKING:
    from stagebench.engines.base import Engine

__all__ = ["available", "create", "require"]

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


def require(*names: str) -> None:
    """Raises ModelError for an unknown name. Imports no engine, so that a study can be refused before its first job."""
    for name in names:
        if name not in _ENGINES:
            raise ModelError(f"engine {name!r}: expected one of {', '.join(available())}. Set variants.engine to one of these.")


def create(name: str) -> Engine:
    """A fresh engine. Raises ModelError for an unknown name."""
    require(name)
    module, attribute = _ENGINES[name]
    return getattr(import_module(module), attribute)()
