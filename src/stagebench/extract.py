"""Extraction: a shard's clips, decoded in parallel, into its file. Unchanged clips are taken over from earlier shards."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from stagebench._originals import Originals
from stagebench._reading import ClipPixels, read_clip, read_row
from stagebench.errors import ConfigError, DatasetError, SourceError, StagebenchError, StoreError
from stagebench.plan import origin
from stagebench.store import ClipRow, EncodedRow, Shard, ShardWriter

if TYPE_CHECKING:
    from stagebench.dataset import Clip
    from stagebench.plan import Plan, ShardPlan

__all__ = ["ClipPixels", "ExtractReport", "extract_shard", "failures_allowed", "read_clip"]

log = logging.getLogger(__name__)

_AHEAD = 3
"""Clips beyond those being read: without them a reader would wait while a row is written, or while the next in order takes long."""

Progress = Callable[[int, int], None]
"""Called with (clips done, clips)."""


@dataclass(frozen=True)
class ExtractReport:
    """What became of a shard's clips."""

    shard: str
    decoded: int
    carried: int
    """Rows taken over from earlier shards of the same spec: neither the clip nor its digest had changed."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Reason by clip."""
    bytes: int = 0
    """Of the file."""
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.shard}: {self.decoded} clips decoded, {self.carried} carried over, {len(self.failed)} failed; "
            f"{self.bytes / 1e6:.1f} MB in {self.seconds:.1f} s"
        )


def failures_allowed(share: float, clips: int) -> int:
    """How many of a shard's clips may fail: `shards.max_failed` of them, rounded up.

    So a shard of two clips outlives one bad clip at the default of 5 %, where rounding down would fail every small study; a study as a
    whole is judged by the merge. 0 allows none.
    """
    return math.ceil(share * clips)


def extract_shard(
    plan: Plan, shard: ShardPlan, output: Path, *, cache: Path, threads: int = 1, progress: Progress | None = None
) -> ExtractReport:
    """Write a shard, whole or not at all; its rows stand in the plan's order.

    output: its path; cache: where earlier shards are looked for. threads: clips read and encoded at once; up to four more are held in
    memory, two of them on their way into the file.
    A clip that cannot be read becomes a row with its reason.
    Raises StoreError when more clips fail than `failures_allowed` (with counts and reasons), on a full disk, and for a read error
    that may pass (I/O, memory: nothing is stored then); PlanError when a file is no longer what the plan says.
    """
    began = time.monotonic()
    threads = max(1, threads)
    spec, dataset = plan.specs[shard.spec_id], plan.datasets[shard.dataset]
    clips = [dataset.clip(key) for key in shard.clips]
    digests = {clip.key: plan.source_digest(shard.dataset, clip.key, shard.kind) for clip in clips}
    carried, failed = 0, {}
    reader = _Reader(dataset.root, shard.kind, spec, digests)
    if shard.kind == "events" and spec["representation"] != "clip":
        from stagebench.render import prepare

        prepare()
    earlier = _Earlier(shard.earlier(cache), digests, spec)
    try:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="extract") if threads > 1 else None
        with pool or nullcontext(), ShardWriter(output, shard.kind, spec, codec=spec.get("codec", "none")) as writer:
            for number, (clip, row) in enumerate(_in_order(clips, earlier, reader, writer, pool, threads), 1):
                meta = (row.row if isinstance(row, EncodedRow) else row).meta
                carried += clip.key in earlier
                if not meta.ok:
                    failed[clip.key] = meta.reason
                    log.warning("%s: %s", clip.key, meta.reason)
                writer.add(row)
                if progress is not None:
                    progress(number, len(clips))
            _check_failures(shard, failed, plan.config.shards.max_failed, len(clips))
    finally:
        earlier.close()
    report = ExtractReport(shard.name, len(clips) - carried - len(failed), carried, failed, output.stat().st_size, time.monotonic() - began)
    log.info("%s", report)
    return report


def _check_failures(shard: ShardPlan, failed: Mapping[str, str], share: float, clips: int) -> None:
    allowed = failures_allowed(share, clips)
    if len(failed) > allowed:
        shown = "".join(f"\n  {clip}: {reason}" for clip, reason in list(failed.items())[:10])
        more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
        raise StoreError(
            f"{shard.dataset}, shard {shard.name}: {len(failed)} of {clips} clips failed, {allowed} allowed "
            f"(shards.max_failed: {share:g}).{shown}{more}\nMend or remove these clips, or raise shards.max_failed."
        )


def _in_order(
    clips: Sequence[Clip], earlier: _Earlier, reader: _Reader, writer: ShardWriter, pool: ThreadPoolExecutor | None, threads: int
) -> Iterator[tuple[Clip, ClipRow | EncodedRow]]:
    """Rows in the order of the clips, read and encoded ahead by no more than a few: what is held does not grow with the shard."""
    if pool is None:
        for clip in clips:
            yield clip, earlier.row(clip.key) or reader.row(clip)
        return
    waiting: deque[tuple[Clip, Future[ClipRow | EncodedRow] | None]] = deque()
    try:
        rest = iter(clips)
        while True:
            for ahead in islice(rest, threads + _AHEAD - len(waiting)):
                read = None if ahead.key in earlier else pool.submit(lambda clip: writer.encode(reader.row(clip)), ahead)
                waiting.append((ahead, read))
            if not waiting:
                return
            clip, future = waiting.popleft()
            row = earlier.row(clip.key) if future is None else future.result()
            yield clip, row or reader.row(clip)
            del row, future
    finally:
        for _, future in waiting:
            if future is not None:
                future.cancel()


class _Reader:
    """Reads clips, in any thread; what the clip is to blame for becomes a failed row."""

    def __init__(self, root: Path, kind: str, spec: Mapping[str, object], digests: Mapping[str, str]) -> None:
        self._root = root
        self._originals = Originals(root)
        self._kind = kind
        self._spec = spec
        self._digests = digests

    def row(self, clip: Clip) -> ClipRow:
        digest = self._digests[clip.key]
        try:
            row = read_row(self._root, clip, self._kind, self._spec, digest)
        except (SourceError, DatasetError) as error:
            row = ClipRow.failed(clip.key, digest, _one_line(error))
        except ConfigError:
            raise
        except StagebenchError as error:
            raise type(error)(f"{clip.key}: {error}") from error
        except (OSError, MemoryError) as error:
            raise StoreError(
                f"{clip.key}: {type(error).__name__}: {error}. That may pass, so nothing was stored: run again, "
                "with fewer threads if memory is short."
            ) from error
        except Exception as error:  # a hostile file may make a library raise anything; the other clips go on
            log.exception("%s", clip.key)
            row = ClipRow.failed(clip.key, digest, f"{type(error).__name__}: {_one_line(error)}")
        # the shard's name says which bytes it is made from: those of the planning must be those that were read
        self._originals.check(clip, origin(clip, self._kind), digest.partition(":")[2])
        return row


class _Earlier:
    """Rows of unchanged clips in other shards of the same spec, each checked before it is taken over."""

    def __init__(self, paths: Sequence[Path], digests: Mapping[str, str], spec: Mapping[str, object]) -> None:
        self._found: dict[str, Shard] = {}
        self._shards: list[Shard] = []
        missing = dict(digests)
        for path in paths:
            if not missing:
                break
            try:
                shard = Shard.open(path, verify=False)
            except StoreError as error:
                log.warning("%s", error)
                continue
            self._shards.append(shard)
            if dict(shard.spec) != dict(spec):
                continue
            for clip in [c for c in shard.clips if missing.get(c) == shard.digests[c] and shard.row(c).ok]:
                self._found[clip] = shard
                del missing[clip]

    def __contains__(self, clip: object) -> bool:
        return clip in self._found

    def row(self, clip: str) -> ClipRow | None:
        """The clip's row, its bytes verified; None when there is none, or it is damaged."""
        shard = self._found.get(clip)
        if shard is None:
            return None
        try:
            shard.verify([clip], threads=1)
            return shard.clip_row(clip)
        except StoreError as error:
            log.warning("%s The clip is decoded instead.", error)
            del self._found[clip]
            return None

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
