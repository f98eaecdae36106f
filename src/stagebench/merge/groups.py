"""Merged rows -> groups: which samples count, and one value a sample.

A *group* is one machine, dataset, model, variant and pool. A *pool* is a length mode; natural runs that met their cap are a pool of
their own, "natural (capped)", so that they are shown and yet stay out of natural-length figures. A sample's value is its *typical
run*: the repeat with the median total (the lower of the two middle ones). All its stages come from that one run, so that they add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from stagebench.rows import Code, Status
from stagebench.stages import STAGES

__all__ = ["CAPPED_POOL", "GROUP", "METRICS", "SETTINGS", "Group", "batches_of", "groups"]

GROUP = ("machine", "dataset", "model", "variant", "length")
CAPPED_POOL = "natural (capped)"

METRICS = ("total_ms", "no_load_ms", "ttft_ms", *(f"{s}_ms" for s in STAGES), "ms_per_token", "new_tokens")
"""What models are compared by. `no_load_ms` is total without load."""

SETTINGS = (
    *("engine", "quantization", "batch", "frames", "input", "source", "dtype", "attention", "keep_visual", "preprocess"),
    *("preset", "weights"),
)
_DISCARDING = [code.value for code in Code if code.discards]
_UNUSED = (
    *("token_ids", "token_ms", "text", "feature_hash", "query", "reason", "plain_total_ms", "plain_token_ids", "plain_feature_hash"),
    *("id", "clip", "clip_digest", "study", "block", "finish_reason"),
)
"""Columns that no figure of a group is made from; text, tokens and pixels' hashes are most of a file."""
_OF_A_RUN = (
    *("sample", "sequence", "repeat", "order", "load_ms", "decode_ms", "total_ms", "new_tokens", "steps", "drafted_tokens"),
    *("accepted_tokens", "sm_clock_mhz", "temperature_c", "power_w", "batch_of"),
)
"""What is kept of runs that are not their sample's typical one."""


@dataclass(frozen=True)
class Group:
    """One group's accepted samples, and how many were not accepted."""

    machine: str
    dataset: str
    model: str
    variant: str
    length: str
    settings: dict[str, Any]
    typical: pl.DataFrame
    """One row a sample: its typical run; sorted by sample."""
    runs: pl.DataFrame
    """All accepted runs of the pool, sorted by sample and repeat, with the columns of `_OF_A_RUN`."""
    samples: int
    failed: int
    """Samples without a timed run, for a status other than ok and capped."""
    discarded: int
    """Samples of which every timed run was discarded (suspect, throttled, invalid)."""
    capped: int
    """Samples that met the cap and so stand in the other pool; 0 in that pool itself."""
    discarded_runs: int
    failed_runs: int

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.machine, self.dataset, self.model, self.variant, self.length

    @property
    def n(self) -> int:
        return len(self.typical)

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """[n] float64 of the typical runs, NaN where null."""
        return self.typical[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()

    @property
    def sequences(self) -> list[str]:
        return [str(s) for s in self.typical["sequence"].fill_null("")]

    @property
    def batches(self) -> list[list[str]]:
        """Of the typical runs, as `stats` takes it."""
        return batches_of(self.typical)

    def rows(self, timings: Path) -> pl.LazyFrame:
        """All rows of the merged file that the group was made from; those of the natural length for its pool of capped runs."""
        return pl.scan_parquet(timings).filter(_of((*self.key[:-1], "natural" if self.length == CAPPED_POOL else self.length)))


def groups(timings: Path | pl.LazyFrame) -> list[Group]:
    """All groups of a merged file or of its rows, in sorted order. Read one after the other: no more than one is held whole."""
    frame = pl.scan_parquet(timings) if isinstance(timings, Path) else timings
    keys = frame.select(GROUP).unique().sort(GROUP).collect()
    return [group for key in keys.rows() for group in _group(frame, key)]


def _group(frame: pl.LazyFrame, key: Sequence[Any]) -> list[Group]:
    """The group, and the pool of its capped runs where it has some."""
    wanted = [name for name in frame.collect_schema().names() if name not in _UNUSED]
    rows = (
        frame.filter(_of(key))
        .select(wanted)
        .with_columns(
            (pl.col("codes").list.set_intersection(pl.lit(_DISCARDING, dtype=pl.List(pl.String))).list.len().fill_null(0) > 0).alias(
                "_discard"
            ),
            (pl.col("status").is_in([Status.OK.value, Status.CAPPED.value]) & pl.col("total_ms").is_not_null()).alias("_timed"),
            ((pl.col("status") == Status.CAPPED.value) & (pl.col("length") == "natural")).alias("_capped"),
            (pl.col("total_ms") - pl.col("load_ms").fill_null(0)).alias("no_load_ms"),
            (pl.col("total_ms") / pl.col("batch").fill_null(1).clip(1)).alias("sample_ms"),
            _batch_of(wanted).alias("batch_of"),
        )
        .drop("codes", "job", strict=False)
        .sort("sample", "repeat")
        .collect()
    )
    settings = {name: rows[name][0] for name in SETTINGS}
    # the same in each row; batch and frames are read as columns too
    rows = rows.drop(*GROUP, *(name for name in SETTINGS if not rows.schema[name].is_numeric()))
    plain = rows.filter("accepted")
    capped = rows.filter(pl.col("_capped") & pl.col("_timed") & ~pl.col("_discard"))
    timed = set(rows.filter("_timed")["sample"])
    good, over = set(plain["sample"]), set(capped["sample"])
    machine, dataset, model, variant, length = map(str, key)
    group = Group(
        machine,
        dataset,
        model,
        variant,
        length,
        settings,
        _typical(plain),
        plain.select(_OF_A_RUN),
        samples=rows["sample"].n_unique(),
        failed=rows["sample"].n_unique() - len(timed),
        discarded=len(timed - good - over),
        capped=len(over - good),
        discarded_runs=int((rows["_discard"] & rows["_timed"]).sum()),
        failed_runs=int((~rows["_timed"]).sum()),
    )
    if not len(capped):
        return [group]
    # failed and discarded samples stand with the natural pool, and samples that ended by themselves are none of this one's
    own = {"samples": len(over), "failed": 0, "discarded": 0, "capped": 0, "discarded_runs": 0, "failed_runs": 0}
    typical, runs = _typical(capped), capped.select(_OF_A_RUN)
    return [group, replace(group, length=CAPPED_POOL, typical=typical, runs=runs, **own)]  # type: ignore[arg-type]


def _of(key: Sequence[Any]) -> list[pl.Expr]:
    return [pl.col(name).eq_missing(pl.lit(value, pl.String)) for name, value in zip(GROUP, key, strict=True)]


def _batch_of(columns: Sequence[str]) -> pl.Expr:
    """Name of the batch that a row was measured in: its job and its place in the job's order; null for a sample measured by itself."""
    where = [pl.col(name).cast(pl.String).fill_null("") for name in ("job", "order") if name in columns]
    return pl.when(pl.col("batch") > 1).then(pl.concat_str(where, separator="/"))


def batches_of(*sides: pl.DataFrame) -> list[list[str]]:
    """For each side, rows of the same samples, that was measured in batches: which batch each is of. See stats/clustering.py."""
    return [side["batch_of"].fill_null("").to_list() for side in sides if side["batch_of"].null_count() < len(side)]


def _typical(runs: pl.DataFrame) -> pl.DataFrame:
    rank = pl.int_range(pl.len()).over("sample")
    middle = ((pl.len() - 1) // 2).over("sample")
    return runs.sort("sample", "total_ms", "repeat").filter(rank == middle)
