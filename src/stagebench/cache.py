"""The store as a whole: what it holds, what no study names any more, whether its bytes are still right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stagebench.errors import StoreError

__all__ = ["SpecUsage", "check", "prune", "usage"]

KINDS = ("frames", "events")


@dataclass(frozen=True)
class SpecUsage:
    """One extraction spec's share of the store."""

    kind: str
    spec_id: str
    shards: int
    bytes: int
    named: int
    """Shards that a registered study's plan names."""


def usage(cache: Path) -> list[SpecUsage]:
    """Shards and bytes per kind and spec, sorted. Raises StoreError where there is no store."""
    _there(cache)
    named = _named(cache)
    found: dict[tuple[str, str], list[Path]] = {}
    for path in _shards(cache):
        found.setdefault((path.parent.parent.name, path.parent.name), []).append(path)
    return [
        SpecUsage(kind, spec, len(paths), sum(p.stat().st_size for p in paths), sum(_name(cache, p) in named for p in paths))
        for (kind, spec), paths in sorted(found.items())
    ]


def prune(cache: Path, *, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove the shards that no registered study names, and say which (path, bytes).

    Raises StoreError when no study is registered: then nothing would be left, and that is hardly what was meant; and where there is no
    store.
    """
    _there(cache)
    named = _named(cache)
    if not named and next(_shards(cache), None) is not None:
        raise StoreError(
            f"{cache / 'studies'}: no study is registered, so every shard would go. Run a study first, or delete the folder by hand."
        )
    gone = []
    for path in sorted(_shards(cache)):
        if _name(cache, path) not in named:
            gone.append((path, path.stat().st_size))
            if not dry_run:
                path.unlink()
    return gone


def check(cache: Path, progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[Path, str | None]]:
    """Verify every shard; yields (path, what is wrong or None). progress: called with (done, of).

    Raises StoreError where there is no store.
    """
    from stagebench.store import Shard

    _there(cache)
    paths = sorted(_shards(cache))
    for number, path in enumerate(paths, 1):
        try:
            Shard.open(path, verify=True).close()
        except StoreError as error:
            yield path, str(error)
        else:
            yield path, None
        if progress:
            progress(number, len(paths))


def _there(cache: Path) -> None:
    if not cache.is_dir():
        raise StoreError(f"{cache}: no such folder. Name the store with --cache-dir; a study makes it when it first extracts.")


def _shards(cache: Path) -> Iterator[Path]:
    for kind in KINDS:
        yield from (p for p in (cache / kind).glob("*/*.parquet") if not p.name.startswith("."))


def _name(cache: Path, path: Path) -> str:
    return path.relative_to(cache).with_suffix("").as_posix()


def _named(cache: Path) -> set[str]:
    """Names of the shards that any registered study's plan holds. Raises StoreError for an unreadable registration."""
    named: set[str] = set()
    for path in sorted((cache / "studies").glob("*.json")):
        try:
            named.update(json.loads(path.read_text(encoding="utf-8"))["shards"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(f"{path}: not a study's registration ({error}). Run that study again, or delete the file.") from error
    return named
