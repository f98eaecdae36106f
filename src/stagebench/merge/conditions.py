"""What a group's runs say of the machine beside their times: waiting for a CPU, and energy."""

from __future__ import annotations

import polars as pl

from stagebench.stages import STAGES
from stagebench.stats import CPU_WAIT_MS

__all__ = ["cpu_wait_share", "energies", "longest_wait"]


def cpu_wait_share(runs: pl.DataFrame) -> float | None:
    """Median over runs of the share of the total for which a thread stood ready without a CPU; None where no run tells.

    A wait of up to `CPU_WAIT_MS` counts as none, as in the warning of a row: it is a time slice, and would be much of a short run.
    """
    if "cpu_wait_ms" not in runs.columns:
        return None
    wait = pl.col("cpu_wait_ms")
    share = pl.when(wait > CPU_WAIT_MS).then(wait / pl.col("total_ms")).when(wait.is_not_null()).then(0.0)
    found = runs.select(share.cast(pl.Float64)).to_series().drop_nulls().median()
    return float(found) if isinstance(found, float) else None


def longest_wait(*sides: pl.DataFrame) -> float | None:
    """`cpu_wait_share` of the side that waited most."""
    return max((share for share in map(cpu_wait_share, sides) if share is not None), default=None)


def energies(typical: pl.DataFrame) -> dict[str, float | int | None]:
    """Mean joules of a sample (`energy_j`) and of each stage (`<stage>_energy_j`), and over how many samples (`energy_n`).

    A stage is counted on its own where it is long, the sample where it is of half a second: so all means are of the samples that have the
    energy of every stage which any sample has. Then stages and total are of one set, and add up.
    """
    names = ("energy_j", *(f"{stage}_energy_j" for stage in STAGES))
    there = [name for name in names if name in typical.columns and typical[name].is_not_null().any()]
    found: dict[str, float | int | None] = dict.fromkeys(names)
    complete = typical.select(pl.col(there).cast(pl.Float64)).drop_nulls() if "energy_j" in there else pl.DataFrame()
    for name in there if len(complete) else ():
        found[name] = float(complete[name].sum()) / len(complete)
    return found | {"energy_n": len(complete)}
