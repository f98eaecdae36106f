"""`make fuzz`: many inputs a reader, in processes of their own, so that a crash of a library is a finding too.

    python -m fuzz --inputs 1000000 --jobs 2 --reader npy --reader index

Prints a line a reader. A finding is kept under tests/fuzz/findings/ with its trace; the exit code is 1 when there is one.
Every input follows from reader, seed and number: `--replay tests/fuzz/findings/<file>` reads one again.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.readers import READERS, Reader

FINDINGS = Path(__file__).parent / "findings"
SECONDS = 20
"""An input that takes longer is a finding."""
EXTRA_BYTES = 2 << 30
"""Address space that reading may take beyond what the process has at the start; more raises MemoryError, which is a finding."""


def _late(number: int, frame: Any) -> None:
    raise TimeoutError(f"an input took more than {SECONDS} s")


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, resource.RLIM_INFINITY))


def _work(reader: Reader, seed: int, numbers: range, end: float, shared: Any) -> None:
    """Read these inputs; shared: [at, done, taken, findings] for the parent, also when this process is killed."""
    for number in numbers:
        if time.monotonic() > end:
            break
        data = reader.make(random.Random(f"{reader.name} {seed} {number}"))
        shared[0] = number
        signal.alarm(SECONDS)
        try:
            shared[2] += reader.holds(data)
        except BaseException:
            _keep(reader, seed, number, traceback.format_exc())
            shared[3] += 1
        finally:
            signal.alarm(0)
        shared[1] += 1


def _keep(reader: Reader, seed: int, number: int, why: str) -> None:
    path = FINDINGS / f"{reader.name}-{seed}-{number}"
    path.write_bytes(reader.make(random.Random(f"{reader.name} {seed} {number}")))
    path.with_suffix(".txt").write_text(why)


def _worker(reader: Reader, seed: int, numbers: range, end: float, shared: Any) -> None:
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _late)
    for number in range(3):  # imports, before memory is limited
        with contextlib.suppress(Exception):
            reader.holds(reader.make(random.Random(number)))
    _limit()
    _work(reader, seed, numbers, end, shared)


def _fuzz(reader: Reader, inputs: int, seed: int, jobs: int, limit: float) -> int:
    begin = time.monotonic()
    context = multiprocessing.get_context("fork")
    due = [range(first, inputs, jobs) for first in range(jobs)]
    done = taken = found = 0
    while due:
        running = []
        for numbers in due:
            shared = context.RawArray("q", 4)
            process = context.Process(target=_worker, args=(reader, seed, numbers, begin + limit, shared))
            process.start()
            running.append((process, numbers, shared))
        due = []
        for process, numbers, shared in running:
            process.join()
            done, taken, found = done + shared[1], taken + shared[2], found + shared[3]
            if process.exitcode:  # a library crashed: that input is a finding, the rest goes on
                _keep(reader, seed, shared[0], f"the process ended with {process.exitcode}\n")
                done, found = done + 1, found + 1
                rest = range(shared[0] + numbers.step, numbers.stop, numbers.step)
                due += [rest] if rest else []
    seconds = time.monotonic() - begin
    sys.stdout.write(
        f"{reader.name}: {done:,} inputs in {seconds:,.0f} s ({done / seconds:,.0f}/s), {taken:,} taken, {done - taken - found:,} "
        f"refused, {found} findings\n"
    )
    sys.stdout.flush()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of each reader")
    parser.add_argument("--reader", action="append", choices=READERS, help="all when not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each reader at most")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--replay", type=Path, help="a file from findings/")
    given = parser.parse_args()
    if given.replay:
        reader = READERS[given.replay.name.split("-")[0]]
        sys.stdout.write("taken\n" if reader.holds(given.replay.read_bytes()) else "refused\n")
        return 0
    FINDINGS.mkdir(exist_ok=True)
    found = [_fuzz(READERS[name], given.inputs, given.seed, given.jobs, given.seconds) for name in given.reader or READERS]
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
