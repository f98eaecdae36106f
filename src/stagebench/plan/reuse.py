"""A plan that is on disk taken over, as long as nothing that it was made from has changed.

Planning a study anew costs about 35 µs a clip (docs/scale.md); to see that nothing has changed, a stat of each file and reading the
index. What a plan was made from lies beside it in `plan.stamps`: digests of the index's text, of this code, of the stat of every
file that was hashed, the links in their folders, and plan.json's own. All of them are taken again, none is trusted for its age; the
smallest difference, or anything odd, and the study is planned from nothing. Where a file's times cannot tell (too young, unreadable), or
where a file of the index is a link, nothing is laid beside the plan.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagebench.config import Config
from stagebench.digests import Look, stamps
from stagebench.errors import PlanError, StagebenchError
from stagebench.files import whole_file
from stagebench.plan.adapters import adapter_packages
from stagebench.plan.build import versions, weight_looks
from stagebench.plan.file import FileLeaves, leaves_digest, read_head, text_digest

if TYPE_CHECKING:
    from stagebench.dataset import Dataset

__all__ = ["code_digest", "evidence", "note", "recall"]

log = logging.getLogger(__name__)

REUSE_FORMAT = 1
SUFFIX = ".stamps"

_CODE = ("plan", "dataset", "digests.py", "config.py", "files.py")
"""What decides what a plan says, below the package: a change of it, also in a checkout under work, is another plan."""


def evidence(code: str | None, datasets: Mapping[str, Dataset], looks: Sequence[Look]) -> dict[str, Any] | None:
    """What a plan of these datasets was made from beside its configuration, JSON-able. None where that could change without being seen.

    It takes what was seen while the plan was made, and looks at nothing again: what has changed since is for the next plan to see.
    code: `code_digest` from before.
    """
    if code is None or any(dataset.linked for dataset in datasets.values()) or any(look.stamps is None for look in looks):
        return None
    if any("\n" in path for look in looks for path in look.paths):
        return None
    return {
        "code": code,
        "sources": {name: dataset.source for name, dataset in datasets.items()},
        "roots": {name: dataset.base for name, dataset in datasets.items()},
        "links": {name: {folder: sorted(names) for folder, names in d.links.items()} for name, d in datasets.items()},
        "weights": [[look.name, str(look.root), look.links] for look in looks if look.name.startswith("weights:")],
        "looks": [[look.name, str(look.root), "\n".join(look.paths), look.stamps] for look in looks],
    }


def note(plan: Path, digest: str, found: Mapping[str, Any]) -> None:
    """Lay the evidence beside plan.json. A disk that does not take it costs the next plan its shortcut, no more.

    digest: that of the text that was made from the evidence; what lies there by now may be another planner's.
    """
    text = json.dumps({**found, "plan": digest}, separators=(",", ":")).encode()
    try:
        with whole_file(_path(plan), PlanError) as temporary:
            temporary.write_bytes(text_digest(text).encode() + b"\n" + text)
    except (OSError, PlanError) as error:
        log.info("%s: not written (%s); the next plan is made anew", _path(plan), error)


def recall(config: Config, code: str | None, plan: Path) -> tuple[dict[str, Any], dict[str, FileLeaves]] | None:
    """Head and leaves of the plan on disk if planning anew would give the same, else None."""
    try:
        check, _, text = _path(plan).read_bytes().partition(b"\n")
        if check.decode() != text_digest(text):
            return None
        known = json.loads(text)
        planned = plan.read_bytes()
        if known["code"] != code or known["plan"] != text_digest(planned):
            return None
        head, leaves = read_head(plan, planned)
        # as text: == of mappings does not see the order of models
        if json.dumps(head["config"]) != json.dumps(config.model_dump(mode="json")) or head["versions"] != versions():
            return None
        if any(
            {key: value for key, value in head["models"][name].items() if key in ("adapter", "draft_adapter")} != packages
            for name, packages in adapter_packages(config).items()
        ):
            return None
        if not _same_weights(config, known) or not _same_datasets(config, known) or not _same_files(known["looks"]):
            return None
        file = plan.with_name(head["leaves"]["file"])
        if file.name != f"{plan.stem}-{leaves_digest([file.read_bytes()])}.jsonl":
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StagebenchError) as error:
        # a study's first plan, or a dataset that is not there: planning anew says what is wrong
        log.debug("%s: not reused: %s", plan, error)
        return None
    return head, leaves


def _same_datasets(config: Config, known: Mapping[str, Any]) -> bool:
    """Whether each index (and list of questions) reads as it did, and its files' folders hold the same links."""
    from stagebench.dataset import folder_links, read_source

    if set(known["sources"]) != set(config.datasets):
        return False
    for name, settings in config.datasets.items():
        source = read_source(name, settings)
        if source.digest != known["sources"][name] or source.base != known["roots"][name]:
            return False
        for folder, names in known["links"][name].items():
            real, links = folder_links(source.root, folder)
            if real != folder or sorted(links) != names:
                return False
    return True


def _same_weights(config: Config, known: Mapping[str, Any]) -> bool:
    """Whether the models' local folders hold the same files; what is in those is for `_same_files` to say."""
    return [[name, str(folder), files] for name, folder, files in weight_looks(config)] == known["weights"]


def _same_files(looks: Iterable[Sequence[str]]) -> bool:
    """Whether every file that was hashed has its size, times and inode."""
    return all(stamps(Path(root), paths.split("\n") if paths else ()) == seen for _, root, paths, seen in looks)


@cache
def code_digest() -> str | None:
    """Digest of the sources that plan. None where they cannot be read: then no plan is taken over."""
    package = Path(__file__).parents[1]
    whole = hashlib.blake2b(str(REUSE_FORMAT).encode(), digest_size=16)
    for part in _CODE:
        for path in sorted((package / part).glob("*.py")) if not part.endswith(".py") else [package / part]:
            try:
                data = path.read_bytes()
            except OSError:  # a package in an archive
                return None
            whole.update(f"{path.name}:{len(data)}\n".encode() + data)
    return whole.hexdigest()


def _path(plan: Path) -> Path:
    return plan.with_suffix(SUFFIX)
