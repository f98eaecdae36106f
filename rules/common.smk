"""The validated configuration, what names may look like, and what jobs on a device share."""

from stagebench import engines
from stagebench.config import load_config

# `pathvars` is Snakemake's own key; all others are the study's.
CONFIG = load_config(
    {key: value for key, value in config.items() if key not in ("pathvars", "paths")}
)
engines.require(*CONFIG.variants.engine)


wildcard_constraints:
    kind="frames|events",
    spec_id="[a-z]+-[0-9]+-[0-9a-f]{8}|[0-9]+-[a-z]+-[0-9a-f]{8}|clip-[0-9a-f]{8}",
    bucket="root|[01]+",
    digest="[0-9a-f]{16}",
    dataset="[A-Za-z0-9][A-Za-z0-9_.-]*",
    model="[A-Za-z0-9][A-Za-z0-9_.-]*",
    variant="[A-Za-z0-9][A-Za-z0-9_.-]*-[0-9a-f]{8}",
    block="(root|[01]+)-[0-9a-f]{16}",
    proof="[A-Za-z0-9][A-Za-z0-9_.@-]*",


def timing_threads():
    """All cores of the machine when nothing may run beside a measurement; else each device's fair part of them."""
    cores = workflow.resource_settings.cores or 1
    given = workflow.global_resources.get("gpu")
    devices = getattr(given, "value", given) or 1
    return cores if CONFIG.timing.exclusive else max(1, cores // devices)


def scaled(amount):
    """A resource that grows with each attempt: what a scheduler killed for its time or memory gets more of both."""
    return lambda wildcards, attempt: amount * attempt


def whole_node():
    """Slurm's word for timing.exclusive, which cores and `gpu` say on one machine: no other job on the node of a measurement."""
    return "--exclusive" if CONFIG.timing.exclusive else ""
