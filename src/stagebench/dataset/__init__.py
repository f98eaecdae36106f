"""A dataset's index: clips and samples, their keys, and the guard that no path leaves the root."""

from stagebench.dataset.dataset import Clip, Dataset, Sample, Source, load_dataset, read_source
from stagebench.dataset.guard import folder_links, resolve

__all__ = ["Clip", "Dataset", "Sample", "Source", "folder_links", "load_dataset", "read_source", "resolve"]
