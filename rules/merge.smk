"""Timing files of the plan, and no others, into one table of rows and the tables made from it."""


rule merge:
    input:
        timings=[f"<results>/{job.path}" for job in PLAN.jobs],
        proofs=[f"<results>/{path}" for path in PLAN.verify_paths],
    output:
        "<results>/timings.parquet",
        "<results>/summary.json",
        "<results>/legacy_results.json",
        tables=expand(
            "<results>/tables/{table}.{suffix}",
            table=("stages", "comparison", "load", "optimisations", "failures"),
            suffix=("csv", "md", "tex", "parquet"),
        ),
    log:
        "<logs>/merge.log",
    benchmark:
        "<benchmarks>/merge.tsv"
    conda:
        "../envs/report.yaml"
    params:
        settings=PLAN.merge_params(),
    script:
        "../scripts/merge.py"
