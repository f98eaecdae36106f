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
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.base import Reader, folder
from fuzz.readers import READERS

FINDINGS = Path(__file__).parent / "findings"
SECONDS = 20
"""An input that takes longer is a finding. Of CPU: a run may wait for days behind others."""
HANGS, SLEEPS = 60, 1800
"""A worker that stays at one input for so many seconds of CPU, or of anything, is killed, and the input is a finding."""
CONTEXT = multiprocessing.get_context("fork")
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
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            shared[2] += reader.holds(data)
        except BaseException:
            _keep(reader, seed, number, traceback.format_exc())
            shared[3] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        shared[1] += 1


def _keep(reader: Reader, seed: int, number: int, why: str) -> None:
    path = FINDINGS / f"{reader.name}-{seed}-{number}"
    path.write_bytes(reader.make(random.Random(f"{reader.name} {seed} {number}")))
    path.with_suffix(".txt").write_text(why)


def _worker(reader: Reader, seed: int, numbers: range, end: float, shared: Any) -> None:
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGPROF, _late)
    for number in range(3):  # imports, before memory is limited
        with contextlib.suppress(Exception):
            reader.holds(reader.make(random.Random(number)))
    _limit()
    _work(reader, seed, numbers, end, shared)


class _Worker:
    """A process on some of the inputs. It is started again behind an input that ended it, or that it does not come back from."""

    def __init__(self, reader: Reader, seed: int, numbers: range, end: float) -> None:
        self.shared = CONTEXT.RawArray("q", 4)
        self.numbers = numbers
        self._made = (reader, seed)
        self._end = end
        self._done_before = (0, 0, 0)
        self.totals = (0, 0, 0)
        self._over = False
        self._start()

    def _start(self) -> None:
        self.shared[:] = [self.numbers.start, 0, 0, 0]
        self._moved, self._used, self._at = time.monotonic(), 0.0, -1
        self._process = CONTEXT.Process(target=_worker, args=(*self._made, self.numbers, self._end, self.shared))
        self._process.start()

    def poll(self) -> bool:
        """Whether it still works; `totals` becomes (done, taken, findings)."""
        if self._over:
            return False
        code = self._process.exitcode
        if code is None and self._at == self.shared[1] and self._stays():
            self._process.kill()  # in C, where no Python signal handler runs
            self._process.join()
            code = self._process.exitcode
        elif code is None and self._at != self.shared[1]:
            self._moved, self._used, self._at = time.monotonic(), _cpu(self._process.pid), self.shared[1]
        self.totals = tuple(map(sum, zip(self._done_before, self.shared[1:], strict=True)))
        if code is None:
            return True
        if code == 0:
            self._over = True
            return False
        done, taken, found = self.totals
        self._done_before = self.totals = (done + 1, taken, found + 1)
        # in a process of its own: this one forks, and must not have threads of Arrow or polars
        keeper = CONTEXT.Process(target=_keep, args=(*self._made, self.shared[0], f"the process ended with {code}\n"))
        keeper.start()
        keeper.join()
        self.numbers = range(self.shared[0] + self.numbers.step, self.numbers.stop, self.numbers.step)
        if not self.numbers:
            self._over = True
            return False
        self._start()
        return True

    def _stays(self) -> bool:
        return _cpu(self._process.pid) - self._used > HANGS or time.monotonic() - self._moved > SLEEPS


def _cpu(pid: int | None) -> float:
    """Seconds that a process has computed; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fuzz(reader: Reader, numbers: range, seed: int, jobs: int, limit: float) -> int:
    begin = said = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    workers = [_Worker(reader, seed, numbers[first::jobs], begin + limit) for first in range(jobs)]
    while [worker for worker in workers if worker.poll()]:
        time.sleep(0.2)
        if time.monotonic() - said > 60:
            said = time.monotonic()
            sys.stderr.write(f"{reader.name}: {sum(w.totals[0] for w in workers):,} after {said - begin:,.0f} s\n")
    done, taken, found = (sum(values) for values in zip(*(worker.totals for worker in workers), strict=True))
    seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sys.stdout.write(
        f"{reader.name}: {done:,} inputs in {seconds:,.0f} s, {cpu:,.0f} s of CPU ({done / cpu:,.0f}/s), {taken:,} taken, "
        f"{done - taken - found:,} refused, {found} findings\n"
    )
    sys.stdout.flush()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of each reader")
    parser.add_argument("--reader", action="append", choices=READERS, help="all when not given")
    parser.add_argument("--first", type=int, default=0, help="number of the first input: where an earlier run ended")
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
    folder()  # before the first fork, so that it is every worker's
    numbers = range(given.first, given.first + given.inputs)
    found = [_fuzz(READERS[name], numbers, given.seed, given.jobs, given.seconds) for name in given.reader or READERS]
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
