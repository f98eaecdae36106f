"""Timing jobs: warm-up, repeats, order, validity, journal."""

from stagebench.session import validity
from stagebench.session.build import Limits
from stagebench.session.core import Outcome, Settings, time_samples
from stagebench.session.job import JobReport, run_job
from stagebench.session.journal import Journal
from stagebench.session.model import load_adapter
from stagebench.session.order import Task
from stagebench.session.run import DeviceLostError, Subject
from stagebench.session.validity import Finding

__all__ = [
    "DeviceLostError",
    "Finding",
    "JobReport",
    "Journal",
    "Limits",
    "Outcome",
    "Settings",
    "Subject",
    "Task",
    "load_adapter",
    "run_job",
    "time_samples",
    "validity",
]
