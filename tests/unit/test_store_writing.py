"""A shard is whole or not there: exceptions, kills, full disks, and equal bytes for equal rows."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stagebench.errors import StoreError
from stagebench.store import ClipRow, Shard, ShardWriter
from stagebench.store._trees import decode
from store_rows import CLIP_SPEC, SPEC, events, pixels, write


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.parquet", "frames", SPEC) as writer:
        writer.add(ClipRow.from_frames("a", "d", pixels(1)))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_caught_write_error_commits_no_shard_with_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, faults = os.pwrite, [errno.EIO]

    def once(fd: int, data: bytes, at: int) -> int:
        if at > 5000 and faults:
            raise OSError(faults.pop(), "Input/output error")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", once)
    errors = []
    with pytest.raises(StoreError, match="an earlier"), ShardWriter(tmp_path / "a.parquet", "frames", SPEC) as writer:
        for i in range(9):
            try:
                writer.add(ClipRow.from_frames(f"c{i}", "d", pixels(i)))
            except StoreError as error:
                errors.append(str(error))
    assert "Input/output error" in errors[0] and len(errors) > 1
    assert all("an earlier row" in error for error in errors[1:])
    assert list(tmp_path.iterdir()) == []


def test_rows_are_written_again_from_reads_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reads no more than 0x7ffff000 bytes at a time."""
    real = os.pread
    frames = {"a": pixels(1), "b": pixels(2, height=20)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda fd, size, at: real(fd, min(size, 100), at))
        write(tmp_path / "a.parquet", frames)
    with Shard.open(tmp_path / "a.parquet") as shard:
        for clip, array in frames.items():
            assert np.array_equal(np.stack(shard.frames(clip)), array)


def test_an_older_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": pixels(1)})
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), ShardWriter(path, "frames", SPEC) as writer:
        writer.add(ClipRow.from_frames("a", "d", pixels(2)))
        assert path.read_bytes() == before
        raise ZeroDivisionError
    assert path.read_bytes() == before


def test_rows_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.parquet", "frames", SPEC) as writer:
        writer.add(ClipRow.from_frames("a", "d", pixels(1)))
        with pytest.raises(StoreError, match="is there already"):
            writer.add(ClipRow.from_frames("a", "d", pixels(1)))
        with pytest.raises(StoreError, match="holds events"):
            writer.add(ClipRow.from_events("b", "d", events(3)))
    with pytest.raises(StoreError, match="float64"):
        ClipRow.from_frames("a", "d", pixels(1).astype(np.float64))
    with pytest.raises(StoreError, match="codec 'gzip'"):
        ShardWriter(tmp_path / "b.parquet", "frames", SPEC, codec="gzip")


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{n}.parquet", {"a": pixels(1), "b": pixels(2)}) for n in "ab")
    assert one.read_bytes() == two.read_bytes()


def _kinds() -> dict[str, tuple[str, str, list[ClipRow]]]:
    """kind, codec and rows of shards of all sorts."""
    same = [ClipRow.from_frames(f"c{i}", "d", pixels(i), pts=range(3), indices=range(3)) for i in range(6)]
    mixed = [ClipRow.from_frames(f"c{i}", "d", pixels(i, height=12 + i // 2)) for i in range(6)]
    failed = [ClipRow.failed(f"f{i}", "d", "no video stream") for i in range(3)]
    raw: list[ClipRow] = [ClipRow.from_events(f"c{i}", "d", events(300_000 * i, i)) for i in range(3)]
    codes = [ClipRow.from_codes(f"c{i}", "d", [np.full((9, 9), i, np.uint8)], t0=5, t1=9, n_events=3) for i in range(3)]
    return {
        "same": ("frames", "none", same),
        "lz4": ("frames", "lz4", same),
        "zstd": ("frames", "zstd", mixed),
        "mixed": ("frames", "none", [*failed[:2], *mixed, failed[2]]),
        "failed": ("frames", "none", failed),
        "none": ("frames", "none", []),
        "raw": ("events", "none", [*raw, failed[0]]),
        "codes": ("events", "none", [failed[0], *codes]),
    }


def _write_rows(path: Path, name: str, threads: int) -> bytes:
    kind, codec, rows = _kinds()[name]
    spec = CLIP_SPEC if name == "raw" else SPEC
    with ThreadPoolExecutor(max(1, threads)) as pool, ShardWriter(path, kind, spec, codec) as writer:
        encoded = pool.map(writer.encode, rows) if threads else rows
        for row in encoded:
            writer.add(row)
    return path.read_bytes()


@pytest.mark.parametrize("name", list(_kinds()))
def test_the_bytes_are_the_same_whoever_encodes_them(tmp_path: Path, name: str) -> None:
    alone = _write_rows(tmp_path / "a.parquet", name, 0)
    for threads in (1, 2, 4):
        assert _write_rows(tmp_path / f"{threads}.parquet", name, threads) == alone
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".parquet"] == []
    with Shard.open(tmp_path / "4.parquet") as shard:
        assert shard.clips == tuple(row.meta.clip for row in _kinds()[name][2])


@pytest.mark.parametrize("name", list(_kinds()))
def test_the_file_is_the_one_that_pyarrow_writes(tmp_path: Path, name: str) -> None:
    """Pages and their places in the footer, against pyarrow's own writer over the same columns."""
    kind, codec, rows = _kinds()[name]
    ours = _write_rows(tmp_path / "a.parquet", name, 0)
    found = pq.read_schema(tmp_path / "a.parquet").remove_metadata()
    leaves = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in found]
    packing = {"xyp": "BYTE_STREAM_SPLIT", "t": "DELTA_BINARY_PACKED", "t_wide": "DELTA_BINARY_PACKED"}
    bulk = [leaf for leaf in leaves if leaf.split(".")[0] in ("pixels", *packing)]
    codec = codec if kind == "frames" else "zstd"
    with pq.ParquetWriter(
        tmp_path / "b.parquet",
        found,
        compression=dict.fromkeys(leaves, "none") | dict.fromkeys(bulk, codec),
        compression_level=dict.fromkeys(bulk, 1) if codec == "zstd" else None,
        use_dictionary=False,
        column_encoding={leaf: packing.get(leaf.split(".")[0], "PLAIN") for leaf in leaves},
        write_statistics=["clip"],
        write_page_checksum=True,
    ) as writer:
        for row in rows:
            writer.write_table(row.table(found))
    theirs = (tmp_path / "b.parquet").read_bytes()
    body, expected = (data[: len(data) - 8 - int.from_bytes(data[-8:-4], "little")] for data in (ours, theirs))
    assert body == expected
    (mine, _), (its, _) = (decode(data, len(body)) for data in (ours, theirs))
    assert {k: v for k, v in mine.items() if k != 5} == {k: v for k, v in its.items() if k != 5}  # 5: key-value metadata


_WRITE_FOREVER = """
import sys, numpy as np
from pathlib import Path
from stagebench.store import ClipRow, ShardWriter
path = Path(sys.argv[1])
frames = np.random.default_rng(0).integers(0, 256, (4, 200, 300, 3), dtype=np.uint8)
print("ready", flush=True)
while True:
    path.unlink(missing_ok=True)
    with ShardWriter(path, "frames", {}) as writer:
        for i in range(6):
            writer.add(ClipRow.from_frames(f"c{i}", "d", frames))
"""


def test_kill_9_leaves_a_whole_shard_or_none_and_its_litter_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = random.Random(1)
    process = None
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", _WRITE_FOREVER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if path.exists():
            Shard.open(path).close()
    write(path, {"a": pixels(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_a_living_writers_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with ShardWriter(path, "frames", SPEC) as first:
        first.add(ClipRow.from_frames("a", "d", pixels(1)))
        write(path, {"a": pixels(1)})
        first.add(ClipRow.from_frames("b", "d", pixels(2)))
    with Shard.open(path) as shard:
        assert shard.clips == ("a", "b")


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    """In a process of its own, in which writing comes to an end as on a disk that runs full."""
    code = """
import errno, os, sys
import numpy as np
from pathlib import Path
import stagebench.store._writer as module
from stagebench.errors import StoreError
from stagebench.store import ClipRow

real, left = os.pwrite, 3000

def full(fd, data, at):
    global left
    if not left: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    done = real(fd, data[:left], at)  # in part, as a disk that runs full does
    left -= done
    return done

module.os.pwrite = full
path = Path(sys.argv[1])
try:
    with module.ShardWriter(path, "frames", {}) as writer:
        for i in range(9): writer.add(ClipRow.from_frames(f"c{i}", "d", np.zeros((2, 20, 30, 3), np.uint8)))
except StoreError as error:
    print(error)
print(os.listdir(path.parent))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the disk is full" in done.stdout and "stagebench cache prune" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_really_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(StoreError, match="the disk is full"):
            write(folder / "a.parquet", {f"c{i}": pixels(i, 4, 100, 100) for i in range(9)})
        assert list(folder.iterdir()) == []
        write(folder / "a.parquet", {"a": pixels(1)})
    finally:
        subprocess.run(["umount", str(folder)], check=True)
