"""The pieces of a plan: leaves of a dataset, shards, blocks, timing jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

from stagebench.errors import PlanError
from stagebench.plan import trie
from stagebench.plan.specs import Variant

if TYPE_CHECKING:
    from stagebench.dataset import Clip, Sample

__all__ = ["BlockPlan", "DatasetPlan", "KeyList", "Leaf", "ShardPlan", "TimingJob"]


@dataclass(frozen=True)
class Leaf:
    """One leaf of a dataset's trie: what a job must know of its clips."""

    clips: Mapping[str, Clip]
    """By key, sorted."""
    samples: tuple[Sample, ...]
    """Sorted by key."""
    digests: Mapping[str, Mapping[str, str]]
    """Content digest by clip key and entry of Clip.files; "missing" and "unreadable" are digests too."""


class KeyList(Sequence[str]):
    """Keys that are read from the plan's file when they are first looked at: a plan of a million clips is opened for a few of them."""

    def __init__(self, load: Callable[[], Sequence[str]]) -> None:
        self._load = load

    @cached_property
    def _keys(self) -> tuple[str, ...]:
        return tuple(self._load())

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._keys[index]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __eq__(self, other: object) -> bool:
        return self._keys == tuple(other) if isinstance(other, (KeyList, tuple, list)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._keys)

    def __repr__(self) -> str:
        return f"KeyList({list(self._keys)!r})"


@dataclass(frozen=True)
class DatasetPlan:
    """A dataset as planned: its clips and samples, in leaves."""

    name: str
    root: Path
    leaves: Mapping[str, Leaf]
    """By bucket; read from disk when looked at."""

    def clip(self, key: str) -> Clip:
        """Raises PlanError for a clip that is not in the plan."""
        return self._leaf(key).clips[key]

    def sample(self, key: str) -> Sample:
        """Raises PlanError for a sample that is not in the plan."""
        clip = key.rpartition("#")[0]
        for sample in self._leaf(clip).samples:
            if sample.key == key:
                return sample
        raise PlanError(f"{self.name}: sample {key!r} is not in the plan. The dataset has changed since: run snakemake again.")

    def digest(self, clip: str, entry: str | None) -> str:
        """Content digest of one entry of the clip's files; "none" when the clip has no such entry."""
        return "none" if entry is None else self._leaf(clip).digests[clip].get(entry, "none")

    @property
    def clips(self) -> Iterator[Clip]:
        """All clips, leaf by leaf."""
        for bucket in self.leaves:
            yield from self.leaves[bucket].clips.values()

    @property
    def samples(self) -> Iterator[Sample]:
        """All samples, leaf by leaf."""
        for bucket in self.leaves:
            yield from self.leaves[bucket].samples

    def _leaf(self, clip: str) -> Leaf:
        bucket = trie.find(clip, self.leaves.__contains__)
        if bucket is None or clip not in (leaf := self.leaves[bucket]).clips:
            raise PlanError(f"{self.name}: clip {clip!r} is not in the plan. The dataset has changed since: run snakemake again.")
        return leaf


@dataclass(frozen=True)
class ShardPlan:
    """One file of the cache: all clips of a leaf, in one kind and spec. What the name says is what is inside."""

    dataset: str
    kind: str
    spec_id: str
    bucket: str
    digest: str
    clips: Sequence[str] = field(repr=False, compare=False)
    """Clip keys, sorted."""

    @property
    def name(self) -> str:
        """Path under the cache, without suffix."""
        return f"{self.kind}/{self.spec_id}/{self.bucket}-{self.digest}"

    def path(self, cache: Path) -> Path:
        return cache / f"{self.name}.parquet"

    def earlier(self, cache: Path) -> list[Path]:
        """Other shards on disk that may hold some of these clips: of the same bucket, of those above (before a split) and below
        (before a join); newest first."""
        bits = trie.prefix(self.bucket)
        above = [trie.bucket_name(bits[:n]) for n in range(len(bits))]
        folder = cache / self.kind / self.spec_id
        found: dict[Path, int] = {}
        for pattern in (*(f"{bucket}-*.parquet" for bucket in above), f"{bits}*.parquet"):
            for path in folder.glob(pattern):
                try:
                    found[path] = path.stat().st_mtime_ns
                except OSError:  # a shard pruned in the meantime is no source
                    continue
        found.pop(self.path(cache), None)
        return sorted(found, key=lambda path: (-found[path], path.name))


@dataclass(frozen=True)
class BlockPlan:
    """The samples of one timing job: a node of the dataset's trie, so that a model is loaded once for up to timing.max_samples of them."""

    dataset: str
    kind: str
    spec_id: str
    """The reading spec: how its clips are given to the model. Differs from its shards' spec when they hold packed events."""
    name: str
    """`<bucket>-<digest>`; the digest is over the content that is read and the queries that are asked."""
    shards: tuple[str, ...]
    """Names of the shards that are read; empty when the source is live."""
    samples: Sequence[str] = field(repr=False, compare=False)
    """Sample keys, sorted."""


@dataclass(frozen=True)
class TimingJob:
    """One model in one variant over one block."""

    dataset: str
    model: str
    variant: Variant
    block: BlockPlan

    @property
    def path(self) -> str:
        """Its output under the study's results."""
        return f"timings/{self.dataset}/{self.model}/{self.variant.name}/{self.block.name}.parquet"
