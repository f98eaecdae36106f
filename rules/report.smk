"""Figures and the report, from merged results alone."""


rule report:
    input:
        "<results>/timings.parquet",
        "<results>/summary.json",
    output:
        report(
            "<results>/report.html",
            caption="captions/page.rst",
            category="Report",
            labels={"page": "report"},
        ),
        report(
            directory("<results>/figures"),
            patterns=["{figure}.svg"],
            caption="captions/figures.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        "<logs>/report.log",
    benchmark:
        "<benchmarks>/report.tsv"
    conda:
        "../envs/report.yaml"
    params:
        settings=PLAN.report_params(),
    script:
        "../scripts/report.py"
