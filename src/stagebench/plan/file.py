"""A plan on disk: plan.json (head: everything but clips and samples) and plan-<digest>.jsonl (one leaf a line, found by offset)."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from stagebench.config import canonical
from stagebench.errors import PlanError
from stagebench.files import whole_file
from stagebench.plan.build import PLAN_FORMAT
from stagebench.plan.model import Leaf

__all__ = ["FileLeaves", "leaves_digest", "read_head", "register", "text_digest", "write_plan", "written"]

_KEYS = {
    "format", "config", "models", "versions", "datasets", "specs", "variants", "shards", "blocks", "series", "leaves"
}  # fmt: skip
_HELD = 64
"""Leaves kept in memory by a reader."""


class FileLeaves(Mapping[str, Leaf]):
    """A dataset's leaves by bucket, each read from the leaves file when it is looked at."""

    def __init__(self, path: Path, places: Mapping[str, tuple[int, int]]) -> None:
        self._path = path
        self._places = places
        self._held: OrderedDict[str, Leaf] = OrderedDict()

    def __getitem__(self, bucket: str) -> Leaf:
        if bucket in self._held:
            self._held.move_to_end(bucket)
            return self._held[bucket]
        offset, length = self._places[bucket]
        try:
            with self._path.open("rb") as handle:
                handle.seek(offset)
                leaf = _leaf(json.loads(handle.read(length)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"{self._path}: leaf {bucket} cannot be read ({error}). Run snakemake again: it plans anew.") from error
        self._held[bucket] = leaf
        if len(self._held) > _HELD:
            self._held.popitem(last=False)
        return leaf

    def __contains__(self, bucket: object) -> bool:
        return bucket in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_plan(path: Path, head: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Leaf]]) -> str:
    """Write both files, each atomically, the head last; what did not change is left alone, mtime and all. Returns plan.json's digest.

    The leaves file is named by its content, so a job that still holds the plan before this one finds the leaves it was written with.
    """
    if "leaves" in head:  # it was read from a file, in most cases from this one
        text = _text(head)
        if _holds(path, text) and path.with_name(head["leaves"]["file"]).exists():
            return text_digest(text)
    leaves_name, lines, text = _texts(path, head, leaves)
    if not path.with_name(leaves_name).exists():
        _replace(path.with_name(leaves_name), lines)
    if not _holds(path, text):
        before = _leaves_name(path)
        _replace(path, [text])
        for old in path.parent.glob(f"{path.stem}-*.jsonl"):
            if old.name not in (leaves_name, before):
                old.unlink(missing_ok=True)
    return text_digest(text)


def written(path: Path, head: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Leaf]]) -> str | None:
    """plan.json's digest if it and its leaves are on disk there as `write_plan` would write them, else None."""
    try:
        there = json.loads(path.read_bytes())
        there.pop("leaves")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if _text(there) != _text({key: value for key, value in head.items() if key != "leaves"}):
        return None  # and the leaves need not be put into words
    leaves_name, _, text = _texts(path, head, leaves)
    return text_digest(text) if _holds(path, text) and path.with_name(leaves_name).exists() else None


def text_digest(text: bytes) -> str:
    """Digest of plan.json by its bytes."""
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def leaves_digest(lines: Iterable[bytes]) -> str:
    """The digest in a leaves file's name."""
    digest = hashlib.blake2b(digest_size=8)
    for line in lines:
        digest.update(line)
    return digest.hexdigest()


def _texts(path: Path, head: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Leaf]]) -> tuple[str, list[bytes], bytes]:
    """Name and lines of the leaves file, and the text of plan.json."""
    lines: list[bytes] = []
    places: dict[str, list[list[int]]] = {}
    offset = 0
    for name in sorted(leaves):
        places[name] = []
        for leaf in leaves[name].values():
            values = {"clips": list(map(_plain, leaf.clips.values())), "samples": list(map(_plain, leaf.samples)), "digests": leaf.digests}
            line = (canonical(values) + "\n").encode()
            places[name].append([offset, len(line)])
            offset += len(line)
            lines.append(line)
    leaves_name = f"{path.stem}-{leaves_digest(lines)}.jsonl"
    return leaves_name, lines, _text({**head, "leaves": {"file": leaves_name, "places": places}})


def _text(head: Mapping[str, Any]) -> bytes:
    # Not sorted: the order of models and datasets is the configuration's, and says which model others are compared with.
    return (json.dumps(head, ensure_ascii=True, allow_nan=False, separators=(",", ":")) + "\n").encode()


def _holds(path: Path, text: bytes) -> bool:
    return path.exists() and path.read_bytes() == text


def read_head(path: Path, text: bytes | None = None) -> tuple[dict[str, Any], dict[str, FileLeaves]]:
    """The head and the leaves of each dataset. Raises PlanError for a file that is missing, cut short or of another format.

    text: the file's bytes where they have been read already.
    """
    remedy = "Run snakemake again: it plans anew."
    try:
        head = json.loads(path.read_bytes() if text is None else text)
    except OSError as error:
        raise PlanError(f"{path}: no plan there ({error.strerror}). {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not JSON ({error}). {remedy}") from error
    if not isinstance(head, dict) or head.get("format") != PLAN_FORMAT:
        found = head.get("format") if isinstance(head, dict) else type(head).__name__
        raise PlanError(f"{path}: plan format {found!r}, expected {PLAN_FORMAT}. {remedy}")
    if set(head) != _KEYS:
        odd = sorted(set(head) ^ _KEYS)
        raise PlanError(f"{path}: keys {odd} are missing or unknown. {remedy}")
    leaves_path = path.with_name(head["leaves"]["file"])
    leaves = {
        name: FileLeaves(leaves_path, dict(zip(dataset["leaves"], map(tuple, head["leaves"]["places"][name]), strict=True)))
        for name, dataset in head["datasets"].items()
    }
    return head, leaves


def register(cache: Path, results: Path, study: str, shards: list[str]) -> Path:
    """Note in the cache which shards a study needs, so that `stagebench cache prune` keeps them."""
    where = str(results.resolve())
    # two checkouts may run a study of one name over one cache: each has its own note
    path = cache / "studies" / f"{study}-{hashlib.blake2b(where.encode(), digest_size=4).hexdigest()}.json"
    text = json.dumps({"study": study, "results": where, "shards": sorted(shards)}, indent=0) + "\n"
    if not (path.exists() and path.read_text(encoding="utf-8") == text):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, [text.encode()])
    return path


def _plain(record: Any) -> dict[str, Any]:
    """Its fields by name: dataclasses.asdict copies deeply and took three quarters of planning."""
    return {name: getattr(record, name) for name in _names(record.__class__)}


@cache
def _names(record: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(record))


def _leaf(raw: Mapping[str, Any]) -> Leaf:
    from stagebench.dataset import Clip, Sample

    clips: dict[str, Clip] = {}
    for clip in raw["clips"]:
        files: dict[str, Any] = {name: value if isinstance(value, str) else tuple(value) for name, value in clip["files"].items()}
        rest: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in clip.items() if name != "files"}
        clips[clip["key"]] = Clip(**rest, files=files)
    return Leaf(clips, tuple(Sample(**sample) for sample in raw["samples"]), raw["digests"])


def _leaves_name(path: Path) -> str:
    try:
        return str(json.loads(path.read_bytes())["leaves"]["file"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _replace(path: Path, chunks: list[bytes]) -> None:
    with whole_file(path, PlanError) as temporary, temporary.open("wb") as handle:
        handle.writelines(chunks)
