"""A bounded run of the fuzzers in tests/fuzz; `make fuzz` is the long one."""

import logging
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.mutate import changed_bytes, changed_value
from fuzz.base import Broken, Reader
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
