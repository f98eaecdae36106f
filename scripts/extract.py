"""Rule extract: one shard."""

from pathlib import Path
from typing import TYPE_CHECKING

from stagebench.scripting import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

if __name__ == "__main__":
    with job(snakemake.log[0]):
        from stagebench._malloc import keep_freed
        from stagebench.extract import extract_shard
        from stagebench.plan import Plan

        keep_freed()  # this process times nothing
        paths = snakemake.config["paths"]
        plan = Plan.read(Path(paths["results"], "plan.json"))
        extract_shard(
            plan,
            plan.shard(**dict(snakemake.wildcards)),
            Path(snakemake.output[0]),
            cache=Path(paths["cache"]),
            threads=snakemake.threads,
        )
