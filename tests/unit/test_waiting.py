"""A process that is kept from its CPU notices."""

import os
import subprocess
import sys
import threading
import time
from hashlib import sha256

import pytest

from stagebench.machine import waiting

BURN = "import os, time\nos.sched_setaffinity(0, {int(__import__('sys').argv[1])})\nprint(flush=True)\nwhile True: pass"


def spin(seconds: float) -> float:
    before, end = waiting.read_waits(), time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    waited = waiting.waited_ms(before, waiting.read_waits())
    assert waited is not None
    return waited


@pytest.mark.skipif(waiting.read_waits() is None, reason="this kernel has no schedstat")
def test_a_neighbour_on_the_same_core_is_seen() -> None:
    core = min(os.sched_getaffinity(0))
    mine = os.sched_getaffinity(0)
    other = subprocess.Popen([sys.executable, "-c", BURN, str(core)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        os.sched_setaffinity(0, {core})
        assert 100 < spin(0.5) <= 500, "half of the time should have gone to the other process"
    finally:
        os.sched_setaffinity(0, mine)
        other.kill()
        other.wait()


@pytest.mark.skipif(waiting.read_waits() is None, reason="this kernel has no schedstat")
def test_our_own_threads_are_no_neighbours() -> None:
    """Two busy threads of this process on one core: each stands ready for half of the time, and is not charged to others."""
    data = b"x" * (1 << 20)

    def work(end: float) -> None:
        while time.monotonic() < end:
            sha256(data)  # without the interpreter's lock, which nobody waits for on a run queue

    def shares() -> tuple[float, float]:
        """Of the wall time: what the slower thread waited, and what of it others are charged with."""
        before, end = waiting.read_waits(), time.monotonic() + 0.4
        other = threading.Thread(target=work, args=(end,))
        other.start()
        work(end)
        after = waiting.read_waits()
        other.join()
        assert before is not None and after is not None
        wall = (after.at_ns - before.at_ns) * 1e-6
        raw = max(t.waited_ns - (before.threads[n].waited_ns if n in before.threads else 0) for n, t in after.threads.items())
        return raw * 1e-6 / wall, (waiting.waited_ms(before, after) or 0.0) / wall

    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(mine)})
        seen = [shares() for _ in range(5)]
    finally:
        os.sched_setaffinity(0, mine)
    # with k others on that core, for the test machine may be busy, a thread waits (1 + k) / (2 + k) and others can have had k / (2 + k)
    assert any(raw > 0.3 and raw - charged > 0.2 for raw, charged in seen), seen


def reading(at_ms: float, cpu_ms: float, cpus: int = 1, **waited: float) -> waiting.Waits:
    """Keyword t<n>: what thread n has waited, in ms; a thread has run for as long as the clock says, 0 when it never waited."""
    threads = {
        int(name[1:]): waiting.Thread(int(at_ms * 1e6) if ms else 0, int(ms * 1e6), frozenset(range(cpus))) for name, ms in waited.items()
    }
    return waiting.Waits(threads, int(cpu_ms * 1e6), int(at_ms * 1e6))


def test_the_longest_wait_counts_and_new_threads_count_whole() -> None:
    after = reading(100, 20, t1=6, t2=4, t3=1.5)
    assert waiting.waited_ms(reading(0, 0, t1=5, t2=0), after) == pytest.approx(4.0)
    assert waiting.waited_ms(reading(0, 0, t1=0, t9=7), reading(100, 20, t1=0)) == 0.0, "a thread that ended takes its wait along"


def test_others_had_no_more_than_we_left() -> None:
    begin = reading(0, 0, cpus=2, t1=0, t2=0)
    assert waiting.waited_ms(begin, reading(100, 150, cpus=2, t1=0, t2=50)) == pytest.approx(50), "one of two cores was shared with another"
    assert waiting.waited_ms(begin, reading(100, 200, cpus=2, t1=40, t2=50)) == 0.0, "we had both all the time"
    assert waiting.waited_ms(begin, reading(100, 201, cpus=2, t1=40, t2=50)) == 0.0, "clocks of CPU time run a little apart"


@pytest.mark.parametrize("readings", [(True, False), (False, True)])
def test_nothing_is_said_where_the_kernel_says_nothing(readings: tuple[bool, bool]) -> None:
    before, after = (reading(0, 0, t1=1) if there else None for there in readings)
    assert waiting.waited_ms(before, after) is None


def test_no_such_file_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_TASKS", "/nowhere")
    assert waiting.read_waits() is None
