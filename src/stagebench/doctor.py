"""What works on this machine, and what to do about what does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `needed` says whether the demo fails without it."""

    name: str
    works: bool
    detail: str
    remedy: str = ""
    needed: bool = False


def examine(cache: Path) -> list[Finding]:
    """Look at everything the pipeline may use. Never raises for what is missing."""
    return [_python(), *_packages(), _torch(), _compiler(), _nvml(), _codecs(), _hdf5(), _disk(cache), _memory(), _governor(), _slurm()]


def _python() -> Finding:
    return Finding("Python", True, f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores", needed=True)


def _packages() -> list[Finding]:
    found = []
    for name, needed, remedy in (
        ("transformers", True, "pip install -c constraints.txt -e '.[all]'"),
        ("snakemake", False, "pip install 'stagebench[workflow]', or use `stagebench run`"),
        ("pyarrow", True, "pip install -c constraints.txt -e '.[all]'"),
        ("polars", True, "pip install -c constraints.txt -e '.[all]'"),
        ("numba", False, "pip install numba: without it events are rendered by numpy, about 5 times slower"),
        ("altair", False, "pip install 'stagebench[report]': without it there are no figures"),
    ):
        try:
            importlib.import_module(name)
            found.append(Finding(name, True, importlib.metadata.version(name), needed=needed))
        except Exception as error:  # a broken package fails in many ways; all mean "does not work here"
            found.append(Finding(name, False, f"{type(error).__name__}: {error}", remedy, needed))
    return found


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:
        return Finding("torch", False, f"{type(error).__name__}: {error}", "pip install torch", needed=True)
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return Finding(
            "CUDA",
            False,
            f"torch {torch.__version__} ({built}) sees no GPU",
            "models run on the CPU: fine for the demo, not for publishing",
        )
    try:
        found = []
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            found.append(f"{torch.cuda.get_device_name(i)} ({free / 2**30:.0f} of {total / 2**30:.0f} GiB free)")
    except Exception as error:  # a device that another process holds exclusively, or a driver that is too old
        return Finding("CUDA", False, f"{type(error).__name__}: {error}", "nvidia-smi shows who holds the device and the driver's version")
    return Finding("CUDA", True, f"torch {torch.__version__}, {', '.join(found)}")


def _compiler() -> Finding:
    """The engine fused and the packed weights are Triton kernels, which are compiled here."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding("Triton", False, "not installed", "only needed for the engine fused on a GPU")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return Finding("Triton", False, f"{version}, and no C compiler", "only needed for the engine fused: install gcc, or set CC")
    return Finding("Triton", True, f"{version}, {compiler}")


def _nvml() -> Finding:
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        driver = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except Exception as error:
        return Finding("NVML", False, str(error), "without it there are no clocks, power, temperature or throttle checks")
    return Finding("NVML", True, f"driver {driver}, {count} GPUs")


def _codecs() -> Finding:
    try:
        import av

        wanted = ("h264", "hevc", "av1", "vp9", "mpeg4")
        have = [name for name in wanted if name in av.codecs_available]
    except Exception as error:
        return Finding("video codecs", False, f"{type(error).__name__}: {error}", "pip install av", needed=True)
    return Finding(
        "video codecs", "h264" in have, f"PyAV {av.__version__}: {', '.join(have)}", "install a PyAV wheel with h264", needed=True
    )


def _hdf5() -> Finding:
    try:
        import h5py
        import hdf5plugin
    except ImportError as error:
        return Finding("DSEC HDF5", False, str(error), "pip install 'stagebench[events]'")
    return Finding("DSEC HDF5", True, f"h5py {h5py.__version__}, hdf5plugin {hdf5plugin.version} (blosc)")


def _disk(cache: Path) -> Finding:
    folder = cache
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    # 8 frames of 640x480 and five event frames
    samples = free // (8 * 640 * 480 * 3 + 70_000)
    writable = os.access(folder, os.W_OK)
    detail = f"{free / 2**30:.0f} GiB free at {folder}: about {samples:,} clips of 8 frames at 640x480"
    return Finding(
        "cache disk",
        writable and free > 2**30,
        detail,
        "set the cache folder to a disk with room: --cache-dir, or the cache pathvar",
        needed=True,
    )


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    return Finding("memory", free > 2 * 2**30, f"{free / 2**30:.1f} GiB available", "close other programs: tiny models need about 2 GiB")


def _governor() -> Finding:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        governor = path.read_text().strip()
    except OSError:
        return Finding("CPU governor", True, "not exposed here (a virtual machine, or not Linux)")
    return Finding("CPU governor", governor == "performance", governor, "cpupower frequency-set -g performance, for steadier host times")


def _slurm() -> Finding:
    if not shutil.which("sbatch"):
        return Finding("Slurm", False, "no sbatch on PATH", "only needed for --profile profiles/slurm")
    try:
        version = importlib.metadata.version("snakemake-executor-plugin-slurm")
    except importlib.metadata.PackageNotFoundError:
        return Finding("Slurm", False, "sbatch is there, the executor plugin is not", "pip install 'stagebench[slurm]'")
    return Finding("Slurm", True, f"executor plugin {version}")
