"""Fixtures shared by unit and workflow tests."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real event clips, real MP4s and the EventGPT parity fixture; STAGEBENCH_REAL_DATA says where they are."""
    path = Path(os.environ.get("STAGEBENCH_REAL_DATA", REPO.parent / "shared" / "data"))
    if not (path / "real").is_dir():
        pytest.skip(f"no real data at {path}: set STAGEBENCH_REAL_DATA")
    return path
