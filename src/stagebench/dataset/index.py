"""Bounded reading of files that a dataset brings along: the index JSON entry by entry, and the list of questions."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stagebench.errors import DatasetError

__all__ = ["MAX_INDEX_BYTES", "iterate_index", "read_index", "read_questions"]

MAX_INDEX_BYTES = 512 << 20
MAX_QUESTIONS_BYTES = 16 << 20

_SPACE = re.compile(r"[ \t\n\r]*")
_ID = re.compile(r'"id"\s*:\s*("[^"]{0,80}"|\d{1,20})')


def read_index(path: Path) -> str:
    """The index as text. Raises DatasetError when it is too large, no regular file, or not UTF-8."""
    data = _read_bounded(
        path, MAX_INDEX_BYTES, "Split the dataset into several, each with its own index.", "Check datasets.<name>.root and index."
    )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        entry = max(before.count('"conversations"'), 0)
        raise DatasetError(
            f"{path}: byte 0x{data[error.start]:02x} at offset {error.start} (about entry {entry}, near "
            f"{before[-60:]!r}) is not UTF-8. Write the index as UTF-8."
        ) from None


def _read_bounded(path: Path, limit: int, remedy: str, missing: str) -> bytes:
    try:
        # O_NONBLOCK: a FIFO in the place of a file must not hang the plan.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}). {missing}") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise DatasetError(f"{path}: not a regular file. Point at the file itself.")
        if info.st_size > limit:
            raise DatasetError(f"{path}: {info.st_size:,} bytes, at most {limit:,} are read. {remedy}")
        with os.fdopen(fd, "rb", closefd=False) as handle:
            return handle.read(limit)
    except OSError as error:
        raise DatasetError(f"{path}: reading failed ({error.strerror}). Check the disk, or copy the file again.") from None
    finally:
        os.close(fd)


def _strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return result


class _DuplicateKeyError(ValueError):
    pass


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def iterate_index(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(entry number, entry) one at a time: a parsed million entries would take gigabytes, their clips and samples do not."""
    decode = json.JSONDecoder(object_pairs_hook=_strict_object, parse_constant=_no_constant).raw_decode
    skip: Any = _SPACE.match  # matches always, if only the empty string

    def after_space(at: int) -> int:
        end: int = skip(text, at).end()
        return end

    at = after_space(0)
    if text[at : at + 1] != "[":
        raise DatasetError(f"{path}: begins with {text[at : at + 40]!r}, expected a JSON list of entries. Check datasets.<name>.index.")
    at = after_space(at + 1)
    number = 0
    if text[at : at + 1] == "]":
        at += 1
    else:
        while True:
            try:
                entry, at = decode(text, at)
            except RecursionError:
                raise DatasetError(
                    f"{path}: entry {number} is nested too deep to be an index entry. Entries are flat objects; remove the nesting."
                ) from None
            except _DuplicateKeyError as error:
                raise DatasetError(
                    f"{path}: entry {number} ({_near_id(text, at)}): key {error.args[0]!r} stands there twice. Remove one."
                ) from None
            except ValueError as error:
                raise DatasetError(
                    f"{path}: entry {number} (character {at}, near {text[at : at + 60]!r}) is not JSON: {error}. Write the index again."
                ) from None
            yield number, entry
            number += 1
            # Most writers put ", " or ",\n  " here; the regex skips either without a copy.
            at = after_space(at)
            mark = text[at : at + 1]
            at += 1
            if mark == "]":
                break
            if mark != ",":
                raise DatasetError(
                    f"{path}: {mark or 'end of file'!r} after entry {number - 1}, expected ',' or ']'. "
                    "The file may be cut short: copy it again."
                )
            at = after_space(at)
    at = after_space(at)
    if at != len(text):
        raise DatasetError(f"{path}: {text[at : at + 40]!r} after the end of the list. Remove it.")


def _near_id(text: str, at: int) -> str:
    found = _ID.search(text, at, at + 4000)
    return f"id {found.group(1)}" if found else f"character {at}"


def read_questions(path: Path) -> list[str]:
    """A JSON list of strings (or of objects with "question"), or a text file with one question a line."""
    data = _read_bounded(
        path,
        MAX_QUESTIONS_BYTES,
        "Keep questions_file to the questions themselves.",
        "Check datasets.<name>.questions_file: it is relative to the folder in which you start.",
    )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: byte at offset {error.start} is not UTF-8. Save the questions as UTF-8.") from None
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}: not JSON: {error}. Write a list of strings, or a .txt file with one question a line.") from None
        if not isinstance(found, list):
            raise DatasetError(f"{path}: a JSON {type(found).__name__}, expected a list of strings.")
        items = [item.get("question") if isinstance(item, dict) else item for item in found]
    else:
        items = [line for line in text.splitlines() if line.strip()]
    questions: dict[str, int] = {}
    for number, item in enumerate(items, 1):
        if not isinstance(item, str) or not item.strip():
            raise DatasetError(f"{path}: question {number} is {str(item)[:60]!r}, expected a text. Remove it, or write the question.")
        question = item.strip()
        if question in questions:
            raise DatasetError(f"{path}: question {number} repeats question {questions[question]}: {question[:60]!r}. Remove one.")
        questions[question] = number
    if not questions:
        raise DatasetError(f"{path}: holds no question. Write one a line, or remove questions_file.")
    return list(questions)
