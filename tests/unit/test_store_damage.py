"""No flipped bit of a shard goes unseen, and what is no shard is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagebench.errors import ChecksumError, StoreError
from stagebench.store import ClipRow, Shard, ShardWriter
from store_rows import CLIP_SPEC, SPEC, events, pixels, write


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
