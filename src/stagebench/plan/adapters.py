"""Which installed package an adapter comes from: another version of it may compute something else. Read from metadata alone."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from stagebench.config import Config

__all__ = ["BUILT_IN", "GROUP", "adapter_package", "adapter_packages", "declared"]

GROUP = "stagebench.adapters"
"""The entry points' group: `[project.entry-points."stagebench.adapters"]` of a package's pyproject.toml."""

BUILT_IN = {"hf": "stagebench.models.hf", "eventgpt": "stagebench.models.eventgpt.adapter"}
"""Adapters of stagebench itself, with their modules; a package's entry point of such a name is not looked at."""


def declared(adapter: str) -> list[EntryPoint]:
    """Entry points of installed packages under this name, the one that counts first."""
    return [] if adapter in BUILT_IN else list(entry_points(group=GROUP, name=adapter))


def adapter_package(adapter: str) -> str | None:
    """`name version` of the distribution that declares the adapter; None where it is built in, or no package declares it."""
    for point in declared(adapter):
        return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return None


def adapter_packages(config: Config) -> dict[str, dict[str, str]]:
    """By model: `adapter`, and `draft_adapter` of its draft, where they come from packages. Empty for models that are built in."""
    found = {}
    for name, model in config.models.items():
        named = {"adapter": model.adapter} | ({} if model.draft is None else {"draft_adapter": model.draft.adapter or model.adapter})
        found[name] = {key: package for key, adapter in named.items() if (package := adapter_package(adapter)) is not None}
    return found
