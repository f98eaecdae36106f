"""stagebench: stage-by-stage latency of vision-language models, in numbers that can be published."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("stagebench")
except PackageNotFoundError:  # a source tree on PYTHONPATH, as on an offline GPU machine
    __version__ = "0.1.0"

__all__ = ["__version__"]
