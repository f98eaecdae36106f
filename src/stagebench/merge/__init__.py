"""Timing rows -> merged rows, tables, summary.json and the old system's results file."""

from stagebench.merge.merge import MergeReport, merge

__all__ = ["MergeReport", "merge"]
