"""Figures and the report, from merged results alone."""


rule report:
    input:
        "<results>/timings.parquet",
        "<results>/summary.json",
    output:
        "<results>/report.html",
    log:
        "<logs>/report.log",
    benchmark:
        "<benchmarks>/report.tsv"
    conda:
        "../envs/report.yaml"
    script:
        "../scripts/report.py"
