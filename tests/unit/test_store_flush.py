"""Bytes flushed to the disk beside the writing: a lost write is told, and the thread ends with the file."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from stagebench.errors import StoreError
from stagebench.store import ClipRow, Shard, ShardWriter, _flush


def rows(count: int = 6) -> list[ClipRow]:
    return [ClipRow.from_frames(f"c{i}", "d", np.full((2, 20, 30, 3), i, np.uint8)) for i in range(count)]


def test_flushes_beside_the_writing_and_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = threading.Event()
    real = os.fdatasync
    monkeypatch.setattr(_flush, "_STEP", 5000)
    monkeypatch.setattr(_flush.os, "fdatasync", lambda fd: (real(fd), flushed.set()))
    with ShardWriter(tmp_path / "a.parquet", "frames", {}) as writer:
        for row in rows():
            writer.add(row)
        assert flushed.wait(10)
    assert not [t for t in threading.enumerate() if t.name == "flush"]
    with Shard.open(tmp_path / "a.parquet") as shard:
        assert len(shard.clips) == 6


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Every flush says that a write was lost; set once one has."""
    failed = threading.Event()

    def lost(fd: int) -> None:
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(_flush.os, "fdatasync", lost)
    return failed


def test_a_write_lost_behind_the_writers_back_fails_the_shard(
    tmp_path: Path, failed: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports it to one fsync of a file only: the last one would succeed."""
    monkeypatch.setattr(_flush, "_STEP", 5000)
    with pytest.raises(StoreError, match="Input/output error"), ShardWriter(tmp_path / "a.parquet", "frames", {}) as writer:
        for row in rows():
            writer.add(row)
        assert failed.wait(10)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_ends_the_thread_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flush, "_STEP", 5000)
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "a.parquet", "frames", {}) as writer:
        for row in rows():
            writer.add(row)
        raise ZeroDivisionError
    assert not [t for t in threading.enumerate() if t.name == "flush"]
    assert list(tmp_path.iterdir()) == []


def test_a_lost_write_of_a_file_that_is_written_again_leaves_nothing(
    tmp_path: Path, failed: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip of another size begins a second file; the first one's error must not keep it and its descriptor."""
    monkeypatch.setattr(_flush, "_STEP", 1)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StoreError, match="Input/output error"), ShardWriter(tmp_path / "a.parquet", "frames", {}) as writer:
        writer.add(rows(1)[0])
        assert failed.wait(10)
        writer.add(ClipRow.from_frames("other", "d", np.zeros((2, 40, 30, 3), np.uint8)))
    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_without_a_thread_to_be_had_the_shard_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_flush, "_STEP", 5000)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with ShardWriter(tmp_path / "a.parquet", "frames", {}) as writer:
            for row in rows():
                writer.add(row)
    with Shard.open(tmp_path / "a.parquet") as shard:
        assert len(shard.clips) == 6
