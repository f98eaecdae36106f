"""Values of the commands' flags, refused in words where they are wrong."""

from __future__ import annotations

import typer

__all__ = ["device", "names", "sensor"]


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def device(text: str | None) -> str | None:
    """A device that torch has here; what it has not would end in a traceback amid the study."""
    if text is None:
        return None
    import torch

    kind, _, number = text.partition(":")
    if kind not in ("cpu", "cuda") or ((number or text.endswith(":")) and not number.isdecimal()):
        raise typer.BadParameter(f"{text!r}: expected cpu, cuda or cuda:N", param_hint="--device")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= devices:
        has = f"{devices} CUDA devices" if devices else "no CUDA device"
        raise typer.BadParameter(f"{text!r}: torch {torch.__version__} sees {has}; `stagebench doctor` says more", param_hint="--device")
    return text


def sensor(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) for p in parts):
        raise typer.BadParameter(f"{text!r}: expected HEIGHTxWIDTH, as in 480x640", param_hint="--sensor")
    return int(parts[0]), int(parts[1])
