"""A dataset's index: clips and samples, their keys, and the guard that no path leaves the root."""

from stagebench.dataset.dataset import Clip, Dataset, Sample, load_dataset, resolve

__all__ = ["Clip", "Dataset", "Sample", "load_dataset", "resolve"]
