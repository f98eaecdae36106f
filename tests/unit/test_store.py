"""Shards: what was written is read back."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagebench.errors import SourceError, StoreError
from stagebench.sources.events import Events
from stagebench.store import ClipRow, HostBuffer, Shard, ShardWriter
from stagebench.store._format import pack_codes, unpack_codes
from store_rows import CLIP_SPEC, SPEC, events, pixels, write


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
