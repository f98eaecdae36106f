"""Sensors of the device, read at sample borders and never inside a timed window."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import psutil

from stagebench.machine._nvml import ask, open_handle
from stagebench.machine.waiting import Waits, read_waits, waited_ms

__all__ = ["CpuShare", "Monitor", "Reading"]

_THROTTLES = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons that make a measurement another machine's. The software power cap (0x04) is the power limit as
set: a property of the machine, in its fingerprint. Idle, application clocks, sync boost and display settings are none."""

_VIOLATIONS = {"power": 0, "thermal": 1}
"""NVML_PERF_POLICY_*: cumulative nanoseconds for which the clocks were held down. They see what an instant's reading misses."""


@dataclass(frozen=True)
class Reading:
    """One look at the sensors. None where the device has no such sensor."""

    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    energy_mj: int | None = None
    """Since the driver was loaded, in millijoules."""
    throttles: tuple[str, ...] = ()
    thermal_ns: int | None = None
    """Time for which heat held the clocks down, since the driver was loaded."""
    power_cap_ns: int | None = None
    waits: Waits | None = None
    """What each thread of this process ran, and for how long it stood ready without a CPU."""

    def throttled_since(self, before: Reading) -> tuple[str, ...]:
        """Why the clocks were held down at either border or between them; empty when they were not."""
        reasons = [*before.throttles, *self.throttles]
        if self.thermal_ns is not None and before.thermal_ns is not None and self.thermal_ns > before.thermal_ns:
            reasons.append(f"thermal limit for {(self.thermal_ns - before.thermal_ns) * 1e-6:.0f} ms")
        return tuple(dict.fromkeys(reasons))

    def joules_since(self, before: Reading) -> float | None:
        if self.energy_mj is None or before.energy_mj is None:
            return None
        return (self.energy_mj - before.energy_mj) * 1e-3

    def waited_ms_since(self, before: Reading) -> float | None:
        return waited_ms(before.waits, self.waits)


_LOOK_EVERY_S = 1.0
"""Between two looks for other processes on the device."""


class Monitor:
    """NVML of one device, and what the kernel tells of this process; on a CPU the latter alone.

    before: pids that were on the device before this process made its context. In a container NVML tells host pids, and then
        they are the only way to know which one is ours.
    """

    def __init__(self, device: str, before: Collection[int] | None = None) -> None:
        self.device = device
        self._before = None if before is None else frozenset(before)
        self._own: int | None = None
        """What NVML calls this process, once it has been found out."""
        self._others: set[int] = set()
        self._looked = float("-inf")
        self._nvml: tuple[Any, Any] | None = open_handle(device)

    @property
    def present(self) -> bool:
        return self._nvml is not None

    def read(self, *, closing: bool = False) -> Reading:
        """All sensors. What is counted up is read last before a window, and first after it (closing): between the two is the sample."""
        if self._nvml is None:
            return Reading(waits=read_waits())
        nvml, handle = self._nvml
        counted = (self.energy_mj(), read_waits()) if closing else None
        reasons = self._reasons() or 0
        power = ask(nvml.nvmlDeviceGetPowerUsage, handle)
        found = Reading(
            sm_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            temperature_c=ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else power * 1e-3,
            throttles=tuple(name for bit, name in _THROTTLES.items() if reasons & bit),
            thermal_ns=self._violation("thermal"),
            power_cap_ns=self._violation("power"),
        )
        waits, energy = (counted[1], counted[0]) if counted is not None else (read_waits(), self.energy_mj())
        return replace(found, waits=waits, energy_mj=energy)

    def energy_mj(self) -> int | None:
        """The energy counter alone, in mJ since the driver was loaded."""
        if self._nvml is None:
            return None
        nvml, handle = self._nvml
        value = ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        return None if value is None else int(value)

    def unseen(self) -> tuple[str, ...]:
        """What a rule looks at and this device does not show, while a context of ours is on it; empty on a CPU, which has no such rules."""
        if not self.device.startswith("cuda"):
            return ()
        if self._nvml is None:
            return ("clocks", "throttle reasons", "other processes")
        nvml, handle = self._nvml
        missing = [] if ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM) is not None else ["clocks"]
        if self._reasons() is None:
            missing.append("throttle reasons")
        if not self.pids():  # ours at least is there
            missing.append("other processes")
        return tuple(missing)

    def _reasons(self) -> int | None:
        """NVML calls them event reasons from driver 535 on, throttle reasons before, and either may be missing."""
        if self._nvml is None:
            return None
        nvml, handle = self._nvml
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            reasons = ask(getattr(nvml, name, _missing), handle)
            if reasons is not None:
                return int(reasons)
        return None

    def pids(self) -> frozenset[int]:
        """Processes that compute on the device, ours among them; empty in a container that hides them."""
        if self._nvml is None:
            return frozenset()
        nvml, handle = self._nvml
        return frozenset(int(p.pid) for p in ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ())

    def look_around(self) -> None:
        """Take note of other processes on the device, at most once a second: between runs, while a context of ours is there."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            self._look()

    def neighbours(self) -> tuple[int, ...]:
        """Pids of other processes on the device, now or at an earlier look."""
        self._look()
        return tuple(sorted(self._others))

    def _look(self) -> None:
        now = self.pids()
        if not now:
            return
        came = now - self._before if self._before is not None else now
        if os.getpid() in now:
            self._own = os.getpid()
        elif self._own not in now:  # pids of another namespace: ours is the one that came
            self._own = min(came) if len(came) == 1 else None
        if self._own is not None:
            self._others |= now - {self._own}
        else:  # of several that came one is ours: which one cannot be told, that there are others can
            self._others |= (now - came) | set(sorted(came)[1:])

    def _violation(self, policy: str) -> int | None:
        if self._nvml is None:
            return None
        nvml, handle = self._nvml
        status = ask(nvml.nvmlDeviceGetViolationStatus, handle, _VIOLATIONS[policy])
        return None if status is None else int(status.violationTime)


def _missing(*_: Any) -> Any:
    raise AttributeError("this pynvml has no such query")


class CpuShare:
    """What other processes took of the CPUs since this object was made."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.monotonic(), _busy_s(), _own_s()

    def others(self) -> float:
        """Share of all cores' time, 0 to 1, that went to other processes."""
        wall = time.monotonic() - self._wall
        if wall <= 0:
            return 0.0
        spent = (_busy_s() - self._busy) - (_own_s() - self._own)
        return min(1.0, max(0.0, spent / (wall * (psutil.cpu_count() or 1))))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own_s() -> float:
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system
