"""Datasets in the layout of docs/dataset.md, made from DSEC recordings or from plain MP4 files."""

from stagebench.building._clips import parse_duration
from stagebench.building.dsec import from_dsec
from stagebench.building.video import from_video

__all__ = ["from_dsec", "from_video", "parse_duration"]
