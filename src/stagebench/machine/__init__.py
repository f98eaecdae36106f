"""The machine under measurement: what it is, which device is free, what its sensors say, how fast a fixed workload runs."""

from stagebench.machine.anchor import ANCHOR_BOUND, anchor, anchor_drift, bandwidth
from stagebench.machine.devices import Lease, pick_device
from stagebench.machine.energy import ENERGY_PERIODS, EnergyCounter, energy_counter
from stagebench.machine.fingerprint import differences, fingerprint, host
from stagebench.machine.monitor import CpuShare, Monitor, Reading
from stagebench.machine.waiting import Waits, read_waits, waited_ms

__all__ = [
    "ANCHOR_BOUND",
    "ENERGY_PERIODS",
    "CpuShare",
    "EnergyCounter",
    "Lease",
    "Monitor",
    "Reading",
    "Waits",
    "anchor",
    "anchor_drift",
    "bandwidth",
    "differences",
    "energy_counter",
    "fingerprint",
    "host",
    "pick_device",
    "read_waits",
    "waited_ms",
]
