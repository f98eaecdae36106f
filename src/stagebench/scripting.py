"""What the scripts of Snakemake's rules share: a log file, and errors that end a job with their message instead of a wall of trace.

With `keep-going` a run goes on for long after a failure: `failures` gathers what failed and why, for the run's last lines.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stagebench._ownership import Ownership
from stagebench.errors import ConfigError, PlanError, StagebenchError

__all__ = ["Ownership", "failures", "job", "log_progress", "require_gpu", "require_planned"]

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


_EVENT = re.compile(r"^Error in rule (?P<rule>[^:,\n]+).*\n(?P<body>(?:[ \t]+.*\n)*)|^Finished jobid: (?P<done>\d+)", re.M)
"""What Snakemake's log says of a job that failed, and of one that was finished."""
_LAST_BYTES = 64 << 10


def failures(logs_of_run: Iterable[Path], folder: Path = Path()) -> str:
    """What failed for good in a run of Snakemake, each with its cause; empty when nothing did.

    logs_of_run: Snakemake's own logs. folder: its working directory. A job that failed and then succeeded is not named; a cause is the end
    of the job's log, which `job` writes.
    """
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in logs_of_run if path.is_file())
    failed: dict[str, tuple[str, str]] = {}
    for event in _EVENT.finditer(text):
        if event["rule"] is None:
            failed.pop(event["done"], None)
            continue
        found = {key: re.search(rf"^\s+{key}: (.*?)(?: \(check log.*)?$", event["body"], re.M) for key in ("jobid", "output", "log")}
        jobid, output, log_file = (match[1] if match else "" for match in found.values())
        failed[jobid] = (f"{event['rule']} {output.split(', ')[0]}", log_file.split(", ")[0])
    if not failed:
        return ""
    by_cause: dict[str, list[tuple[str, str]]] = {}
    for name, log_file in failed.values():
        by_cause.setdefault(_cause(folder / log_file) if log_file else "it has no log", []).append((name, log_file))
    lines = [f"stagebench: {len(failed)} {'job' if len(failed) == 1 else 'jobs'} failed, and what needs them did not run."]
    for cause, jobs in by_cause.items():
        lines.append(f"  {cause}")
        lines += [f"      {name}{f' (log: {log_file})' if log_file else ''}" for name, log_file in jobs]
    lines.append("Correct this and run the same command again: what is finished stays.")
    return "\n".join(lines) + "\n"


def _cause(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LAST_BYTES))
            lines = file.read().decode("utf-8", "replace").rstrip().splitlines()
    except OSError:
        return "its log is not there: it was not started, or another node could not write it"
    # a message may have several lines; the first of them begins with the error's class
    for number in range(len(lines) - 1, max(-1, len(lines) - 30), -1):
        if re.match(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b", lines[number]):
            return "\n  ".join(lines[number:])
    last = f" Its last line: {lines[-1]}" if lines else ""
    return f"it ended without a message: killed, by the machine's memory or its scheduler?{last}"


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


def require_planned(asked: str, planned: str, plan: Path) -> None:
    """Refuse a job whose settings in the plan on disk are not those that Snakemake made it with, and will note as what was measured.

    asked: the job's params. planned: the same by the plan. Raises PlanError.
    """
    if asked != planned:
        raise PlanError(
            f"{plan}: not the plan that this job was made with. It is written when work starts, by a hook of Snakemake's (--no-hooks?), "
            "and by any run of a workflow that has this one as a module, a dry run too. Run snakemake again."
        )
