"""Shards: round trip, atomic writes, and that no flipped bit goes unseen."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagebench.errors import ChecksumError, SourceError, StoreError
from stagebench.sources.events import Events
from stagebench.store import ClipRow, HostBuffer, Shard, ShardWriter
from stagebench.store._format import pack_codes, unpack_codes
from stagebench.store._trees import decode

SPEC = {"version": 1, "count": 3}
CLIP_SPEC = {"version": 1, "representation": "clip"}


def pixels(seed: int, count: int = 3, height: int = 12, width: int = 17) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write(path: Path, frames: dict[str, np.ndarray | list[np.ndarray]], codec: str = "none") -> Path:
    with ShardWriter(path, "frames", SPEC, codec=codec) as writer:
        for clip, value in frames.items():
            writer.add(ClipRow.from_frames(clip, f"digest of {clip}", value, pts=range(len(value)), indices=range(len(value))))
    return path


def events(n: int, seed: int = 0, t0: int = 51_800_000_000, step: int = 20) -> Events:
    rng = np.random.default_rng(seed)
    t = t0 + np.cumsum(rng.integers(0, step, n))
    return Events(
        rng.integers(0, 640, n).astype(np.uint16), rng.integers(0, 480, n).astype(np.uint16), rng.integers(0, 2, n).astype(np.uint8), t
    )


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("mixed", [False, True])
def test_frames_come_back_as_they_were(tmp_path: Path, codec: str, mixed: bool) -> None:
    wanted = {f"seq/{i:06d}": pixels(i, height=12 + (i if mixed else 0)) for i in range(4)}
    path = write(tmp_path / "a.parquet", wanted, codec)
    with Shard.open(path) as shard:
        assert shard.clips == tuple(wanted)
        assert shard.verify_ms is not None
        assert (shard._parquet.schema_arrow.field("pixels").type == pa.large_binary()) is mixed
        for clip in random.Random(0).sample(list(wanted), 4):
            np.testing.assert_array_equal(np.stack(shard.frames(clip)), wanted[clip])
            row = shard.row(clip)
            assert (row.count, row.pts, row.indices, row.digest) == (3, (0, 1, 2), (0, 1, 2), f"digest of {clip}")
            np.testing.assert_array_equal(shard.clip_row(clip).pixels, wanted[clip].reshape(-1))


def test_a_clip_may_have_frames_of_differing_sizes(tmp_path: Path) -> None:
    frames = [pixels(i, 1, 5 + i, 9 - i)[0] for i in range(3)]
    path = write(tmp_path / "a.parquet", {"a": frames, "b": pixels(9)})
    with Shard.open(path) as shard:
        assert shard.row("a").sizes == ((5, 9), (6, 8), (7, 7))
        for got, wanted in zip(shard.frames("a"), frames, strict=True):
            np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(np.stack(shard.frames("b")), pixels(9))


def test_any_parquet_reader_reads_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": pixels(1), "b": pixels(2)})
    table = pq.read_table(path)
    assert table.column("clip").to_pylist() == ["a", "b"]
    assert table.column("height").to_pylist() == [12, 12]
    assert np.frombuffer(table.column("pixels")[1].as_py(), np.uint8).tobytes() == pixels(2).tobytes()
    metadata = pq.read_metadata(path)
    column = metadata.row_group(0).column(metadata.num_columns - 1)
    assert metadata.num_row_groups == 2
    assert (column.compression, column.encodings, column.is_stats_set) == ("UNCOMPRESSED", ("RLE", "PLAIN"), False)


def test_failed_clips_are_rows_without_pixels(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.parquet", "frames", SPEC) as writer:
        writer.add(ClipRow.failed("first", "d0", "no video stream"))
        writer.add(ClipRow.from_frames("good", "d1", pixels(1)))
        writer.add(ClipRow.failed("last", "d2", "5 frames, 8 asked for"))
    with Shard.open(tmp_path / "a.parquet") as shard:
        assert shard.clips == ("first", "good", "last")
        assert (shard.row("last").status, shard.row("last").reason) == ("error", "5 frames, 8 asked for")
        np.testing.assert_array_equal(np.stack(shard.frames("good")), pixels(1))
        with pytest.raises(StoreError, match=r"first.*no video stream"):
            shard.frames("first")


def test_all_clips_failed_or_none_at_all(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.parquet", "frames", SPEC) as writer:
        writer.add(ClipRow.failed("a", "d", "gone"))
    with ShardWriter(tmp_path / "b.parquet", "events", CLIP_SPEC):
        pass
    with Shard.open(tmp_path / "a.parquet") as shard:
        assert shard.row("a").reason == "gone"
    with Shard.open(tmp_path / "b.parquet") as shard:
        assert shard.clips == ()


def test_reads_go_into_the_given_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": pixels(1), "b": pixels(2)})
    out = np.zeros(pixels(1).size + 5, np.uint8)
    with Shard.open(path) as shard:
        assert np.shares_memory(shard.frames("b", out=out)[0], out)
        assert out[: pixels(2).size].tobytes() == pixels(2).tobytes()
        with pytest.raises(StoreError, match="out is"):
            shard.frames("b", out=np.zeros(10, np.uint8))
        first = shard.frames("a")[0]
        assert np.shares_memory(first, shard.frames("b")[0])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 99))
def test_colour_codes_survive_packing(sizes: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 3, size).astype(np.uint8) for size in sizes]
    out = np.empty(sum(3 * h * w for h, w in sizes), np.uint8)
    unpack_codes(pack_codes(codes), sizes, out)
    colours = np.array([[255, 255, 255], [0, 0, 255], [255, 0, 0]], np.uint8)
    np.testing.assert_array_equal(out, np.concatenate([colours[c].reshape(-1) for c in codes]))


def test_event_frames_and_grids(tmp_path: Path) -> None:
    codes = [np.random.default_rng(i).integers(0, 3, (480, 640)).astype(np.uint8) for i in range(5)]
    with ShardWriter(tmp_path / "a.parquet", "events", {"representation": "frames"}) as writer:
        writer.add(ClipRow.from_codes("a", "d", codes, t0=5, t1=9, n_events=3, t_dtype="<u2", p_coding="bool"))
    with Shard.open(tmp_path / "a.parquet") as shard:
        assert shard.row("a").t_dtype == "<u2"
        colours = np.array([[255, 255, 255], [0, 0, 255], [255, 0, 0]], np.uint8)
        np.testing.assert_array_equal(np.stack(shard.frames("a")), colours[np.stack(codes)])
    grid = np.random.default_rng(0).standard_normal((5, 8, 9)).astype(np.float32)
    with ShardWriter(tmp_path / "b.parquet", "events", {"representation": "voxel"}) as writer:
        writer.add(ClipRow.from_grid("a", "d", grid))
    with Shard.open(tmp_path / "b.parquet") as shard:
        np.testing.assert_array_equal(shard.grid("a"), grid)
    with pytest.raises(ValueError, match="colour code 3"):
        ClipRow.from_codes("a", "d", [np.full((2, 2), 3, np.uint8)])


@pytest.mark.parametrize(
    "t",
    [
        np.array([5, 5, 70_000, 2**31 + 4], np.int64),
        np.array([51_800_000_000, 51_800_000_000 + 2**31], np.int64),  # 35 min and more: int64 offsets
        np.array([100, 20, 300], np.int64),
        np.array([], np.int64),
        np.array([-(2**40), 2**40], np.int64),
    ],
)
def test_raw_events_come_back_exactly(tmp_path: Path, t: np.ndarray) -> None:
    base = events(len(t))
    given_events = Events(base.x, base.y, base.p, t, "<u2", "int8_pm1")
    with ShardWriter(tmp_path / "a.parquet", "events", CLIP_SPEC) as writer:
        writer.add(ClipRow.failed("z", "d", "gone"))
        writer.add(ClipRow.from_events("a", "d", given_events))
    with Shard.open(tmp_path / "a.parquet") as shard:
        got = shard.events("a")
    for name in "xypt":
        np.testing.assert_array_equal(getattr(got, name), getattr(given_events, name))
        assert getattr(got, name).dtype == getattr(given_events, name).dtype
    assert (got.t_dtype, got.p_coding) == ("<u2", "int8_pm1")


def test_extreme_coordinates(tmp_path: Path) -> None:
    given_events = Events(np.array([65535, 0], np.uint16), np.array([32767, 0], np.uint16), np.array([1, 0], np.uint8), np.array([1, 2]))
    with ShardWriter(tmp_path / "a.parquet", "events", CLIP_SPEC) as writer:
        writer.add(ClipRow.from_events("a", "d", given_events))
    with Shard.open(tmp_path / "a.parquet") as shard:
        np.testing.assert_array_equal(shard.events("a").x, [65535, 0])
        np.testing.assert_array_equal(shard.events("a").y, [32767, 0])
    with pytest.raises(SourceError, match="32767"):
        ClipRow.from_events("a", "d", Events(given_events.x, given_events.y + 1, given_events.p, given_events.t))


def _shards(folder: Path) -> dict[str, Path]:
    made = {name: write(folder / f"{name}.parquet", {f"seq/{i}": pixels(i) for i in range(5)}, name) for name in ("none", "lz4", "zstd")}
    made["mixed"] = write(folder / "mixed.parquet", {f"seq/{i}": pixels(i, height=9 + i) for i in range(5)})
    made["events"] = folder / "events.parquet"
    with ShardWriter(made["events"], "events", CLIP_SPEC) as writer:
        for i in range(3):
            writer.add(ClipRow.from_events(f"seq/{i}", "d", events(400, i)))
        writer.add(ClipRow.failed("seq/bad", "d", "zero events"))
    return made


@pytest.mark.parametrize("name", ["none", "lz4", "zstd", "mixed", "events"])
def test_every_one_of_400_flipped_bits_is_found(tmp_path: Path, name: str) -> None:
    path = _shards(tmp_path)[name]
    good = path.read_bytes()
    rng = random.Random(f"flips {name}")
    with Shard.open(path) as shard:
        chunks = shard._all_chunks()
        clips = shard.clips
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    # the random places, every bit of the file's ends, and a share in the footer, which is a small part of a real shard
    places = [rng.randrange(8 * len(good)) for _ in range(300)] + [rng.randrange(8 * footer, 8 * len(good)) for _ in range(100)]
    places += [*range(32), *range(8 * (len(good) - 8), 8 * len(good))]
    named = 0
    for bit in places:
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ChecksumError) as caught:
            Shard.open(path, threads=1).close()
        assert str(path) in str(caught.value)
        for chunk in chunks:
            for page in chunk.pages:
                if page.payload <= bit // 8 < page.end:
                    assert clips[chunk.row] in str(caught.value)
                    named += 1
    assert named > 50
    path.write_bytes(good)
    Shard.open(path).close()


@pytest.mark.parametrize("cut", [0, 1, 11, 12, 100, -1, -8, -9, -500])
def test_cut_and_lengthened_files_are_found(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.parquet", {"a": pixels(1)})
    good = path.read_bytes()
    path.write_bytes(good[:cut])
    with pytest.raises(StoreError, match=r"a\.parquet"):
        Shard.open(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(ChecksumError):
        Shard.open(path)
    path.write_bytes(good[:2000] + good[3000:])
    with pytest.raises(ChecksumError):
        Shard.open(path)


def test_two_shards_mixed_up_are_found(tmp_path: Path) -> None:
    """The body of one shard under the footer of another, sizes being equal."""
    a = write(tmp_path / "a.parquet", {"a": pixels(1), "b": pixels(2)}).read_bytes()
    b = write(tmp_path / "b.parquet", {"a": pixels(1), "b": pixels(3)}).read_bytes()
    footer = len(a) - 8 - int.from_bytes(a[-8:-4], "little")
    (tmp_path / "c.parquet").write_bytes(a[:footer] + b[footer:])
    with pytest.raises(ChecksumError):
        Shard.open(tmp_path / "c.parquet")


def test_a_strangers_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"clip": ["a"], "pixels": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(StoreError, match="not a shard of stagebench"):
        Shard.open(tmp_path / "a.parquet")
    with pytest.raises(StoreError, match="cannot be opened"):
        Shard.open(tmp_path / "none.parquet")


@pytest.mark.parametrize("fault", ["sizes", "column", "encoding"])
def test_wrong_shape_or_type_is_refused_expected_against_found(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed as it should be, written by something that does not keep to the format."""
    row = ClipRow.from_frames("seq/a", "d", pixels(1))
    if fault == "column":
        import stagebench.store._encode as module

        def wrong(kind: str, **how: object) -> pa.Schema:
            made = real(kind, **how)
            return made.set(made.get_field_index("height"), pa.field("height", pa.float32()))

        real = module.schema
        monkeypatch.setattr(module, "schema", wrong)
        expected = "height is float, expected int32"
    else:
        changed = {"sizes": {"sizes": ((12, 18),) * 3}, "encoding": {"encoding": "f32"}}[fault]
        row = ClipRow(type(row.meta)(**{**row.meta.__dict__, **changed}), pixels=row.pixels)
        expected = r"seq/a: 1842 bytes,.* expected"
    with ShardWriter(tmp_path / "a.parquet", "frames", SPEC) as writer:
        writer.add(row)
    with pytest.raises(StoreError, match=expected):
        Shard.open(tmp_path / "a.parquet")


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.parquet", "frames", SPEC) as writer:
        writer.add(ClipRow.from_frames("a", "d", pixels(1)))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_closes_no_file_that_is_still_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: int) -> None:
    """Else the bytes would go to whatever file is opened next: it gets the same number."""
    real, refused, waits = os.pwrite, [], [0.05] * 99 + [0.8]  # the first write ends last

    def slow(fd: int, data: bytes, at: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(waits.pop())
        try:
            return real(fd, data, at)
        except OSError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(os, "pwrite", slow)
    timers = [threading.Timer(0.2 + 0.1 * n, os.kill, (os.getpid(), signal.SIGINT)) for n in range(interrupts)]
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.parquet", "frames", SPEC, pool=pool) as writer:
            for timer in timers:
                timer.start()
            for i in range(4):
                writer.add(ClipRow.from_frames(f"c{i}", "d", pixels(i)))
        for timer in timers:
            timer.join()
        with (tmp_path / "other").open("wb") as other:
            pool.shutdown()
            assert os.fstat(other.fileno()).st_size == 0
    assert refused == []
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_caught_write_error_commits_no_shard_with_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    real, faults = os.pwrite, [errno.EIO]

    def once(fd: int, data: bytes, at: int) -> int:
        if at > 5000 and faults:
            raise OSError(faults.pop(), "Input/output error")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", once)
    errors = []
    pool = ThreadPoolExecutor(threads) if threads else None
    path, pool = tmp_path / "a.parquet", ThreadPoolExecutor(threads) if threads else None
    with pool or nullcontext(), pytest.raises(StoreError, match="an earlier"), ShardWriter(path, "frames", SPEC, pool=pool) as writer:
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
    with ThreadPoolExecutor(max(1, threads)) as pool, ShardWriter(path, kind, spec, codec, pool if threads else None) as writer:
        encoded = pool.map(writer.encode, rows) if threads else rows
        for row in encoded:
            writer.add(row)
    return path.read_bytes()


@pytest.mark.parametrize("name", list(_kinds()))
def test_the_bytes_are_the_same_whoever_encodes_and_writes_them(tmp_path: Path, name: str) -> None:
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


@pytest.mark.parametrize("threads", [0, 2])
def test_a_full_disk_is_a_clear_error(tmp_path: Path, threads: int) -> None:
    """In a process of its own, in which writing comes to an end as on a disk that runs full."""
    code = """
import errno, os, sys
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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
path, threads = Path(sys.argv[1]), int(sys.argv[2])
pool = ThreadPoolExecutor(threads) if threads else None
try:
    with pool or nullcontext(), module.ShardWriter(path, "frames", {}, pool=pool) as writer:
        for i in range(9): writer.add(ClipRow.from_frames(f"c{i}", "d", np.zeros((2, 20, 30, 3), np.uint8)))
except StoreError as error:
    print(error)
print(os.listdir(path.parent))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.parquet"), str(threads)]
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


def test_pandas_is_not_imported(tmp_path: Path) -> None:
    code = """
import sys, numpy as np
from pathlib import Path
from stagebench.store import ClipRow, Shard, ShardWriter
path = Path(sys.argv[1])
with ShardWriter(path, "frames", {}) as writer:
    writer.add(ClipRow.from_frames("a", "d", np.zeros((2, 3, 4, 3), np.uint8), pts=[0, 1]))
    writer.add(ClipRow.from_frames("b", "d", np.zeros((2, 3, 5, 3), np.uint8), pts=[0, 1]))
with Shard.open(path) as shard:
    shard.frames("a")
with ShardWriter(path, "events", {"representation": "clip"}) as writer:
    writer.add(ClipRow.from_events("a", "d", __import__("stagebench.sources.events").sources.events.Events(
        *(np.zeros(3, d) for d in (np.uint16, np.uint16, np.uint8, np.int64)))))
with Shard.open(path) as shard:
    shard.events("a")
print("pandas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_host_buffer_grows_and_is_reused() -> None:
    buffer = HostBuffer(100)
    one = buffer.take(50)
    assert np.shares_memory(one, buffer.take(100))
    assert buffer.take(5 << 20).size == 5 << 20


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzzed_files_raise_store_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "fuzz.parquet"
    base = tmp_path / "base.parquet"
    good = (base if base.exists() else write(base, {"a": pixels(1), "b": pixels(2)})).read_bytes()
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        patch = data.draw(st.binary(min_size=0, max_size=12))
        damaged[at : at + data.draw(st.integers(0, 12))] = patch
    path.write_bytes(damaged)
    if bytes(damaged) == good:
        return
    for verify in (True, False):
        try:
            with Shard.open(path, verify=verify) as shard:
                assert not verify
                for clip in shard.clips:
                    shard.frames(clip)
        except StoreError:
            pass
