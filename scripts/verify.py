"""Rule verify: one proof."""

from pathlib import Path
from typing import TYPE_CHECKING

from stagebench.scripting import job, require_gpu, require_planned

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

if __name__ == "__main__":
    with job(snakemake.log[0]):
        from stagebench.plan import Plan
        from stagebench.verify import run_verify

        require_gpu(snakemake.resources)
        paths = snakemake.config["paths"]
        plan_file, proof = Path(paths["results"], "plan.json"), f"verify/{snakemake.wildcards.proof}.json"
        plan = Plan.read(plan_file)
        require_planned(snakemake.params.settings, plan.verify_params(proof), plan_file)
        run_verify(plan, plan.verify_job(proof), Path(snakemake.output[0]), cache=Path(paths["cache"]))
