"""Faults of the machine: a GPU that throttles, neighbours on it and on the host, another machine under a job that goes on."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from stagebench import machine
from stagebench.machine import monitor as sensors
from stagebench.rows import Code
from timing_jobs import Killed, killed_after


class Nvml:
    """A scripted GPU under a job that runs on the CPU. Readings come two a run: before and after it."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, **changes: Any) -> None:
        self.reads = 0
        self.pids: tuple[int, ...] = ()
        self.throttled: Any = lambda run: 0
        self.mhz: Any = lambda run: 1980
        self.__dict__.update(changes)

    @property
    def run(self) -> int:
        return (self.reads - 1) // 2

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self.reads += 1
        return int(self.throttled(self.run))

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return int(self.mhz(self.run))

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 40

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 200_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        """200 W, in steps of 1 ms."""
        return int(time.perf_counter() * 1e3) * 200

    def nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> Any:
        return SimpleNamespace(violationTime=0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(**changes: Any) -> Nvml:
        nvml = Nvml(**changes)
        monkeypatch.setattr(sensors, "open_handle", lambda device: (nvml, "handle"))
        return nvml

    return install


def test_throttled_runs_are_discarded_and_counted(timed: Any, gpu: Any) -> None:
    gpu(throttled=lambda run: 0x40 if run in (2, 5) else 0)
    result = timed()
    assert [n for n, bad in enumerate(result.marked(Code.DISCARDED_THROTTLED)) if bad] == [2, 5]
    assert "hardware thermal slowdown" in result.rows[2]["reason"]


def test_a_machine_that_only_throttles_is_invalid_and_has_no_nan(timed: Any, gpu: Any) -> None:
    gpu(throttled=lambda run: 0x08)
    result = timed()
    assert all(result.marked(Code.DISCARDED_THROTTLED)) and "none of 9 rows is usable" in result.text(Code.INVALID_NO_ACCEPTED)
    assert not result.report.valid and all(row["total_ms"] == row["total_ms"] for row in result.rows)


def test_a_clock_that_drops_is_discarded(timed: Any, gpu: Any) -> None:
    gpu(mhz=lambda run: 1200 if run == 4 else 1980)
    result = timed()
    assert [n for n, bad in enumerate(result.marked(Code.DISCARDED_CLOCK)) if bad] == [4]


def test_a_clock_that_dropped_before_a_kill_is_discarded(timed: Any, gpu: Any) -> None:
    nvml = gpu(mhz=lambda run: 1200 if run == 2 else 1980)
    with pytest.raises(Killed):
        timed(progress=killed_after(5))
    nvml.mhz = lambda run: 1980
    result = timed()
    assert result.report.resumed == 5
    assert [n for n, bad in enumerate(result.marked(Code.DISCARDED_CLOCK)) if bad] == [2]
    assert result.text(Code.DISCARDED_CLOCK)


def test_neighbours_are_named_by_pid(timed: Any, gpu: Any) -> None:
    gpu(pids=(machine.host("cpu")["pid"], 4242))
    result = timed()
    assert "pids 4242" in result.text(Code.WARN_NEIGHBOURS) and all(result.marked(Code.WARN_NEIGHBOURS))


def test_a_neighbour_that_left_before_the_end_is_named(timed: Any, gpu: Any) -> None:
    own = machine.host("cpu")["pid"]
    nvml = gpu(pids=(own, 4242))
    result = timed(progress=lambda done, of: setattr(nvml, "pids", (own,)))
    assert "pids 4242" in result.text(Code.WARN_NEIGHBOURS) and all(result.marked(Code.WARN_NEIGHBOURS))


def test_what_a_gpu_does_not_show_is_said(timed: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that hides processes, a driver without throttle reasons: no warning must not mean that nothing was there."""
    gpu(throttled=lambda run: 1 / 0)
    unseen = sensors.Monitor.unseen

    def on_a_gpu(self: Any) -> Any:
        self.device = "cuda:0"
        return unseen(self)

    monkeypatch.setattr(sensors.Monitor, "unseen", on_a_gpu)
    assert "does not show throttle reasons, other processes" in timed().text(Code.WARN_UNSEEN)


def test_a_stage_has_an_energy_only_where_the_counter_can_tell_it(timed: Any, gpu: Any, adapted: Any) -> None:
    """Counter steps of 1 ms: encode lasts 100 of them, h2d none. A coarser counter tells neither."""

    def encode(own: Any, inputs: Any) -> Any:
        time.sleep(0.1)
        return own(inputs)

    adapted(encode=encode)
    nvml = gpu()
    result = timed()
    assert result.job["energy_counter"]["period_ms"] == pytest.approx(1, rel=0.5)
    for row in result.rows:
        assert row["encode_energy_j"] == pytest.approx(200 * row["encode_ms"] * 1e-3, rel=0.1)
        assert row["h2d_energy_j"] is None and row["load_energy_j"] is None
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: int(time.perf_counter() * 1e3 / 40) * 40 * 200  # type: ignore[method-assign]
    coarse = timed()
    assert coarse.job["energy_counter"]["period_ms"] == pytest.approx(40, rel=0.3)
    assert all(row["encode_energy_j"] is None for row in coarse.rows)


def test_the_queries_are_those_of_the_real_library() -> None:
    asked = ("CurrentClocksEventReasons", "CurrentClocksThrottleReasons", "ComputeRunningProcesses", "TotalEnergyConsumption")
    asked += ("ViolationStatus", "ClockInfo", "Temperature", "PowerUsage", "HandleByUUID", "PowerManagementLimit")
    assert [name for name in asked if not hasattr(pynvml, f"nvmlDeviceGet{name}")] == []


def test_a_busy_host_is_said(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (64.0, 64.0, 64.0))
    assert "load average 64.0" in timed().text(Code.WARN_LOAD_AVERAGE)


def test_a_neighbour_on_our_cpu_is_said(timed: Any) -> None:
    """Two processes that never rest share one core with the job: it has a third of the time."""
    if machine.read_waits() is None:
        pytest.skip("this kernel has no schedstat")
    mine = os.sched_getaffinity(0)
    core = min(mine)
    burn = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(2)]
    try:
        os.sched_setaffinity(0, {core})
        found = timed()
    finally:
        os.sched_setaffinity(0, mine)
        for other in others:
            other.kill()
            other.wait()
    assert any(found.marked(Code.WARN_CPU_WAIT))
    assert sum(row["cpu_wait_ms"] for row in found.rows) > 0.3 * sum(row["total_ms"] for row in found.rows)


def test_another_governor_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"scaling_governor": "performance"}
    monkeypatch.setattr(sys.modules["stagebench.machine.fingerprint"], "_sys", sets.get)
    fast = machine.fingerprint("cpu")
    sets["scaling_governor"] = "powersave"
    slow = machine.fingerprint("cpu")
    assert fast["digest"] != slow["digest"] and machine.differences(fast, slow) == ["cpu.governor: 'performance', 'powersave'"]


def test_a_resume_on_another_machine_starts_again_and_says_so(
    timed: Any, runs: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        timed(progress=killed_after(3))
    own = machine.fingerprint
    monkeypatch.setattr(machine, "fingerprint", lambda *a: own(*a) | {"digest": "another", "cpu": {"model": "another"}})
    with caplog.at_level(logging.WARNING):
        result = timed()
    assert result.report.resumed == 0 and len(result.rows) == runs and not any(result.marked(Code.RESUMED))
    assert "machine changed" in caplog.text and "starts again from its first sample" in caplog.text
    assert list(tmp_path.glob("*.aside"))
