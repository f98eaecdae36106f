"""A real Slurm on loopback: controller, a CPU node and two GPU nodes with fake GPUs, for the length of the session."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PACKAGES = "slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
DAEMONS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")


@dataclass(frozen=True)
class Slurm:
    """The running cluster."""

    folder: Path

    def jobs(self) -> dict[str, dict[str, str]]:
        """State, node and rule of every job that the controller remembers, by id."""
        text = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%A|%T|%N|%k"], capture_output=True, text=True, check=True).stdout
        rows = [line.split("|") for line in text.splitlines()]
        return {row[0]: {"state": row[1], "node": row[2], "rule": row[3]} for row in rows}

    def kill_node(self, node: str) -> list[int]:
        """As a power cut does it: the node's daemon first, so that it tells nobody, then all that runs there. Returns the pids."""
        daemon = int((self.folder / f"slurmd.{node}.pid").read_text())
        os.kill(daemon, signal.SIGKILL)
        tasks = [pid for pid in _processes() if _environment(pid, "SLURMD_NODENAME") == node]
        steps = {parent for pid in tasks if (parent := _parent(pid)) and _name(parent) == "slurmstepd"}
        killed = sorted({*steps, *tasks})
        for pid in killed:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return [daemon, *killed]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Skips, saying why, where no Slurm can be started."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES} (make test-cluster does it as root)")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of two nodes on one machine is started by root only: run make test-cluster as root")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        up = subprocess.run([HERE / "slurm-up.sh", folder], capture_output=True, text=True, timeout=60)
        if up.returncode:
            pytest.skip(f"Slurm did not start here: {up.stdout}{up.stderr}")
        yield Slurm(folder)
    finally:
        subprocess.run([HERE / "slurm-down.sh", folder], timeout=120)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int, name: str) -> str | None:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = [entry.partition(b"=")[2].decode() for entry in entries if entry.startswith(f"{name}=".encode())]
    return found[0] if found and b"SLURM_CLUSTER_NAME=stagebench" in entries else None


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
