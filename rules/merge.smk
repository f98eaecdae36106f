"""Timing files of the plan, and no others, into one table of rows and the tables made from it."""

TABLES = ("stages", "comparison", "axis", "load", "optimisations", "failures")


rule merge:
    input:
        timings=[f"<results>/{job.path}" for job in PLAN.jobs],
        proofs=[f"<results>/{path}" for path in PLAN.verify_paths],
        # new where one of these was made, or is planned, otherwise: for results of which Snakemake has no records
        basis=f"<results>/{PLAN.basis}",
    output:
        "<results>/timings.parquet",
        "<results>/summary.json",
        "<results>/legacy_results.json",
        expand(
            "<results>/tables/{table}.{suffix}",
            table=TABLES,
            suffix=("md", "tex", "parquet"),
        ),
        # these stand in `snakemake --report`
        *[
            report(
                f"<results>/tables/{table}.csv",
                caption=f"captions/{table}.rst",
                category="Tables",
                labels={"table": table},
            )
            for table in TABLES
        ],
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
