"""A process that is kept from its CPU notices."""

import os
import subprocess
import sys
import time

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
        assert spin(0.5) > 100, "half of the time should have gone to the other process"
    finally:
        os.sched_setaffinity(0, mine)
        other.kill()
        other.wait()


def test_the_longest_wait_counts_and_new_threads_count_whole() -> None:
    assert waiting.waited_ms({1: 5_000_000, 2: 0}, {1: 6_000_000, 2: 4_000_000, 3: 1_500_000}) == pytest.approx(4.0)
    assert waiting.waited_ms({1: 0, 9: 7}, {1: 0}) == 0.0, "a thread that ended takes its wait along"


@pytest.mark.parametrize("readings", [(None, {1: 1}), ({1: 1}, None)])
def test_nothing_is_said_where_the_kernel_says_nothing(readings: tuple[dict[int, int] | None, dict[int, int] | None]) -> None:
    assert waiting.waited_ms(*readings) is None


def test_no_such_file_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_TASKS", "/nowhere")
    assert waiting.read_waits() is None
