"""Reads from the mapped file: the same bytes as by system calls, and never a read that could end the process."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

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
        monkeypatch.setattr(_mapping, "_file_system", lambda fd: "nfs4")
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


@pytest.mark.parametrize("where", ["preadv", "pread"])
def test_a_failing_disk_is_an_error_of_the_store_while_verifying(path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Shard.open(path, verify=False) as shard:
        shard._all_chunks()
        monkeypatch.setattr(os, where, fail)
        with pytest.raises(StoreError, match=r"a\.parquet: cannot be read: .*Input/output error.*run again"):
            shard.verify()


def test_a_failing_disk_is_an_error_of_the_store_while_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Shard.open(path) as shard:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(StoreError, match=r"a\.parquet: clip c4 cannot be read: .*Input/output error.*run again"):
            shard.frames("c4")


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


@pytest.mark.parametrize(("number", "mapped"), [(errno.EOPNOTSUPP, True), (errno.EIO, False), (errno.EINVAL, False)])
def test_only_a_file_system_that_cannot_tell_is_taken_for_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, mapped: bool
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise OSError(number, os.strerror(number))
        return real(fd, buffers, at, flags)

    with Shard.open(path) as shard:
        monkeypatch.setattr(os, "preadv", preadv)
        assert (shard.view("c4") is not None) is mapped
        assert np.array_equal(np.stack(shard.frames("c4")), frames(4))


@pytest.mark.parametrize("resident", [True, False])
def test_a_mapping_is_populated_from_memory_alone(path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool) -> None:
    """MADV_POPULATE_READ reads what is not in memory, too: the whole shard from the disk, page by page."""
    advised: list[int] = []
    with path.open("rb") as file:
        mapping = _mapping.MappedFile(file.fileno(), path.stat().st_size)
        monkeypatch.setattr(mapping, "_map", SimpleNamespace(madvise=advised.append, close=mapping._map.close))
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at, flags: int(resident or at == 0))
        mapping.populate()
        mapping.close()
    assert advised == [22] * resident


@pytest.mark.parametrize(
    ("kind", "mapped"), [("ext4", True), ("btrfs", True), ("overlay", True), ("nfs", False), ("vboxsf", False), ("", False)]
)
def test_only_local_file_systems_are_mapped(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mapped: bool) -> None:
    """Of any other, one not known here among them, a page may be withdrawn, and its read end the process."""
    monkeypatch.setattr(_mapping, "_file_system", lambda fd: kind)
    with Shard.open(path) as shard:
        assert (shard._mapping is not None) is mapped
        assert np.array_equal(np.stack(shard.frames("c4")), frames(4))


def test_file_system_types(path: Path, tmp_path: Path) -> None:
    table, other = tmp_path / "mountinfo", "1 0 0:999 / /other rw - ext4 /dev/x rw\n"
    with path.open("rb") as file:
        fd = file.fileno()
        about = tmp_path / "fdinfo" / str(fd)
        about.parent.mkdir()
        about.write_text("pos:\t0\nflags:\t0100000\nmnt_id:\t2\nino:\t3\n")
        assert _mapping._file_system(fd, tmp_path) == ""
        table.write_text(other + "2 0 0:998 / /b rw,relatime shared:1 - fuse.sshfs host:/ rw\n22 0 0:997 / /c rw - xfs x rw\n")
        assert _mapping._file_system(fd, tmp_path) == "fuse.sshfs"
        table.write_text(other)
        assert _mapping._file_system(fd, tmp_path) == ""
        about.write_text("flags:\t0100000\n")  # names no mount
        device = os.fstat(fd).st_dev
        table.write_text(other + f"2 0 {os.major(device)}:{os.minor(device)} / /b rw - nfs4 host:/ rw\n")
        assert _mapping._file_system(fd, tmp_path) == "nfs4"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs")
def test_a_shard_in_memory_is_mapped(path: Path) -> None:
    with TemporaryDirectory(dir="/dev/shm") as folder:
        copy = Path(shutil.copy(path, folder))
        with Shard.open(copy) as shard:
            assert shard._mapping is not None and shard.view("c4") is not None


def test_a_shard_removed_while_it_is_verified_is_read_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Shard.verify

    def verify(shard: Shard, **how: int | None) -> None:
        real(shard, **how)
        path.unlink()

    monkeypatch.setattr(Shard, "verify", verify)
    with Shard.open(path) as shard:
        assert np.array_equal(np.stack(shard.frames("c4")), frames(4))


def test_a_file_that_cannot_be_mapped_is_read_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(_mapping.mmap, "mmap", refuse)
    with Shard.open(path) as shard:
        out = np.empty(frames(0).size, np.uint8)  # its own buffer is mapped memory, too
        assert np.array_equal(np.stack(shard.frames("c2", out=out)), frames(2))
