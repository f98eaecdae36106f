"""From a dataset's content to shards, blocks and jobs: a pure function, and the only place that knows what a file is called.

The main process plans, writes `<results>/plan.json`, and every job reads that file: no job scans the dataset. Beside it lie the leaves
(`plan-<digest>.jsonl`: one leaf a line, found by its offset), so that a job of a study with a million clips reads only its own.
"""

from __future__ import annotations

import gc
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagebench.config import Config, ShardsConfig, canonical, load_config
from stagebench.digests import DigestIndex, Progress
from stagebench.errors import PlanError
from stagebench.files import whole_file
from stagebench.plan import trie
from stagebench.plan.build import build_head, timing_settings
from stagebench.plan.file import read_head, register, write_plan, written
from stagebench.plan.model import BlockPlan, DatasetPlan, KeyList, Leaf, ShardPlan, TimingJob
from stagebench.plan.reuse import code_digest, evidence, note, recall
from stagebench.plan.specs import LIVE, Variant, origin

if TYPE_CHECKING:
    from stagebench.dataset import Clip, Sample

__all__ = ["Plan", "build_plan"]

_AGAIN = "The plan has changed since this job was made: run snakemake again."
VERIFY_SAMPLES = 8


class Plan:
    """What a study consists of. Made by `build_plan`, or read from plan.json; both give the same."""

    def __init__(
        self,
        head: Mapping[str, Any],
        leaves: Mapping[str, Mapping[str, Leaf]],
        cache: Path | None = None,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        self._head = head
        self._leaves = leaves
        self._cache = cache
        self._made_from = made_from
        self._params: dict[tuple[str, str], str] = {}

    @cached_property
    def config(self) -> Config:
        """The configuration as applied, defaults filled in."""
        return load_config(self._head["config"])

    @cached_property
    def datasets(self) -> Mapping[str, DatasetPlan]:
        """Clips and samples of each dataset, by name."""
        return {name: DatasetPlan(name, Path(d["root"]), self._leaves[name]) for name, d in self._head["datasets"].items()}

    @property
    def specs(self) -> Mapping[str, Mapping[str, Any]]:
        """Extraction and reading specs by spec_id."""
        specs: Mapping[str, Mapping[str, Any]] = self._head["specs"]
        return specs

    @cached_property
    def shards(self) -> tuple[ShardPlan, ...]:
        """Every shard that a cache-sourced variant reads; two datasets with the same clips share theirs."""
        return tuple(self._shards.values())

    @cached_property
    def blocks(self) -> tuple[BlockPlan, ...]:
        """Every block, of all datasets, kinds and sources."""
        return tuple(block for blocks in self._block_sets for block in blocks)

    @cached_property
    def jobs(self) -> tuple[TimingJob, ...]:
        """Every timing job."""
        return tuple(
            TimingJob(s["dataset"], s["model"], self._variants[s["variant"]], block)
            for s in self._head["series"]
            for block in self._block_sets[s["blocks"]]
        )

    def shard(self, kind: str, spec_id: str, bucket: str, digest: str) -> ShardPlan:
        """Raises PlanError for a shard that is not in the plan."""
        name = f"{kind}/{spec_id}/{bucket}-{digest}"
        if name not in self._shards:
            raise PlanError(f"{name}: not a shard of this plan. {_AGAIN}")
        return self._shards[name]

    def job(self, dataset: str, model: str, variant: str, block: str) -> TimingJob:
        """Raises PlanError for a job that is not in the plan."""
        path = f"timings/{dataset}/{model}/{variant}/{block}.parquet"
        if path not in self._jobs:
            raise PlanError(f"{path}: not a timing job of this plan. {_AGAIN}")
        return self._jobs[path]

    def clip(self, dataset: str, key: str) -> Clip:
        """Raises PlanError for a clip that is not in the plan."""
        return self.datasets[dataset].clip(key)

    def sample(self, dataset: str, key: str) -> Sample:
        """Raises PlanError for a sample that is not in the plan."""
        return self.datasets[dataset].sample(key)

    def source_digest(self, dataset: str, clip: str, kind: str) -> str:
        """Fingerprint of what a shard's row of that clip is made from: entry of Clip.files and content digest."""
        planned = self.datasets[dataset]
        entry = origin(planned.clip(clip), kind)
        return f"{entry or 'none'}:{planned.digest(clip, entry)}"

    def merge_params(self) -> str:
        """As `timing_params`, for the merge: all but what only timing jobs and shards depend on, and their names carry."""
        config = self._head["config"]
        settings = {"study": self.config.study, "compare": config["compare"], "models": list(self.config.models)}
        # the order of an axis says which variant others are held against; left out where it says nothing
        order = {axis: values for axis, values in config["variants"].items() if isinstance(values, list) and len(values) > 1}
        order |= {"datasets": list(config["datasets"])} if len(config["datasets"]) > 1 else {}
        if config["shards"]["max_failed"] != ShardsConfig().max_failed:
            settings["max_failed"] = config["shards"]["max_failed"]
        return canonical(settings | ({"order": order} if order else {}))

    def report_params(self) -> str:
        """As `timing_params`, for the report: what stands on the page beside the merged results."""
        return canonical(self._head["config"]["report"])

    def timing_params(self, job: TimingJob) -> str:
        """One canonical JSON string of all that must make a timing job run again when it changes."""
        key = job.model, job.variant.name
        if key not in self._params:  # Snakemake asks for each of ten thousand jobs
            self._params[key] = canonical(timing_settings(self.config, self._head, job.model, job.variant))
        return self._params[key]

    def timing_fingerprint(self, job: TimingJob) -> Mapping[str, Any]:
        """The same as values, for the fingerprint `study` in the job's output."""
        return timing_settings(self.config, self._head, job.model, job.variant)

    def verify_path(self, job: TimingJob) -> str:
        """Where the decoupling proof for a job's model lies under the results: one for each way that its forward pass is computed."""
        settings = job.variant.settings
        words = [job.model, *(settings[key] for key, usual in (("attention", "sdpa"), ("quantization", "none")) if settings[key] != usual)]
        return f"verify/{'@'.join(words)}.json"

    def verify_params(self, path: str) -> str:
        """As `timing_params`, for the proof at that path."""
        job = self.verify_job(path)
        settings = timing_settings(self.config, self._head, job.model, job.variant)
        used = {
            key: value for key, value in settings["variant"].items() if key in ("attention", "quantization", "dtype", "input", "frames")
        }
        about = {name: settings[name] for name in ("model", "weights", "versions", "adapter") if name in settings}
        return canonical(about | {"variant": used})

    @cached_property
    def verify_paths(self) -> tuple[str, ...]:
        """Every proof that the study needs."""
        return tuple(self._verified)

    def verify_job(self, path: str) -> TimingJob:
        """A small job to verify with, read live: a proof is about the model, so that no shard that changes makes it run again.

        Raises PlanError for a proof that is not in the plan.
        """
        if path not in self._verified:
            raise PlanError(f"{path}: not a proof of this plan. {_AGAIN}")
        job = self._verified[path]
        dataset = self.datasets[job.dataset]
        first = next(iter(dataset.leaves.values()))
        entries = {key: origin(clip, job.block.kind) for key, clip in first.clips.items()}
        entry = next((e for e in entries.values() if e), None)
        source = next((name for name, e in LIVE.items() if e == entry), job.variant.settings["source"])
        keys = tuple(s.key for s in first.samples if entries[s.clip] == entry)[:VERIFY_SAMPLES]
        # what is left out of the model's own computation, or guessed ahead of it, is no part of the proof that the cut is right
        kept = {key: value for key, value in job.variant.settings.items() if key not in ("keep_visual", "preprocess")}
        variant = Variant(job.variant.name, {**kept, "engine": "generate", "source": source, "batch": 1})
        return TimingJob(job.dataset, job.model, variant, BlockPlan(job.dataset, job.block.kind, job.block.spec_id, "verify", (), keys))

    def write(self, path: Path) -> None:
        """Write plan.json and its leaves, and register the study in the cache. What did not change is not written."""
        digest = write_plan(path, self._head, self._leaves)
        if self._made_from is not None:
            note(path, digest, self._made_from)
        if self._cache is not None:
            register(self._cache, path.parent, self.config.study, list(self._shards))

    @cached_property
    def basis(self) -> str:
        """Name below the results of a file that stands for all that the merge rests on: every job and proof, with their settings.

        Snakemake knows from its records whether jobs or settings have changed. Where it has none (`stagebench run` made the results,
        another checkout, a lost .snakemake), this file is missing or newer than the tables, so that they are merged again and the
        merge refuses what was measured otherwise.
        """
        whole = hashlib.blake2b(canonical({"merge": self.merge_params()}).encode(), digest_size=8)
        for path in self.verify_paths:
            whole.update(f"{path} {self.verify_params(path)}\n".encode())
        for job in self.jobs:
            whole.update(f"{job.path} {self.timing_params(job)}\n".encode())
        return f"basis-{whole.hexdigest()}.json"

    def write_basis(self, results: Path) -> None:
        """Write that file unless it is there beside merged results; a merge that failed has left none, and is to be tried again.

        No two have the same content: Snakemake takes a newer file for the one that it has merged if its checksum is that of its records,
        which know nothing of what others have merged since, and which it writes for merges that failed, too.
        """
        path = results / self.basis
        there = path.exists()
        if not (there and (results / "summary.json").exists()):
            text = canonical({"jobs": len(self.jobs), "proofs": list(self.verify_paths), "written": secrets.token_hex(8)})
            try:
                with whole_file(path, PlanError) as temporary:
                    temporary.write_text(text + "\n", encoding="utf-8")
            except PlanError:
                if not there:  # else a dry run by one who may only look, beside the run that has yet to merge
                    raise

    def take_basis(self, results: Path, planned: str) -> None:
        """Before a merge, remove the files of other plans: what is there afterwards is not theirs, however old their files are.

        planned: the name that the merge was asked for with. Raises PlanError when this is another plan.
        """
        if planned != self.basis:
            raise PlanError(f"{results / planned}: stands for another plan than the one in {results}. {_AGAIN}")
        for other in results.glob("basis-*.json"):
            if other.name != planned:
                other.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Raises PlanError when there is no plan of this format there."""
        return cls(*read_head(path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and _bare(self._head) == _bare(other._head) and all(
            dict(leaves) == dict(other._leaves[name]) for name, leaves in self._leaves.items()
        )  # fmt: skip

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _variants(self) -> dict[str, Variant]:
        return {name: Variant(name, settings) for name, settings in self._head["variants"].items()}

    @cached_property
    def _shards(self) -> dict[str, ShardPlan]:
        shards: dict[str, ShardPlan] = {}
        for row in self._head["shards"]:
            dataset = row["dataset"]
            for bucket, digest in zip(self._head["datasets"][dataset]["leaves"], row["digests"], strict=True):
                keys = KeyList(partial(_clip_keys, self._leaves[dataset], bucket))
                shard = ShardPlan(dataset, row["kind"], row["spec"], bucket, digest, keys)
                shards.setdefault(shard.name, shard)
        return shards

    @cached_property
    def _block_sets(self) -> tuple[tuple[BlockPlan, ...], ...]:
        digests = {(r["dataset"], r["spec"]): r["digests"] for r in self._head["shards"]}
        sets = []
        for row in self._head["blocks"]:
            dataset, kind, stored = row["dataset"], row["kind"], row["shards"]
            leaves: Sequence[str] = self._head["datasets"][dataset]["leaves"]
            blocks = []
            for bits, digest, first, last in row["nodes"]:
                names: tuple[str, ...] = ()
                if stored is not None:
                    held = digests[dataset, stored]
                    names = tuple(f"{kind}/{stored}/{leaves[n]}-{held[n]}" for n in range(first, last))
                keys = KeyList(partial(_sample_keys, self._leaves[dataset], leaves[first:last], bits))
                blocks.append(BlockPlan(dataset, kind, row["spec"], f"{trie.bucket_name(bits)}-{digest}", names, keys))
            sets.append(tuple(blocks))
        return tuple(sets)

    @cached_property
    def _jobs(self) -> dict[str, TimingJob]:
        return {job.path: job for job in self.jobs}

    @cached_property
    def _verified(self) -> dict[str, TimingJob]:
        found: dict[str, TimingJob] = {}
        for series in self._head["series"]:
            blocks = self._block_sets[series["blocks"]]
            if blocks:
                job = TimingJob(series["dataset"], series["model"], self._variants[series["variant"]], blocks[0])
                found.setdefault(self.verify_path(job), job)
        return found


def build_plan(
    config: Config, cache: Path, *, earlier: Path | None = None, threads: int | None = None, progress: Progress | None = None
) -> Plan:
    """Plan a study: load its datasets, hash what changed since the last time, and name every shard, block and job.

    earlier: where the study's plan was written before, if it was. It is taken over when nothing that it was made from has changed
    (`stagebench.plan.reuse`); the result is the same, sooner. Without `<cache>/digests.parquet` all is planned and hashed anew.
    threads: hashing threads; None takes the machine's cores. progress: called with (files hashed, files to hash).
    Raises DatasetError for an index that cannot be used, PlanError when a dataset holds no sample.
    """
    from stagebench.dataset import load_dataset

    code = code_digest()
    digests = cache / "digests.parquet"
    with _paused_collector():
        if earlier is not None and code and digests.exists() and (found := recall(config, code, earlier)) is not None:
            return Plan(*found, cache)
        datasets = {name: load_dataset(name, settings) for name, settings in config.datasets.items()}
        for name, dataset in datasets.items():
            if not dataset.samples:
                raise PlanError(
                    f"{name}: {dataset.root / config.datasets[name].index} holds no sample. Check datasets.{name}.index and max_samples."
                )
        with DigestIndex(digests) as index:
            head, leaves = build_head(config, datasets, index, threads=threads or os.cpu_count() or 1, progress=progress)
        made_from = evidence(code, datasets, index.looks)
        # The plan on disk may be this one all the same: files were touched, or too young when it was made. A dry run may note that.
        if earlier is not None and made_from is not None and (digest := written(earlier, head, leaves)) is not None:
            note(earlier, digest, made_from)
        return Plan(head, leaves, cache, made_from)


@contextmanager
def _paused_collector() -> Iterator[None]:
    """No garbage collection while millions of small objects are made that all stay: it took a quarter of planning at 160,000 clips.

    What is there afterwards lives as long as the process, so later collections need not look through it either.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()


def _clip_keys(leaves: Mapping[str, Leaf], bucket: str) -> tuple[str, ...]:
    return tuple(leaves[bucket].clips)


def _sample_keys(leaves: Mapping[str, Leaf], buckets: Sequence[str], bits: str) -> tuple[str, ...]:
    found = [s.key for bucket in buckets for s in leaves[bucket].samples if trie.below(s.clip, bits)]
    return tuple(sorted(found))


def _bare(head: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in head.items() if key != "leaves"}
