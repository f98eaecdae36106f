"""report.html and the figures of a merged study."""

from stagebench.report.page import write_report

__all__ = ["write_report"]
