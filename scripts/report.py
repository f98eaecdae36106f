"""Rule report: figures and report.html."""

from pathlib import Path
from typing import TYPE_CHECKING

from stagebench.scripting import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

if __name__ == "__main__":
    with job(snakemake.log[0]):
        from stagebench.report import write_report

        write_report(Path(snakemake.output[0]).parent)
