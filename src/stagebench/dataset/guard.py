"""Paths that an index names: none leaves the dataset's root, by its text or by a link."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stagebench.errors import DatasetError, UnsafePathError

__all__ = ["MAX_PATH_CHARS", "PLAIN", "clean_path", "folder_links", "guard_links", "resolve"]

MAX_PATH_CHARS = 1024

# What the guard looks for in one pass: control characters (NUL among them), lone surrogates (bytes that are not UTF-8), backslashes.
_BAD_CHARACTER = re.compile("[\x00-\x1f\x7f\ud800-\udfff\\\\]")
# Fast acceptance of what nearly all indexes hold; anything else takes the slow, explaining way.
PLAIN = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.+=@ -]*/)*[A-Za-z0-9_][A-Za-z0-9_.+=@ -]*")


def resolve(root: Path, relative: str) -> Path:
    """The real path of a name in the index, guaranteed to lie below the root at the time of the call.

    Raises UnsafePathError for an absolute path, `..`, NUL and other control characters, bytes that are not UTF-8, links out of the root.
    """
    clean = clean_path(relative, str(root))
    base = os.path.realpath(root)
    real = os.path.realpath(f"{base}/{clean}")
    if real != base and not real.startswith(base.rstrip("/") + "/"):
        raise UnsafePathError(f"{root}: {relative!r} is a link to {real}, outside the dataset's root {base}. {_MOVE}")
    return Path(real)


_MOVE = "Put the files under the root (or mount them there), or set root to a folder that holds both."


def clean_path(relative: Any, where: str) -> str:
    """Normalised relative path. `where` says whose it is, for the message."""
    if not isinstance(relative, str):
        raise DatasetError(
            f"{where}: expected a relative path, found {type(relative).__name__} {str(relative)[:80]!r}. Write the path as a string."
        )
    if PLAIN.fullmatch(relative) and len(relative) <= MAX_PATH_CHARS:
        return relative
    bad = _BAD_CHARACTER.search(relative)
    if bad:
        code = ord(bad.group())
        what = {0: "NUL", 0x5C: "a backslash"}.get(
            code, "bytes that are not UTF-8" if code >= 0xD800 else f"control character 0x{code:02x}"
        )
        raise UnsafePathError(f"{where}: path {relative[:200]!r} holds {what}. Use printable UTF-8 with / between folders.")
    if len(relative) > MAX_PATH_CHARS:
        raise UnsafePathError(f"{where}: path of {len(relative)} characters, at most {MAX_PATH_CHARS} are taken. Shorten it.")
    if relative.startswith("/") or re.match(r"[A-Za-z]:", relative):
        raise UnsafePathError(
            f"{where}: absolute path {relative!r}. Paths in an index are relative to the dataset's folders; cut the leading part off."
        )
    parts = [part for part in relative.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UnsafePathError(f"{where}: path {relative!r} climbs by '..'. {_MOVE}")
    if not parts:
        raise DatasetError(f"{where}: path {relative!r} names no file. Leave the key out where a clip has no such file.")
    return "/".join(parts)


def guard_links(
    root: Path, files: Iterable[tuple[str, Mapping[str, Any]]], index: Path
) -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """Refuse links out of the root: one listing a folder (which tells links from files), no system call a file.

    files: clip key and Clip.files of each clip. Returns the names of the links in each folder that holds any of the files, and of each
    file that is a link or is reached through one where it lies, below the root. Raises UnsafePathError, naming the clip.
    """
    base = os.path.realpath(root)
    folders: dict[str, tuple[str, frozenset[str]]] = {}
    linked: dict[str, str] = {}
    for key, entries in files:
        for value in entries.values():
            for relative in value if value.__class__ is tuple else (value,):
                folder, _, file = relative.rpartition("/")
                found = folders.get(folder)
                try:
                    if found is None:
                        found = folders[folder] = folder_links(root, folder)
                    if file in found[1]:
                        linked[relative] = resolve(root, relative).relative_to(base).as_posix()
                    elif found[0] != folder:
                        linked[relative] = f"{found[0]}/{file}"
                except UnsafePathError as error:
                    raise UnsafePathError(f"{index}: clip {key}: {error}") from None
    return {folder: links for folder, (_, links) in folders.items()}, linked


def folder_links(root: Path, folder: str) -> tuple[str, frozenset[str]]:
    """Where a folder really lies below the root, and the names in it that are links.

    A folder that is not there holds none: its clips fail when they are read. Raises UnsafePathError for a link out of the root.
    """
    base = os.path.realpath(root)
    real = os.path.realpath(f"{base}/{folder}")
    inside = base.rstrip("/") + "/"
    if not (real + "/").startswith(inside):
        raise UnsafePathError(f"folder {folder} is a link to {real}, outside the dataset's root {base}. {_MOVE}")
    try:
        with os.scandir(real) as entries:
            names = frozenset(entry.name for entry in entries if entry.is_symlink())
    except OSError:
        names = frozenset()
    return real[len(inside) :], names
