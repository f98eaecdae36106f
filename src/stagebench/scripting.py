"""What the scripts of Snakemake's rules share: a log file, and errors that end a job with their message instead of a wall of trace."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stagebench._ownership import Ownership
from stagebench.errors import ConfigError, StagebenchError

__all__ = ["Ownership", "job", "log_progress", "require_gpu"]

log = logging.getLogger(__name__)
PROGRESS_STEPS = 20


@contextmanager
def job(logfile: str) -> Iterator[logging.Logger]:
    """Run a script's work with stagebench's log in the rule's log file; what went wrong stands last there and on stderr.

    A StagebenchError ends the process with status 1 and its message; any other exception leaves its trace in the log and goes on.
    """
    path = Path(logfile)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield logging.getLogger("stagebench.job")
    except StagebenchError as error:
        message = f"{type(error).__name__}: {error}"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{message}\n")
        sys.stderr.write(f"{message}\n(log: {path})\n")
        raise SystemExit(1) from None
    except BaseException:
        log.exception("stopped by an unexpected error; please report it with this log")
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


def log_progress(what: str) -> Callable[[int, int], None]:
    """A progress callback that writes a line to stderr at every twentieth of the way, and none for a handful of files."""

    def tell(done: int, total: int) -> None:
        if total >= PROGRESS_STEPS and (done == total or done % max(1, total // PROGRESS_STEPS) == 0):
            sys.stderr.write(f"stagebench: {what} {done} of {total} files\n")

    return tell


def require_gpu(resources: Any) -> None:
    """Refuse a timing job that Snakemake gave no `gpu`: it scales `gpu=0` and needs above its limit down without a word.

    Raises ConfigError.
    """
    found = getattr(resources, "gpu", None)
    if found != 1:
        raise ConfigError(
            f"resources.gpu of this job is {found!r}, expected 1: Snakemake was given none to hand out. "
            "Run with --resources gpu=1 (also on a machine without a GPU, where it keeps measurements from running side by side)."
        )
