# stagebench: stage-by-stage latency of vision-language models.
#
#   snakemake --cores 8 --resources gpu=1                                        the demo
#   snakemake --cores 8 --resources gpu=1 --configfile config/dsec_1s.yaml       a study of your own
#
# A study's settings are its config file (keys: docs/config.md); threads, resources and executors are the profile's (profiles/);
# where files go are the pathvars below, which another workflow or `--config pathvars=...` may set.

from snakemake.utils import min_version

min_version("9.20")

# Not merged with a study's own file: the demo's datasets and models are not part of it.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


include: "rules/common.smk"


pathvars:
    results=f"results/{CONFIG.study}",
    cache="cache",
    logs="<results>/logs",
    benchmarks="<results>/benchmarks",


include: "rules/demo.smk"
include: "rules/plan.smk"
include: "rules/extract.smk"
include: "rules/verify.smk"
include: "rules/timing.smk"
include: "rules/merge.smk"
include: "rules/report.smk"


localrules:
    all,
    merge,
    report,


rule all:
    default_target: True
    input:
        "<results>/report.html",
        # a merge that failed has left the report as it was, and Snakemake a record that makes its inputs look merged
        "<results>/summary.json",
