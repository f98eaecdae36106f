"""The synthetic dataset: moving shapes as MP4 and as the events that a camera would see."""

from stagebench.demo.dataset import INDEX, QUESTION, write_demo

__all__ = ["INDEX", "QUESTION", "write_demo"]
