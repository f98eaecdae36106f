"""Locks, sensors and fingerprints, with a scripted NVML."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from stagebench import machine
from stagebench.errors import TimingError
from stagebench.machine import _nvml, devices, monitor
from stagebench.machine.devices import lock_one


def test_two_jobs_take_different_gpus(tmp_path):
    gpus = {"cuda:0": "GPU-a", "cuda:1": "GPU-b"}
    first, second = lock_one(gpus, tmp_path, 0), lock_one(gpus, tmp_path, 0)
    assert {first.device, second.device} == set(gpus)
    with pytest.raises(TimingError, match=f"taken by another timing job.*pid {os.getpid()}"):
        lock_one(gpus, tmp_path, 0)
    second.release()
    assert lock_one(gpus, tmp_path, 0).device == second.device


def test_the_same_gpu_under_another_number_is_the_same_gpu(tmp_path):
    """CUDA_VISIBLE_DEVICES renumbers: the lock goes by UUID."""
    held = lock_one({"cuda:1": "GPU-a"}, tmp_path, 0)
    with pytest.raises(TimingError):
        lock_one({"cuda:0": "GPU-a"}, tmp_path, 0)
    held.release()


def test_a_killed_job_gives_its_gpu_back(tmp_path):
    code = (
        "from pathlib import Path; import os; from stagebench.machine.devices import lock_one;"
        f"held = lock_one({{'cuda:0': 'GPU-a'}}, Path({str(tmp_path)!r}), 0); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert lock_one({"cuda:0": "GPU-a"}, tmp_path, 0).device == "cuda:0"


def test_a_waiting_job_gets_the_gpu_when_it_is_free(tmp_path, monkeypatch):
    held = lock_one({"cuda:0": "GPU-a"}, tmp_path, 0)
    monkeypatch.setattr(devices.time, "sleep", lambda s: held.release())
    assert lock_one({"cuda:0": "GPU-a"}, tmp_path, 5).device == "cuda:0"


def test_picking(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "visible_gpus", dict)
    assert machine.pick_device().device == "cpu"
    with pytest.raises(TimingError, match="no GPU is visible"):
        machine.pick_device("cuda")
    with pytest.raises(TimingError, match="expected cpu, cuda"):
        machine.pick_device("gpu0")
    monkeypatch.setattr(devices, "visible_gpus", lambda: {"cuda:0": "GPU-a"})
    with machine.pick_device(folder=tmp_path) as lease:
        assert lease.device == "cuda:0"
    with pytest.raises(TimingError, match=r"this process sees cuda:0"):
        machine.pick_device("cuda:3", folder=tmp_path)


class Nvml:
    """As much of pynvml as is asked for; some queries are not supported, as on many devices."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, reasons=0, pids=(), thermal=0):
        self.reasons, self.running, self.thermal = reasons, pids, thermal

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.reasons

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return 1980

    def nvmlDeviceGetTemperature(self, handle, kind):
        return 41

    def nvmlDeviceGetPowerUsage(self, handle):
        return 123_500

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetViolationStatus(self, handle, policy):
        return SimpleNamespace(violationTime=self.thermal)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid) for pid in self.running]


def watching(monkeypatch, nvml, before=None):
    monkeypatch.setattr(monitor, "open_handle", lambda device: (nvml, "handle"))
    return machine.Monitor("cuda:0", before)


def test_readings_and_missing_sensors(monkeypatch):
    reading = watching(monkeypatch, Nvml()).read()
    assert (reading.sm_clock_mhz, reading.temperature_c, reading.power_w, reading.energy_mj) == (1980, 41, 123.5, None)
    assert reading.throttles == () and reading.joules_since(reading) is None


@pytest.mark.parametrize(
    ("bits", "throttled"), [(0x1, False), (0x2, False), (0x4, False), (0x8, True), (0x20, True), (0x40, True), (0x84, True)]
)
def test_only_reasons_that_make_it_another_machine_count(monkeypatch, bits, throttled):
    sensors = watching(monkeypatch, Nvml())
    before = sensors.read()
    after = watching(monkeypatch, Nvml(reasons=bits)).read()
    assert bool(after.throttled_since(before)) is throttled


def test_throttling_between_the_borders_is_seen(monkeypatch):
    before = watching(monkeypatch, Nvml(thermal=100)).read()
    after = watching(monkeypatch, Nvml(thermal=5_000_100)).read()
    assert after.throttled_since(before) == ("thermal limit for 5 ms",)
    assert before.throttled_since(before) == ()


def test_neighbours(monkeypatch):
    assert watching(monkeypatch, Nvml(pids=(os.getpid(), 7))).neighbours() == (7,)
    assert watching(monkeypatch, Nvml(pids=(os.getpid(),))).neighbours() == ()
    # in a container: host pids, ours unknown; what was there before us is a neighbour
    assert watching(monkeypatch, Nvml(pids=(70001, 70002)), before={70001}).neighbours() == (70001,)
    assert watching(monkeypatch, Nvml(pids=(70002,)), before=()).neighbours() == ()


@pytest.mark.parametrize("own", [os.getpid(), 70002])
def test_a_neighbour_that_came_or_left_meanwhile_is_one(monkeypatch, own):
    nvml, clock = Nvml(), [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    sensors = watching(monkeypatch, nvml, before={70001})
    for at, running in [(0.0, (own, 70001)), (0.5, (own, 80000)), (1.5, (own,)), (3.0, (own, 90000)), (4.5, (own,))]:
        clock[0], nvml.running = at, running
        sensors.look_around()
    assert sensors.neighbours() == (70001, 90000)  # 80000 came and went within a second


def test_of_two_that_came_at_once_one_is_a_neighbour(monkeypatch):
    sensors = watching(monkeypatch, Nvml(pids=(70002, 70003)), before=())
    assert len(sensors.neighbours()) == 1


def test_a_cpu_has_no_sensors():
    sensors = machine.Monitor("cpu")
    assert not sensors.present and replace(sensors.read(), waits=None) == machine.Reading() and sensors.neighbours() == ()


def test_nvml_that_fails_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(_nvml, "device_uuid", lambda device: "GPU-none")
    assert _nvml.open_handle("cuda:0") is None
    assert "NVML" in caplog.text


def test_fingerprint_is_stable_and_says_what_differs():
    first, again = machine.fingerprint("cpu", 2), machine.fingerprint("cpu", 2)
    assert first == again and first["gpu"] is None and first["cpu"]["model"]
    other = machine.fingerprint("cpu", 3)
    assert other["digest"] != first["digest"]
    assert machine.differences(first, other) == ["cpu.threads: 2, 3"]
    assert machine.differences(first, again) == []


@pytest.mark.parametrize("package", ["flash-attn", "triton", "torchao", "bitsandbytes"])
def test_a_kernel_package_of_another_version_is_another_machine(monkeypatch, package):
    module = sys.modules["stagebench.machine.fingerprint"]  # as an attribute it is the function
    installed = module.version

    def digest(found):
        monkeypatch.setattr(module, "version", lambda name: found if name == package else installed(name))
        return machine.fingerprint("cpu", 2)["digest"]

    assert digest("1.0") == digest("1.0") != digest("2.0")


def test_the_host_is_information_only():
    assert not {"name", "load_average"} & set(machine.fingerprint("cpu"))
    assert machine.host("cpu")["name"]


def test_anchor_and_its_drift():
    first = machine.anchor("cpu")
    assert set(first) == {"matmul_ms", "stream_ms"} and all(v > 0 for v in first.values())
    assert machine.anchor_drift({"a": 10.0, "b": 5.0}, {"a": 11.0, "b": 5.0}) == pytest.approx(0.1)
    assert machine.anchor_drift({"a": 11.0}, {"a": 10.0}) == pytest.approx(0.1)
    assert machine.anchor_drift({"a": 1.0}, {"b": 2.0}) == 0.0


def test_bandwidth_is_a_bandwidth():
    assert 1e8 < machine.bandwidth("cpu") < 1e13


def test_cpu_share_of_others_leaves_our_own_work_out():
    import time

    share = machine.CpuShare()
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    assert 0 <= share.others() <= 1
