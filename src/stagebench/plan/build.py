"""Planning proper: a dataset's samples and digests in, leaves, shards and blocks out. Pure but for the digest index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagebench.config import Config, ModelConfig, canonical
from stagebench.digests import DigestIndex, Progress, combine
from stagebench.plan import trie
from stagebench.plan.adapters import adapter_packages
from stagebench.plan.model import Leaf
from stagebench.plan.specs import Variant, digest_of, expand_variants, extraction_spec, origin, shard_spec, spec_name, told

if TYPE_CHECKING:
    from stagebench.dataset import Dataset, Sample

__all__ = ["PLAN_FORMAT", "TIMING_VERSION", "build_head", "timing_settings", "versions", "weight_looks"]

PLAN_FORMAT = 1
TIMING_VERSION = 1
"""Version of how times are taken. Raise it when the same job would measure something else: every timing job then runs again."""

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".txt", ".jinja")

# Settings that decide how jobs are cut or what is taken over, not what a row says.
_NOT_MEASURED = ("max_samples", "reuse")


def build_head(
    config: Config, datasets: Mapping[str, Dataset], index: DigestIndex, *, threads: int, progress: Progress | None
) -> tuple[dict[str, Any], dict[str, dict[str, Leaf]]]:
    """The plan as plain JSON-able values (the head of plan.json), and each dataset's leaves by bucket.

    The head depends on the content of the files and the configuration only: not on the order of the index, the root or the clock.
    """
    variants = {model: expand_variants(config, settings.input) for model, settings in config.models.items()}
    packages = adapter_packages(config)
    head: dict[str, Any] = {
        "format": PLAN_FORMAT,
        "config": config.model_dump(mode="json"),
        "models": {name: {**_weights(model, index, threads, progress), **packages[name]} for name, model in sorted(config.models.items())},
        "versions": versions(),
        "datasets": {},
        "specs": {},
        "variants": {
            v.name: dict(v.settings) for v in sorted({v.name: v for vs in variants.values() for v in vs}.values(), key=lambda v: v.name)
        },
        "shards": [],
        "blocks": [],
        "series": [],
    }
    leaves = {}
    for name, dataset in sorted(datasets.items()):
        uses = sorted({(v.settings["input"], v.settings["frames"], v.settings["source"]) for vs in variants.values() for v in vs})
        planned = _DatasetPlanner(config, dataset, index, uses, threads, progress)
        leaves[name] = planned.leaves
        head["datasets"][name] = {"root": str(dataset.root), "leaves": list(planned.leaves)}
        for use in uses:
            planned.add(use, head)
        for model, series in sorted(variants.items()):
            head["series"] += [{"dataset": name, "model": model, "variant": v.name, "blocks": planned.block_set(v)} for v in series]
    return head, leaves


class _DatasetPlanner:
    """One dataset: its leaves, and for each use (kind, count, source) of it the shards and blocks."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        index: DigestIndex,
        uses: Iterable[tuple[str, int, str]],
        threads: int,
        progress: Progress | None,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.sensor = config.datasets[dataset.name].sensor
        self.samples = _by_clip(dataset.samples)
        self.digests = _content(dataset, index, {(kind, source) for kind, _, source in uses}, threads, progress)
        self.places = trie.sort_keys(self.samples)
        self.nodes = trie.cut(self.places, [1] * len(self.places), config.shards.max_clips)
        self.leaves = {trie.bucket_name(bits): self._leaf(self.places[begin:end]) for bits, begin, end in self.nodes}
        self._sets: dict[tuple[str, int, str], int] = {}

    def add(self, use: tuple[str, int, str], head: dict[str, Any]) -> None:
        """Put the shards and blocks of one use into the head."""
        kind, count, source = use
        spec = extraction_spec(self.config, kind, count, self.sensor)
        spec_id = spec_name(spec)
        head["specs"][spec_id] = spec
        shards_id = None
        content = self._contents(kind, source)
        if source == "cache":
            stored = shard_spec(spec)
            shards_id = spec_name(stored)
            head["specs"][shards_id] = stored
            digests = [digest_of(stored, [[key, content[key]] for key in leaf.clips]) for leaf in self.leaves.values()]
            row = {"dataset": self.dataset.name, "kind": kind, "spec": shards_id, "digests": digests}
            if row not in head["shards"]:  # packed events serve every count of parts
                head["shards"].append(row)
        self._sets[use] = len(head["blocks"])
        head["blocks"].append(
            {
                "dataset": self.dataset.name,
                "kind": kind,
                "spec": spec_id,
                "source": source,
                "shards": shards_id,
                "nodes": self._blocks(spec, source, content, digests if shards_id else None),
            }
        )

    def block_set(self, variant: Variant) -> int:
        """Which of the head's block sets a variant's jobs run over."""
        return self._sets[variant.settings["input"], variant.settings["frames"], variant.settings["source"]]

    def _blocks(self, spec: Mapping[str, Any], source: str, content: Mapping[str, list[Any]], shards: list[str] | None) -> list[list[Any]]:
        """[bits, digest, first leaf, behind the last leaf] of each block. Shards: the leaves' digests, or None for a live source."""
        counts = [len(self.samples[key]) for _, key in self.places]
        ends = [end for _, _, end in self.nodes]
        rows = []
        first = 0
        for bits, begin, end in trie.cut(self.places, counts, self.config.timing.max_samples):
            while ends[first] <= begin:
                first += 1
            last = first
            while ends[last] < end:
                last += 1
            keys = sorted(key for _, key in self.places[begin:end])
            asked = [[s.key, s.query] for key in keys for s in self.samples[key]]
            read = shards[first : last + 1] if shards is not None else [[key, content[key]] for key in keys]
            rows.append([bits, digest_of(spec, source, read, asked), first, last + 1])
        return rows

    def _leaf(self, places: list[tuple[int, str]]) -> Leaf:
        keys = sorted(key for _, key in places)
        return Leaf(
            {key: self.dataset.clips[key] for key in keys},
            tuple(sample for key in keys for sample in self.samples[key]),
            {key: self.digests[key] for key in keys},
        )

    def _contents(self, kind: str, source: str) -> dict[str, list[Any]]:
        """What a kind is made from, by clip: entry, content digest, and the time window where there is one."""
        clips = self.dataset.clips
        found: dict[str, list[Any]] = {}
        for key, digests in self.digests.items():
            clip = clips[key]
            entry = origin(clip, kind, source)
            content = [entry, digests.get(entry, "none") if entry else "none"]
            found[key] = [*content, list(clip.window)] if clip.window else content
        return found


def _content(
    dataset: Dataset, index: DigestIndex, uses: set[tuple[str, str]], threads: int, progress: Progress | None
) -> dict[str, dict[str, str]]:
    """Digest by clip key and entry, of the entries that the uses (kind, source) read and no others."""
    clips = {sample.clip: dataset.clips[sample.clip] for sample in dataset.samples}
    entries: dict[str, list[str]] = {}
    paths: list[str] = []
    for key, clip in clips.items():
        entries[key] = sorted({e for kind, source in uses if (e := origin(clip, kind, source))})
        for name in entries[key]:
            files = clip.files[name]
            if isinstance(files, str):
                paths.append(files)
            else:
                paths += files
    known = index.digests(dataset.name, dataset.root, paths, links=dataset.linked, threads=threads, progress=progress)
    return {key: {name: _one(clips[key].files[name], known) for name in names} for key, names in entries.items()}


def _one(files: str | Sequence[str], known: Mapping[str, str]) -> str:
    if isinstance(files, str):
        return known[files]
    # several files in a given order: their order counts, their folder does not
    return combine({f"{number:06d}": known[path] for number, path in enumerate(files)})


def _by_clip(samples: Iterable[Sample]) -> dict[str, tuple[Sample, ...]]:
    ordered = sorted(samples, key=lambda s: (s.clip, s.key))
    return {clip: tuple(group) for clip, group in groupby(ordered, key=lambda s: s.clip)}


def _weights(model: ModelConfig, index: DigestIndex, threads: int, progress: Progress | None) -> dict[str, str | None]:
    """Digests of a model's weights, and of its draft's where those are files."""
    found = {"weights": _weights_digest(model.weights, index, threads, progress)}
    draft = None if model.draft is None else _weights_digest(model.draft.weights, index, threads, progress)
    return found if draft is None else {**found, "draft": draft}


def _weights_digest(weights: str, index: DigestIndex, threads: int, progress: Progress | None) -> str | None:
    """Content digest of a local folder's weights; None for random weights and hub ids, whose names say all."""
    found = _weight_files(weights)
    if found is None:
        return None
    name, folder, files = found
    return combine(index.digests(name, folder, files, links=files, threads=threads, progress=progress))


def _weight_files(weights: str) -> tuple[str, Path, dict[str, str]] | None:
    folder = Path(weights).expanduser()  # as the loader does
    if weights.startswith("dummy:") or not folder.is_dir():
        return None
    base = os.path.realpath(folder)
    files, walked = {}, set()
    for at, below, names in os.walk(base, followlinks=True):  # folders below, too: a vision tower's settings, chat templates
        real = os.path.realpath(at)
        below[:] = sorted(name for name in below if not name.startswith(".")) if real not in walked else ()  # a link may lead back up
        walked.add(real)
        for name in sorted(names):
            if name.endswith(WEIGHT_FILES) and not name.startswith("."):
                path, leads = f"{at}/{name}", os.path.realpath(f"{at}/{name}")
                files[os.path.relpath(path, base)] = leads if leads != path else ""
    return f"weights:{base}", folder, files


def weight_looks(config: Config) -> list[tuple[str, Path, dict[str, str]]]:
    """Name, folder and files (and where those lead that are links) of each look at local weights, in `build_head`'s order."""
    models = [model for _, model in sorted(config.models.items())]
    named = [weights for model in models for weights in (model.weights, None if model.draft is None else model.draft.weights)]
    return [found for weights in named if weights is not None and (found := _weight_files(weights)) is not None]


def versions() -> dict[str, str]:
    """Versions whose change makes earlier times incomparable. Read from metadata: nothing is imported."""
    from stagebench.rows import FORMAT_VERSION

    found = {"timing": str(TIMING_VERSION), "rows": str(FORMAT_VERSION)}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a head node may plan without them
            found[package] = "none"
    return found


def timing_settings(config: Config, head: Mapping[str, Any], model: str, variant: Variant) -> dict[str, Any]:
    """All that must make a timing job run again when it changes, beyond the names of what it reads.

    Defaults are left out: a key that a later version of stagebench adds to the configuration makes no job run again.
    """
    settings = {
        "model": config.models[model].model_dump(mode="json", exclude_defaults=True),
        "weights": head["models"][model]["weights"],
        "variant": told(variant.settings),
        "timing": config.timing.model_dump(mode="json", exclude_defaults=True, exclude=set(_NOT_MEASURED)),
        "scratch": config.cache.scratch is not None,
        "versions": head["versions"],
    }
    known = head["models"][model]
    # an adapter from another package; a draft's weights, and its adapter, where it guesses
    names = ("adapter", "draft", "draft_adapter") if variant.settings["engine"] == "speculative" else ("adapter",)
    settings |= {name: known[name] for name in names if known.get(name) is not None}
    plain: dict[str, Any] = json.loads(canonical(settings))  # as it reads back from a file, so that it can be compared with one
    return plain
