"""One shard: all clips of a leaf, decoded or rendered once.

A shard's raw files are not declared as inputs. Its name is a digest over their content, so that says when it must be made, and says it
through touching, copying and moving the dataset; declared paths would have it made again for another root (`input` trigger), stop the
workflow for one missing file, and cost the parser a million files at a million clips.
"""


rule extract:
    output:
        "<cache>/{kind}/{spec_id}/{bucket}-{digest}.parquet",
    log:
        "<logs>/extract/{kind}/{spec_id}/{bucket}-{digest}.log",
    benchmark:
        "<benchmarks>/extract/{kind}/{spec_id}/{bucket}-{digest}.tsv"
    conda:
        "../envs/extract.yaml"
    threads: 4
    resources:
        mem_mb=scaled(4000),
        runtime=scaled(120),
    script:
        "../scripts/extract.py"
