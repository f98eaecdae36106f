"""Rule report: figures and report.html."""

from pathlib import Path
from typing import TYPE_CHECKING

from stagebench.scripting import job, require_planned

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

if __name__ == "__main__":
    with job(snakemake.log[0]):
        from stagebench.plan import Plan
        from stagebench.report import write_report

        results = Path(snakemake.config["paths"]["results"])
        plan = Plan.read(results / "plan.json")
        require_planned(snakemake.params.settings, plan.report_params(), results / "plan.json")
        write_report(results, title=plan.config.report.title)
