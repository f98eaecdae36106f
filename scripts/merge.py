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
        from stagebench.thumbnails import write_samples

        results, cache = (Path(snakemake.config["paths"][name]) for name in ("results", "cache"))
        plan = Plan.read(results / "plan.json")
        plan.take_basis(results, Path(snakemake.input.basis).name)
        merge(plan, results)
        write_samples(plan, results, cache)
