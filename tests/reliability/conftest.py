"""What the reliability tests share: a small study, a small full disk, and processes that can be killed at any moment."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clip_study import write_dataset
from stagebench.config import Config, load_config

KILLABLE = """
import os, sys, time
sys.path[:0] = {path!r}
{imports}
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        {body}
        os._exit(0)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(status, flush=True)
"""


class Killable:
    """A program that has imported what it needs and forks a child for each run: a kill costs no second start."""

    def __init__(self, imports: str, body: str, *arguments: object) -> None:
        code = KILLABLE.format(path=[str(Path(__file__).parents[1])], imports=imports, body=body.replace("\n", "\n        "))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._line() == "ready"

    def run(self, seconds: float | None = None, until: Callable[[], bool] | None = None) -> int:
        """One run, killed by SIGKILL after that time, or when `until` says so; the wait status."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        pid = int(self._line())
        if until is not None:
            while not until():
                time.sleep(0.002)
        elif seconds is not None:
            time.sleep(seconds)
        if until is not None or seconds is not None:
            with contextlib.suppress(ProcessLookupError):  # it was done before its time
                os.kill(pid, signal.SIGKILL)
        return int(self._line())

    def _line(self) -> str:
        line = self.process.stdout.readline().strip()
        assert line, "the program ended"
        return line

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def small(root: Path, **sections: Any) -> Config:
    """One tiny model on video frames of `root`."""
    stanza = {"adapter": "hf", "input": "frames", "frames_as": "first", "weights": "dummy:0", "preset": "tiny"}
    return load_config(
        {
            "study": "small",
            "datasets": {"d": {"root": str(root), "index": "index.json", "sensor": [48, 64]}},
            "frames": {"count": 2},
            "models": {"llava": stanza},
            "timing": {"warmup": 0, "repeats": 1, "lengths": [3], "max_new_tokens": 3, "plain_share": 0},
            "compare": {"resamples": 200},
            **sections,
        }
    )


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six short clips. Not to be changed."""
    root = tmp_path_factory.mktemp("clips") / "data"
    write_dataset(root, 6)
    return root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
