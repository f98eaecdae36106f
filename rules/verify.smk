"""The proof that a model's decoupled stages compute what the model computes. It reads clips live: a shard that changes proves nothing anew."""


rule verify:
    output:
        "<results>/verify/{proof}.json",
    log:
        "<logs>/verify/{proof}.log",
    benchmark:
        "<benchmarks>/verify/{proof}.tsv"
    conda:
        "../envs/timing.yaml"
    threads: timing_threads()
    resources:
        gpu=1,
        mem_mb=scaled(32000),
        runtime=scaled(60),
    params:
        settings=lambda wildcards: PLAN.verify_params(f"verify/{wildcards.proof}.json"),
    script:
        "../scripts/verify.py"
