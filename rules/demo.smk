"""The demo's dataset: a rendered driving scene as MP4 clips and simulated events."""

from pathlib import Path

DEMO_ROOT = "resources/demo"
DEMO_INDEX = f"{DEMO_ROOT}/EventGPT_Instruction_Subset.json"

# The plan is made from the dataset's content while this file is read, so the dataset must be there by then.
if (
    any(Path(d.root) == Path(DEMO_ROOT) for d in CONFIG.datasets.values())
    and not Path(DEMO_INDEX).exists()
):
    from stagebench.demo import write_demo

    write_demo(Path(DEMO_ROOT))


rule demo_data:
    output:
        DEMO_INDEX,
    log:
        "<logs>/demo_data.log",
    conda:
        "../envs/extract.yaml"
    script:
        "../scripts/demo_data.py"
