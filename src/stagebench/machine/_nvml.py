"""NVML's handle of a torch device. NVML and CUDA count devices differently, so the way between them is the UUID."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


def device_uuid(device: str) -> str | None:
    """`cuda:1` -> "GPU-…"; None for a CPU, or where torch does not tell."""
    if not device.startswith("cuda"):
        return None
    import torch

    try:
        uuid = getattr(torch.cuda.get_device_properties(torch.device(device)), "uuid", None)
    except (AssertionError, RuntimeError):  # torch without CUDA, or a number that no device has
        return None
    return None if uuid is None else f"GPU-{uuid}"


def open_handle(device: str) -> tuple[Any, Any] | None:
    """(pynvml, handle) of a torch device, or None where there is no NVML for it (CPU, MIG slice, no driver)."""
    uuid = device_uuid(device)
    if uuid is None:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception as error:  # NVML fails in its own ways on each driver; without it we measure on, and say so
        log.warning("%s: NVML cannot be used (%s). Clocks, power, throttling and other processes go unseen.", device, error)
        return None


def ask(query: Callable[..., Any], *arguments: Any) -> Any:
    """One NVML query, or None where this device does not support it."""
    try:
        return query(*arguments)
    except Exception:  # NVMLError_NotSupported and its many kin, by driver and device
        return None
