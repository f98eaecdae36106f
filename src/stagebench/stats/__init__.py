"""Ratios, intervals and verdict words over samples; what a ratio is made of; how far two models' outputs agree."""

from stagebench.stats.acceptance import Acceptance, acceptance, speculative_speedup
from stagebench.stats.clustering import MIN_BATCHES, Batches
from stagebench.stats.decomposition import PARTS, Decomposition, decompose
from stagebench.stats.estimates import (
    BOOTSTRAP_CLUSTERS,
    TAIL,
    Fit,
    Interval,
    Ratio,
    Verdict,
    cluster_interval,
    fit_line,
    mad,
    paired_ratio,
    quantile,
    student_t,
    tukey_outliers,
    verdict,
    withheld,
)
from stagebench.stats.unpaired import sequence_ratio, unpaired_ratio
from stagebench.stats.waiting import CPU_WAIT_MS, DISTURBED_SHARE, disturbed

__all__ = [
    "BOOTSTRAP_CLUSTERS",
    "CPU_WAIT_MS",
    "DISTURBED_SHARE",
    "MIN_BATCHES",
    "PARTS",
    "TAIL",
    "Acceptance",
    "Batches",
    "Decomposition",
    "Fit",
    "Interval",
    "Ratio",
    "Verdict",
    "acceptance",
    "cluster_interval",
    "decompose",
    "disturbed",
    "fit_line",
    "mad",
    "paired_ratio",
    "quantile",
    "sequence_ratio",
    "speculative_speedup",
    "student_t",
    "tukey_outliers",
    "unpaired_ratio",
    "verdict",
    "withheld",
]
