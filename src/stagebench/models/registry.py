"""Adapters by name. Built-in ones are imported when first asked for; `register` adds one from outside."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from stagebench.errors import ModelError
from stagebench.models.base import Adapter

__all__ = ["create", "names", "register"]

_BUILT_IN = {"hf": "stagebench.models.hf", "eventgpt": "stagebench.models.eventgpt.adapter"}
_REGISTERED: dict[str, Callable[[], Adapter]] = {}

Factory = TypeVar("Factory", bound=Callable[[], Adapter])


def register(name: str) -> Callable[[Factory], Factory]:
    """Class decorator: `@register("mine") class MyAdapter: ...` makes `adapter: mine` work in the config.

    Raises ModelError when another class has the name.
    """

    def add(factory: Factory) -> Factory:
        known = _REGISTERED.get(name)
        if known is not None and getattr(known, "__qualname__", None) != getattr(factory, "__qualname__", None):
            raise ModelError(f"adapter {name!r} is registered already, by {known!r}. Choose another name.")
        _REGISTERED[name] = factory
        return factory

    return add


def names() -> tuple[str, ...]:
    """All adapter names, sorted."""
    return tuple(sorted({*_BUILT_IN, *_REGISTERED}))


def create(adapter: str) -> Adapter:
    """A new, not yet loaded adapter. Raises ModelError for an unknown name, listing the known ones."""
    if adapter not in _REGISTERED and adapter in _BUILT_IN:
        import_module(_BUILT_IN[adapter])
    if adapter not in _REGISTERED:
        raise ModelError(f"adapter {adapter!r} is unknown. Set models.<name>.adapter to one of: {', '.join(names())}.")
    return _REGISTERED[adapter]()
