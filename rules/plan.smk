"""Shards, blocks and jobs, named by their content. The main process plans; jobs on this node and on others read its plan."""

import gc
import sys
from pathlib import Path

from stagebench.plan import Plan, build_plan
from stagebench.scripting import Ownership, failures, log_progress

# Scripts find these in snakemake.config: as params they would tie shards that studies share to one study's folder.
# With the prefix that another workflow may put before this one's paths, as Snakemake puts it before inputs and outputs.
config["paths"] = {
    name: workflow.pathvars.apply(
        workflow.modifier.path_modifier.replace_prefix(f"<{name}>")
    )
    for name in ("results", "cache")
}
PLAN_FILE = Path(config["paths"]["results"]) / "plan.json"

if workflow.is_main_process:
    PLAN = build_plan(
        CONFIG,
        Path(config["paths"]["cache"]),
        earlier=PLAN_FILE,
        progress=log_progress("hashed"),
    )
    # The graph that is made from it stays, too; looking through it for garbage took a tenth of a dry run of 11,000 jobs.
    gc.set_threshold(100_000, 20, 20)
    # A dry run beside a running study must not put another plan under its jobs, so the file is written when work starts;
    # a workflow that uses this one as a module does not run its onstart.
    if not workflow.modifier.is_main_snakefile() or not PLAN_FILE.exists():
        PLAN.write(PLAN_FILE)
    PLAN.write_basis(PLAN_FILE.parent)
else:
    PLAN = Plan.read(PLAN_FILE)


onstart:
    # Snakemake's own lock is the working directory's; this one also keeps out `stagebench run` and another checkout, and names the owner.
    workflow.results_owner = Ownership(PLAN_FILE.parent)
    PLAN.write(PLAN_FILE)
    PLAN.write_basis(PLAN_FILE.parent)


onerror:
    # With keep-going the run went on after a failure, whose message is by now far up.
    sys.stderr.write(failures(map(Path, log)))
