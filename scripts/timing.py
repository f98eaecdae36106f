"""Rule timing: one model in one variant over one block."""

from pathlib import Path
from typing import TYPE_CHECKING

from stagebench.scripting import job, require_gpu, require_planned

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

if __name__ == "__main__":
    with job(snakemake.log[0]):
        from stagebench.plan import Plan
        from stagebench.session import run_job

        require_gpu(snakemake.resources)
        paths = snakemake.config["paths"]
        plan_file = Path(paths["results"], "plan.json")
        plan = Plan.read(plan_file)
        timed, output = plan.job(**dict(snakemake.wildcards)), Path(snakemake.output[0])
        require_planned(snakemake.params.settings, plan.timing_params(timed), plan_file)
        run_job(plan, timed, output, cache=Path(paths["cache"]), threads=snakemake.threads, own_process=True)
