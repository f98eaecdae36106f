"""Rule merge: rows and tables."""

from pathlib import Path
from typing import TYPE_CHECKING

from stagebench.scripting import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

if __name__ == "__main__":
    with job(snakemake.log[0]):
        from stagebench.merge import merge
        from stagebench.plan import Plan

        results = Path(snakemake.config["paths"]["results"])
        merge(Plan.read(results / "plan.json"), results)
