"""From a dataset's content to shards, blocks and jobs: names are digests of what is inside."""

from stagebench.plan.model import BlockPlan, DatasetPlan, Leaf, ShardPlan, TimingJob
from stagebench.plan.raw import raw_files
from stagebench.plan.specs import SHARD_FORMAT, Kind, Variant, extraction_spec, origin
from stagebench.plan.study import Plan, build_plan

__all__ = [
    "SHARD_FORMAT",
    "BlockPlan",
    "DatasetPlan",
    "Kind",
    "Leaf",
    "Plan",
    "ShardPlan",
    "TimingJob",
    "Variant",
    "build_plan",
    "extraction_spec",
    "origin",
    "raw_files",
]
