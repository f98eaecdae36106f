"""Adapters by name. Built-in ones are imported when first asked for; so are those that an installed package declares as an entry point
of the group `stagebench.adapters`, which holds for every job on every node. `register` adds one from within a process.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

from stagebench.errors import ModelError
from stagebench.models.base import Adapter
from stagebench.plan.adapters import BUILT_IN, GROUP, declared

__all__ = ["GROUP", "create", "names", "register"]

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
    return tuple(sorted({*BUILT_IN, *_REGISTERED, *entry_points(group=GROUP).names}))


def create(adapter: str) -> Adapter:
    """A new, not yet loaded adapter. Raises ModelError for an unknown name, listing the known ones."""
    if adapter not in _REGISTERED and adapter in BUILT_IN:
        import_module(BUILT_IN[adapter])
    if adapter not in _REGISTERED:
        _declared(adapter)
    if adapter not in _REGISTERED:
        raise ModelError(
            f"adapter {adapter!r} is unknown. Set models.<name>.adapter to one of: {', '.join(names())}; one of your own is declared as an "
            f"entry point of {GROUP}."
        )
    return _REGISTERED[adapter]()


def _declared(adapter: str) -> None:
    """Import an installed package's adapter, if one has this name. Raises ModelError when it cannot be imported."""
    for point in declared(adapter):
        try:
            factory = point.load()
        except Exception as error:  # somebody else's module, which may fail in any way
            raise ModelError(
                f"adapter {adapter!r}: its entry point {point.value!r} cannot be imported ({type(error).__name__}: {error}). "
                "Correct the package that declares it, or install it again."
            ) from error
        _REGISTERED.setdefault(adapter, factory)
