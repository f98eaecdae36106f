"""The timed `load` stage: a clip's frames into host memory, from the shard or live from its source."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stagebench._originals import Originals
from stagebench._reading import read_clip, render_events
from stagebench.errors import PlanError, SourceError, StoreError
from stagebench.plan import origin
from stagebench.store import HostBuffer, Shard

if TYPE_CHECKING:
    from stagebench.plan import Plan, TimingJob

__all__ = ["Loader", "open_loader"]

log = logging.getLogger(__name__)


class Loader:
    """Gives the frames of the clips of one timing job. `open` it, `load` clip by clip, `close` it; or use it as a context manager."""

    def __init__(self, plan: Plan, job: TimingJob, *, cache: Path, slots: int) -> None:
        settings = job.variant.settings
        self.source: str = settings["source"]
        self.kind: str = settings["input"]
        self.spec: Mapping[str, Any] = plan.specs[job.block.spec_id]
        self.verify_ms = 0.0
        """What verification took: of the shards, or of a live source's files against the plan."""
        self.scratch_ms = 0.0
        """What copying the shards to cache.scratch took."""
        self._plan = plan
        self._job = job
        self._cache = cache
        self._dataset = plan.datasets[job.dataset]
        self._scratch = plan.config.cache.scratch
        self._clips = tuple(dict.fromkeys(key.rpartition("#")[0] for key in job.block.samples))
        self._shards: list[Shard] = []
        self._where: dict[str, Shard] = {}
        self._buffers = [HostBuffer() for _ in range(max(1, slots))]
        self._turn = 0
        self._folder: Path | None = None

    def __enter__(self) -> Loader:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> float:
        """Make every later `load` a plain read: shards copied where asked, verified and matched with the plan, memory touched,
        kernels compiled. Files of a live source are read once and held against the plan, too, so that a timed load of any source finds
        its bytes in the page cache as far as that holds them. Returns the milliseconds of verification.

        Raises ChecksumError for a damaged shard, StoreError for a missing or other one than the plan names, PlanError for a live
        source's file that has changed since.
        """
        if self.source == "cache":
            for name in self._job.block.shards:
                self._open_shard(name)
            missing = [clip for clip in self._clips if clip not in self._where]
            if missing:
                raise StoreError(
                    f"{self._job.block.name}: {len(missing)} clips in none of its {len(self._shards)} shards, the first {missing[0]}. "
                    "Run snakemake again."
                )
            rows = [self._where[clip].row(clip) for clip in self._clips]
            largest = max((row.rgb_bytes for row in rows), default=0)
            for buffer in self._buffers:
                buffer.reserve(largest)
        else:
            self._check_originals()
        if self.kind == "events" and self.source != "png":
            from stagebench.render import prepare

            prepare()
        return self.verify_ms

    def status(self, clip: str) -> tuple[str, str]:
        """("ok", "") or ("error", reason), without reading. A live source's clip is ok until it is read."""
        if self.source == "cache":
            row = self._shard(clip).row(clip)
            return row.status, row.reason
        if origin(self._dataset.clip(clip), self.kind, self.source) is None:
            return "error", f"{clip}: no {self.source} in the index. Add it to the clip's entry, or take another source."
        return "ok", ""

    def load(self, clip: str) -> list[np.ndarray]:
        """The clip's frames, uint8 [H, W, 3] each, writable and contiguous.

        From the cache they are views into one of the loader's buffers, which the next load but `slots - 1` overwrites; of compressed
        shards and of raw events, as of live sources, they are memory of their own.
        Raises SourceError where the clip cannot be read.
        """
        if self.source != "cache":
            return read_clip(self._dataset.root, self._dataset.clip(clip), self.kind, self.spec, self.source).frames
        shard = self._shard(clip)
        row = shard.row(clip)
        if not row.ok:
            raise SourceError(f"{clip}: no pixels in {shard.path.name}: {row.reason}")
        if shard.raw_events:
            return render_events(shard.events(clip), self.spec)
        if shard.decompresses(clip):
            return shard.frames(clip)
        buffer = self._buffers[self._turn]
        self._turn = (self._turn + 1) % len(self._buffers)
        return shard.frames(clip, out=buffer.take(row.rgb_bytes))

    def close(self) -> None:
        """Close the shards and remove their scratch copies."""
        for shard in self._shards:
            shard.close()
        self._shards.clear()
        self._where.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _shard(self, clip: str) -> Shard:
        try:
            return self._where[clip]
        except KeyError:
            raise PlanError(f"{clip}: not a clip of {self._job.block.name}, or the loader is not open. Open it, and plan again.") from None

    def _open_shard(self, name: str) -> None:
        path = self._cache / f"{name}.parquet"
        if self._scratch is not None:
            path = self._copy(path, Path(self._scratch))
        shard = Shard.open(path, verify=True)
        self._shards.append(shard)
        self.verify_ms += shard.verify_ms or 0.0
        kind, spec_id = name.split("/")[:2]
        expected = self._plan.specs[spec_id]
        if shard.kind != kind or dict(shard.spec) != dict(expected):
            raise StoreError(
                f"{path}: holds {shard.kind} of {dict(shard.spec)}, expected {kind} of {dict(expected)}. Delete it and run again."
            )
        for clip in self._clips:
            if clip in shard.digests:
                wanted = self._plan.source_digest(self._job.dataset, clip, kind)
                if shard.digests[clip] != wanted:
                    raise StoreError(
                        f"{path}: clip {clip} is made from {shard.digests[clip]}, the plan says {wanted}. Delete it and run again."
                    )
                self._where[clip] = shard

    def _check_originals(self) -> None:
        begin = time.perf_counter_ns()
        originals = Originals(self._dataset.root)
        for key in self._clips:
            clip = self._dataset.clip(key)
            entry = origin(clip, self.kind, self.source)
            planned = self._dataset.digest(key, entry)
            if planned != "none":  # a proof may read an entry that no timing job of the study does
                originals.check(clip, entry, planned)
        self.verify_ms += (time.perf_counter_ns() - begin) * 1e-6

    def _copy(self, path: Path, scratch: Path) -> Path:
        """A shard on the node's own disk. The copy is verified, not the original: what is read is what was checked."""
        begin = time.perf_counter_ns()
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix=f"stagebench-{os.getpid()}-", dir=scratch))
            target = self._folder / path.relative_to(self._cache)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be copied to cache.scratch {scratch}: {error}. Free some space there, or set cache.scratch: null."
            ) from error
        self.scratch_ms += (time.perf_counter_ns() - begin) * 1e-6
        return target


def open_loader(plan: Plan, job: TimingJob, *, cache: Path, slots: int | None = None) -> Loader:
    """A loader for a timing job, not yet opened.

    cache: folder of the shards. slots: how many loaded clips stay valid at once; None takes two batches, so that one can be
    loaded while the other is used.
    """
    return Loader(plan, job, cache=cache, slots=slots or 2 * int(job.variant.settings["batch"]))
