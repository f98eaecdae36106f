"""The host-bound share: what counts as the device's work."""

from types import SimpleNamespace
from typing import Any

import pytest

from stagebench.session.busy import busy_by_stage, device_busy

DeviceType = SimpleNamespace(CPU=SimpleNamespace(name="CPU"), CUDA=SimpleNamespace(name="CUDA"))
"""As the profiler's events name their devices; the enumeration itself is in no public module of torch."""


def event(name: str, start: float, end: float, device: Any = DeviceType.CUDA, **more: Any) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device, **more)


def test_gaps_between_kernels_are_not_work() -> None:
    """us: two streams overlap, the device idles, a copy of another stage follows; the mark's own shadow on the device is no work."""
    events = [
        event("stagebench:encode", 0, 1000, DeviceType.CPU),
        event("stagebench:decode", 1000, 3000, DeviceType.CPU),
        event("aten::mm", 0, 990, DeviceType.CPU),
        event("stagebench:encode", 90, 910, is_user_annotation=True),
        event("gemm", 100, 300),
        event("gemm", 200, 400),
        event("gemm", 800, 900),
        event("Memcpy HtoD", 2000, 2100),
    ]
    busy, launches = busy_by_stage(events)
    assert busy == pytest.approx({"encode": 0.4, "decode": 0.1}) and launches == 4


def test_a_cpu_has_no_share() -> None:
    assert device_busy(SimpleNamespace(device="cpu"), [], None) is None  # type: ignore[arg-type]
