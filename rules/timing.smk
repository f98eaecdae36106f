"""One model in one variant over one block of samples, alone on its device.

Shards are ancient(): one that holds something else has another name, and one that was pruned and made again holds what it held.
"""


rule timing:
    input:
        lambda wildcards: [
            ancient(f"<cache>/{name}.parquet")
            for name in PLAN.job(**wildcards).block.shards
        ],
    output:
        "<results>/timings/{dataset}/{model}/{variant}/{block}.parquet",
    log:
        "<logs>/timings/{dataset}/{model}/{variant}/{block}.log",
    benchmark:
        "<benchmarks>/timings/{dataset}/{model}/{variant}/{block}.tsv"
    conda:
        "../envs/timing.yaml"
    threads: timing_threads()
    resources:
        gpu=1,
        mem_mb=scaled(32000),
        runtime=scaled(240),
        slurm_extra=whole_node(),
    params:
        settings=lambda wildcards: PLAN.timing_params(PLAN.job(**wildcards)),
    script:
        "../scripts/timing.py"
