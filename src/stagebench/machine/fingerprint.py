"""What a machine is: two timings are of the same machine when their fingerprints' digests agree."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from stagebench.machine._nvml import ask, device_uuid, open_handle

__all__ = ["differences", "fingerprint", "host"]

_PACKAGES = (
    *("torch", "transformers", "tokenizers", "numpy", "pyarrow", "av", "pillow", "numba"),
    *("triton", "flash-attn", "torchao", "bitsandbytes"),
)


def fingerprint(device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """JSON-able: `cpu`, `gpu` (null on a CPU), `software`, and `digest` over these.

    Nothing in it changes between two runs on an unchanged machine (no current clocks, temperatures or free memory), and two nodes of
    the same build are the same machine (no host name, no serial number: those are `host`).
    """
    found: dict[str, Any] = {
        "cpu": _cpu(threads),
        "gpu": _gpu(device),
        "software": {name: _version(name) for name in _PACKAGES if _version(name)} | {"python": platform.python_version(), **_cuda(device)},
    }
    found["digest"] = hashlib.blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=8).hexdigest()
    return found


def host(device: str = "cpu") -> dict[str, Any]:
    """Which machine it was, which GPUs it was given, and how busy it was: for information, never compared.

    node: the name that a scheduler knows the machine by, where one started this process.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "name": platform.node(),
        "node": os.environ.get("SLURMD_NODENAME") or os.environ.get("NODE_NAME"),
        "scheduler_job": os.environ.get("SLURM_JOB_ID"),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpu_uuid": device_uuid(device),
        "os": platform.platform(),
        "load_average": load,
        "pid": os.getpid(),
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: a's value, b's value` for every entry that differs, nested keys joined by dots; digests left out."""
    lines: list[str] = []
    for key in sorted({*a, *b} - {"digest"}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {left!r}, {right!r}")
    return lines


def _cpu(threads: int | None) -> dict[str, Any]:
    return {
        "model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "governor": _sys("scaling_governor"),
        "max_khz": _sys("cpuinfo_max_freq"),
        "machine": platform.machine(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _sys(name: str) -> str | None:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq", name).read_text().strip()
    except OSError:
        return None


def _gpu(device: str) -> dict[str, Any] | None:
    if not device.startswith("cuda"):
        return None
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    found: dict[str, Any] = {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30),
        "sm_count": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }
    opened = open_handle(device)
    if opened is not None:
        nvml, handle = opened
        limit = ask(nvml.nvmlDeviceGetPowerManagementLimit, handle)
        found |= {
            "driver": ask(nvml.nvmlSystemGetDriverVersion),
            "power_limit_w": None if limit is None else limit / 1000,
            "max_sm_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
            "max_memory_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM),
            "application_sm_mhz": ask(nvml.nvmlDeviceGetApplicationsClock, handle, nvml.NVML_CLOCK_SM),
            "persistence": ask(nvml.nvmlDeviceGetPersistenceMode, handle),
        }
    return found


def _cuda(device: str) -> dict[str, Any]:
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
