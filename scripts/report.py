"""Rule report: figures and report.html."""

from pathlib import Path
from typing import TYPE_CHECKING

from stagebench.scripting import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

if __name__ == "__main__":
    with job(snakemake.log[0]):
        from stagebench.plan import Plan
        from stagebench.report import write_report

        results = Path(snakemake.config["paths"]["results"])
        write_report(results, title=Plan.read(results / "plan.json").config.report.title)
