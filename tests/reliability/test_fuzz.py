"""A bounded run of the fuzzers in tests/fuzz; `make fuzz` is the long one."""

import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz.__main__ as harness
from fuzz.base import Broken, Reader
from fuzz.mutate import changed_bytes, changed_value
from fuzz.readers import CONFIG, READERS
from stagebench.errors import StoreError

EXAMPLES = {"npy": 400, "index": 400, "shard": 150, "resealed": 300, "config": 300, "results": 150}


@pytest.mark.parametrize("name", EXAMPLES)
def test_any_input_is_taken_or_refused_by_an_error_of_ours(name: str) -> None:
    reader = READERS[name]
    logging.disable(logging.WARNING)
    try:

        @settings(max_examples=EXAMPLES[name], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.integers(0, 2**63))
        def run(seed: int) -> None:
            reader.holds(reader.make(random.Random(seed)))

        run()
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", EXAMPLES)
def test_inputs_are_neither_all_good_nor_all_bad(name: str) -> None:
    """A fuzzer whose inputs all fail at the first byte tests nothing."""
    reader = READERS[name]
    logging.disable(logging.WARNING)
    taken = sum(reader.holds(reader.make(random.Random(seed))) for seed in range(60))
    logging.disable(logging.NOTSET)
    assert 0 < taken < 60


def test_a_fault_is_a_finding() -> None:
    def broken(data: bytes) -> None:
        if b"x" in data:
            raise RecursionError

    def silent(data: bytes) -> None:
        raise StoreError("")

    with pytest.raises(RecursionError):
        Reader("broken", lambda rng: b"x", broken, (StoreError,)).holds(b"x")
    with pytest.raises(Broken):
        Reader("silent", lambda rng: b"x", silent, (StoreError,)).holds(b"x")


def test_inputs_follow_from_the_seed() -> None:
    assert changed_bytes([b"abc" * 50], random.Random(5)) == changed_bytes([b"abc" * 50], random.Random(5))
    assert changed_value(CONFIG, random.Random(5)) == changed_value(CONFIG, random.Random(5))
    assert len({changed_bytes([b"abc" * 50], random.Random(i)) for i in range(200)}) > 150


def test_the_harness_outlives_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An input that ends the process, one that is never done, in Python or in C: each is kept, and the others are read all the same."""
    monkeypatch.setattr(harness, "FINDINGS", tmp_path)
    monkeypatch.setattr(harness, "SECONDS", 1)
    monkeypatch.setattr(harness, "HANGS", 2)

    def read(data: bytes) -> None:
        what = int(data)
        if what == 0:
            os.abort()
        if what == 1:
            raise RecursionError
        if what in (2, 3):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF] if what == 3 else [])
            while True:
                pass
        if what % 2:
            raise StoreError("odd")

    def make(rng: random.Random) -> bytes:
        return b"%d" % rng.randrange(30)

    wanted = [int(make(random.Random(f"rough 0 {number}"))) for number in range(60)]
    bad = sum(what < 4 for what in wanted)
    assert {0, 1, 2, 3} <= set(wanted)
    assert harness._fuzz(Reader("rough", make, read, (StoreError,)), range(60), 0, 2, float("inf")) == bad
    assert capsys.readouterr().out.startswith("rough: 60 inputs")
    kept = {int(path.name.split("-")[2]) for path in tmp_path.glob("rough-0-*") if path.suffix != ".txt"}
    assert kept == {number for number, what in enumerate(wanted) if what < 4}


@pytest.mark.parametrize("name", ["npy", "index", "config"])
def test_coverage_guided(name: str, repo: Path) -> None:
    """The target starts, reaches code beyond its seeds' first bytes, and finds nothing in a few hundred inputs."""
    pytest.importorskip("atheris", reason="atheris is not installed: pip install -r tests/fuzz/requirements.txt")
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.guided", name, "-runs=300", "-seed=1"], cwd=repo / "tests", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stderr.rpartition("cov: ")[2].split()[0]) > 50
