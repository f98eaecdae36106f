"""Reads from the mapped file: the same bytes as by system calls, and never a read that could end the process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from stagebench.errors import StoreError
from stagebench.store import ClipRow, Shard, ShardWriter, _mapping


def frames(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 200, 301, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "a.parquet", "frames", {"count": 3}) as writer:
        for i in range(12):
            writer.add(ClipRow.from_frames(f"c{i}", "d", frames(i)))
        writer.add(ClipRow.failed("bad", "d", "no frames"))
    return tmp_path / "a.parquet"


def by_system_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is read by them from now on; probes for memory are not counted."""
    sizes: list[int] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if not flags:
            sizes.append(sum(len(b) for b in buffers))
        return real(fd, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return sizes


@pytest.mark.parametrize("mapped", [True, False])
def test_a_verified_shard_is_read_from_its_mapping(path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    if not mapped:
        monkeypatch.setattr(_mapping, "_file_system", lambda path: "nfs4")
    with Shard.open(path) as shard:
        assert (shard._mapping is not None) is mapped
        read = by_system_calls(monkeypatch)
        for i in (5, 0, 11):
            assert np.array_equal(np.stack(shard.frames(f"c{i}")), frames(i))
            assert shard.frames(f"c{i}")[0].flags.writeable
        assert (sum(read) == 0) is mapped


def test_an_unverified_shard_is_not_mapped(path: Path) -> None:
    with Shard.open(path, verify=False) as shard:
        assert shard._mapping is None and shard.view("c0") is None
        assert np.array_equal(np.stack(shard.frames("c0")), frames(0))


def test_views_are_the_files_own_bytes(path: Path) -> None:
    with Shard.open(path) as shard:
        view = shard.view("c3")
        assert view is not None and shard._mapping is not None
        assert np.shares_memory(view[0], shard._mapping.data) and not view[0].flags.writeable
        with pytest.raises(StoreError, match="no frames"):
            shard.view("bad")
    path.unlink()
    assert np.array_equal(np.stack(view), frames(3))  # closed, and the file's name gone


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_clips_have_no_view_and_come_back(tmp_path: Path, codec: str) -> None:
    with ShardWriter(tmp_path / "a.parquet", "frames", {}, codec=codec) as writer:
        writer.add(ClipRow.from_frames("a", "d", frames(1)))
    with Shard.open(tmp_path / "a.parquet") as shard:
        assert shard.view("a") is None
        assert np.array_equal(np.stack(shard.frames("a")), frames(1))


def test_a_file_cut_while_in_use_is_an_error_and_no_signal(path: Path) -> None:
    with Shard.open(path) as shard:
        os.truncate(path, path.stat().st_size // 2)
        assert np.array_equal(np.stack(shard.frames("c0")), frames(0))
        with pytest.raises(StoreError, match="cut while in use"):
            shard.frames("c11")


def test_bytes_outside_the_file_are_not_held(path: Path) -> None:
    with Shard.open(path) as shard:
        assert shard._mapping is not None and shard._mapping.holds(0, path.stat().st_size)
        for begin, size in ((-8, 4), (-8, 0), (0, path.stat().st_size + 1)):
            assert not shard._mapping.holds(begin, size)


def test_what_left_the_memory_is_read_by_system_calls(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError
        return real(fd, buffers, at, flags)

    with Shard.open(path) as shard:
        monkeypatch.setattr(os, "preadv", preadv)
        assert shard.view("c4") is None
        assert np.array_equal(np.stack(shard.frames("c4")), frames(4))


def test_a_file_system_that_cannot_tell_is_taken_for_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    with Shard.open(path) as shard:
        monkeypatch.setattr(os, "preadv", preadv)
        assert np.array_equal(np.stack(shard.frames("c4")), frames(4))


def test_file_system_types(path: Path, tmp_path: Path) -> None:
    device = path.stat().st_dev
    table = tmp_path / "mountinfo"
    here = f"{os.major(device)}:{os.minor(device)}"
    table.write_text(f"1 0 0:999 / /other rw - ext4 /dev/x rw\n2 0 {here} / /here rw,relatime shared:1 - fuse.sshfs host:/ rw\n")
    assert _mapping._file_system(path, table) == "fuse.sshfs"
    table.write_text("1 0 0:999 / /other rw - ext4 /dev/x rw\n")
    assert _mapping._file_system(path, table) == ""
    assert _mapping._file_system(path, tmp_path / "none") == ""


def test_a_file_that_cannot_be_mapped_is_read_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(_mapping.mmap, "mmap", refuse)
    with Shard.open(path) as shard:
        out = np.empty(frames(0).size, np.uint8)  # its own buffer is mapped memory, too
        assert np.array_equal(np.stack(shard.frames("c2", out=out)), frames(2))
