"""Parquet files whose checksums were made to fit: whoever can write a folder can make them. Refused, and never the end of the process."""

import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factories import make_study
from fuzz.shards import resealed, seeds
from fuzz.thrift import BINARY, I32, I64, LIST, STRUCT, Field, Node, footer_nodes, integer, page_header, page_places, spliced
from stagebench.compare import compare_results
from stagebench.errors import MergeError, StoreError
from stagebench.merge import merge
from stagebench.store import ClipRow, RowMeta, Shard, ShardWriter
from stagebench.store._compact import ShortError, ThriftError, struct

COLUMN = (4, 0, 1, 0)
"""Field numbers down to a ColumnChunk: row_groups, its element, columns, its element."""
META = (*COLUMN, 3)

SEEDS = {"frames": 0, "zstd": 1, "events": 2}


def at(data: bytes, path: tuple[int, ...]) -> Node:
    """The last struct or list of the footer at these field numbers."""
    return [node for node in footer_nodes(data) if node.path == path][-1]


def replaced(data: bytes, path: tuple[int, ...], number: int, new: bytes | None, kind: int | None = None) -> bytes:
    """The file with one field's value, and maybe type, replaced; None takes it out."""
    node = at(data, path)
    fields = [Field(f.number, kind or f.kind, new or b"") if f.number == number else f for f in node.fields]
    assert fields != node.fields
    return spliced(data, [(node, [f for f in fields if f.number != number or new is not None])])


def forgeries(data: bytes) -> Iterator[tuple[str, bytes]]:
    histograms = [node for node in footer_nodes(data) if node.path in ((*META, 16, 2), (*META, 16, 3))]
    for name, node in (("first", histograms[0]), ("last", histograms[-1])):
        yield f"{name} level histogram of one level more", spliced(data, [(node, [*node.fields, node.fields[0]])])
    yield "no place", replaced(data, META, 9, None)
    yield "a place beyond the file", replaced(data, META, 9, integer(1 << 40))
    yield "a place before the file", replaced(data, META, 9, integer(-8))
    yield "a length beyond the file", replaced(data, META, 7, integer(1 << 62))
    yield "a place of another type", replaced(data, META, 9, b"\x01a", BINARY)
    yield "no metadata", replaced(data, COLUMN, 3, None)
    yield "a name that is no ASCII", replaced(data, META, 3, bytes([1 << 4 | BINARY, 2]) + "é".encode())
    yield "no name", replaced(data, META, 3, bytes([BINARY]))
    yield "an unknown codec", replaced(data, META, 4, integer(3))
    chunk, groups, columns = at(data, COLUMN), at(data, (4,)), at(data, (4, 0, 1))
    yield "another file", spliced(data, [(chunk, [Field(1, BINARY, b"\x0b/etc/passwd"), *chunk.fields])])
    yield "a column less", spliced(data, [(columns, columns.fields[:-1])])
    yield "a column twice", spliced(data, [(columns, [*columns.fields, columns.fields[-1]])])
    yield "columns in another order", spliced(data, [(columns, columns.fields[::-1])])
    yield "a row less", spliced(data, [(groups, groups.fields[:-1])])
    yield "a row twice", spliced(data, [(groups, [*groups.fields, groups.fields[0]])])
    group = at(data, (4, 0))
    yield "a row group of no rows", spliced(data, [(group, [Field(3, I64, integer(0)) if f.number == 3 else f for f in group.fields])])
    top = at(data, ())
    yield "row groups twice", spliced(data, [(top, [*top.fields[:4], top.fields[3], *top.fields[4:]])])
    deep = b"\x1c" * 100_000 + b"\0" * 100_001
    yield "a field nested 10^5 deep", spliced(data, [(top, [*top.fields, Field(100, STRUCT, deep)])])
    yield "a list of 2^60 elements", spliced(data, [(top, [*top.fields, Field(100, LIST, b"\xf6" + b"\x80" * 8 + b"\x10")])])


OPEN = """
import sys
from stagebench.errors import StoreError
from stagebench.store import ClipRow, RowMeta, Shard, ShardWriter
for path in sys.argv[1:]:
    for verify in (True, False):
        try:
            with Shard.open(path, verify=verify) as shard:
                for clip in shard.clips:
                    if shard.row(clip).ok:
                        shard.clip_row(clip)
            print(path, "taken")
        except StoreError as error:
            print(path, "refused", error)
"""


@pytest.mark.parametrize("kind", SEEDS)
def test_forged_footers_are_refused_and_end_no_process(tmp_path: Path, kind: str) -> None:
    """In a process of its own: some of them ended it (an exception of C++ that pyarrow lets through)."""
    paths = {}
    for number, (name, data) in enumerate(forgeries(seeds()[SEEDS[kind]])):
        path = tmp_path / f"{number}.parquet"
        try:
            path.write_bytes(resealed(data).read_bytes())
        except (ValueError, StoreError):  # no digest over what cannot be found: then the seal alone
            path.write_bytes(resealed(data, body=False).read_bytes())
        paths[str(path)] = name
    done = subprocess.run([sys.executable, "-c", OPEN, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    taken = {paths[line.split()[0]] for line in done.stdout.splitlines() if line.endswith(" taken")}
    # a histogram is read by nobody: Arrow sees it, or not, by column and version
    assert not {name for name in taken if "histogram" not in name}, taken
    assert len(done.stdout.splitlines()) >= 2 * len(paths)


@pytest.mark.parametrize("kind", SEEDS)
def test_an_unchanged_footer_is_taken(kind: str) -> None:
    """Else the test above would pass for any file."""
    data = seeds()[SEEDS[kind]]
    for node in footer_nodes(data):
        assert spliced(data, [(node, node.fields)]) == data
    Shard.open(resealed(data)).close()


def test_nothing_asks_pyarrow_about_single_columns(repo: Path) -> None:
    """`metadata.row_group(0).column(0)` passes no C++ exception on: it ends the process."""
    for path in (repo / "src").rglob("*.py"):
        assert not re.search(r"(?<!read)[._]row_group\(", re.sub(r'""".*?"""', "", path.read_text(), flags=re.S)), path


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_struct_that_ends_early(cut: int) -> None:
    data = seeds()[0][-8 - int.from_bytes(seeds()[0][-8:-4], "little") : -8]
    with pytest.raises(ShortError):
        struct(data[:-cut], 0, {})
    with pytest.raises(ThriftError):
        struct(b"\x1d" + data, 0, {})  # no type 13


# ---- rows


def rewritten(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def strange_text(table: pa.Table) -> pa.Table:
    """A text column whose bytes are no UTF-8."""
    column = table.schema.get_field_index("text")
    bad = pa.array([b"\xff\xfe"] * len(table), pa.binary()).view(pa.string())
    return table.set_column(column, "text", bad)


def test_rows_with_text_that_is_no_text(tmp_path: Path) -> None:
    """polars takes UTF-8 on trust, and may do anything with other bytes."""
    plan = make_study(tmp_path, samples=2, blocks=1, models={"eventgpt": {}})
    path = tmp_path / plan.jobs[0].path
    rewritten(path, strange_text(pq.read_table(path, partitioning=None)))
    with pytest.raises(MergeError, match=re.escape(str(path))):
        merge(plan, tmp_path)


def test_rows_with_metadata_that_is_no_text(tmp_path: Path) -> None:
    """Found by fuzzing: polars panics at it. It is nothing that the rows need."""
    plan = make_study(tmp_path, samples=2, blocks=1, models={"eventgpt": {}})
    path = tmp_path / plan.jobs[0].path
    table = pq.read_table(path, partitioning=None)
    field = table.schema.field("text").with_metadata({b"\xff": b"\xfe"})
    rewritten(path, table.cast(table.schema.set(table.schema.get_field_index("text"), field)))
    merge(plan, tmp_path)


@pytest.mark.parametrize("fault", ["text", "metadata", "type", "column", "garbage"])
def test_a_strangers_merged_rows(tmp_path: Path, fault: str) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        merge(make_study(folder, samples=4, blocks=1), folder)
    path = bad / "timings.parquet"
    table = pq.read_table(path, partitioning=None)
    if fault == "text":
        column = table.schema.get_field_index("clip")
        rewritten(path, table.set_column(column, "clip", pa.array([b"\xff"] * len(table), pa.binary()).view(pa.string())))
    elif fault == "metadata":
        rewritten(path, table.cast(table.schema.set(0, table.schema.field(0).with_metadata({b"\xff": b"\xfe"}))))
        assert compare_results(good, bad).rows
        return
    elif fault == "type":
        pl.read_parquet(path).with_columns(pl.lit("x").alias("total_ms")).write_parquet(path)
    elif fault == "column":  # found by fuzzing: the name of one column changed
        rewritten(path, table.drop_columns(["accepted"]))
    else:
        path.write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    with pytest.raises(MergeError, match=re.escape(str(path))):
        compare_results(good, bad)


def test_a_shard_of_fewer_rows_than_it_names(tmp_path: Path) -> None:
    """Found by fuzzing: row groups of no rows ended in an exception that named nothing."""
    data = dict(forgeries(seeds()[0]))["a row group of no rows"]
    with pytest.raises(StoreError):
        Shard.open(resealed(data), verify=False)


def test_a_row_that_claims_more_frames_than_fit_in_memory(tmp_path: Path) -> None:
    meta = RowMeta("a", "d", "ok", "", count=(1 << 20) + 1, sizes=((1, 1),), encoding="rgb8")
    with ShardWriter(tmp_path / "a.parquet", "frames", {}) as writer:
        writer.add(ClipRow(meta, pixels=np.zeros(3, np.uint8)))
    with pytest.raises(StoreError, match="1048577 frames, at most"):
        Shard.open(tmp_path / "a.parquet")


@pytest.mark.parametrize("stored", [0, 100, 418])
def test_an_uncompressed_page_stored_in_fewer_bytes_than_it_has(stored: int) -> None:
    """Its length uncompressed, which the row asks for, is right: the bytes before the page were given out as pixels."""
    data = seeds()[0]
    columns = next(node for node in footer_nodes(data) if node.path == (4, 0, 1))  # of the first row; its pixels come last
    chunk = [node for node in footer_nodes(data) if node.path == META and columns.begin < node.begin < columns.end][-1]
    place = next(place for place in page_places(data) if Field(9, I64, integer(place)) in chunk.fields)
    header = page_header(data, place)
    crc = zlib.crc32(data[header.end : header.end + stored])
    new = {3: integer(stored), 4: integer(crc - (crc >> 31 << 32))}
    front = header.build([Field(f.number, f.kind, new.get(f.number, f.raw)) for f in header.fields])
    forged = data[:place] + front + data[place + len(front) :]
    new = {7: integer(len(front) + stored)}
    path = resealed(spliced(forged, [(chunk, [Field(f.number, f.kind, new.get(f.number, f.raw)) for f in chunk.fields])]))
    for verify in (True, False):
        with pytest.raises(StoreError, match=rf"c0: 438 bytes, {stored} stored, in 1 page\(s\), 438 in one expected"):
            Shard.open(path, verify=verify)


def test_a_text_of_a_shard_that_is_no_text() -> None:
    """Found by fuzzing: under right checksums, bytes that are no UTF-8 were an exception that named no file."""
    data = seeds()[0]
    begin = data.index(b"error", 4)
    at_crc = [node for node in (page_header(data, place) for place in page_places(data)) if node.begin < begin < node.begin + 64][-1]
    payload = data[at_crc.end : begin] + b"\xff" + data[begin + 1 : begin + 5]
    crc = zlib.crc32(payload)
    fields = [Field(4, I32, integer(crc - (crc >> 31 << 32))) if f.number == 4 else f for f in at_crc.fields]
    forged = data[: at_crc.begin] + at_crc.build(fields) + payload + data[begin + 5 :]
    assert len(forged) == len(data), "the checksum takes as many bytes"
    with pytest.raises(StoreError, match=r"shard\.parquet.*decode"):
        Shard.open(resealed(forged))
