"""A disk that is really full: a message that says so, no partial file, and what was there before stays."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from factories import make_study
from reliability.conftest import small
from stagebench.errors import MergeError, PlanError, StagebenchError, StoreError, TimingError
from stagebench.files import whole_file
from stagebench.merge import merge
from stagebench.plan import build_plan
from stagebench.session.journal import Journal
from stagebench.session.output import write_rows
from stagebench.store import ClipRow, ShardWriter

MAKE_ROOM = "(?s)(disk is full|No space left).*(Free some space|Make room)"


def fill(folder: Path, leave: int) -> Path:
    """Take all room but `leave` bytes."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            size = file.tell()
        file.truncate(size - leave)
    return path


def shard(folder: Path) -> None:
    with ShardWriter(folder / "s.parquet", "frames", {}) as writer:
        for i in range(20):
            writer.add(ClipRow.from_frames(f"c{i}", "d", np.zeros((2, 60, 80, 3), np.uint8)))


def journal(folder: Path) -> None:
    with Journal(folder / "j.journal", {"job": "j"}) as opened:
        for i in range(1000):
            opened.append(f"g{i}", [{"text": "x" * 1000}])


def rows(folder: Path) -> None:
    write_rows(folder / "r.parquet", [], {"job": {"text": np.random.default_rng(0).bytes(150_000).hex()}, "study": {}, "machine": {}})


def merged(folder: Path) -> None:
    with whole_file(folder / "m.parquet", MergeError) as temporary:
        temporary.write_bytes(bytes(200_000))


CASES: dict[str, tuple[Callable[[Path], None], type[StagebenchError], list[str]]] = {
    "shard": (shard, StoreError, []),
    "journal": (journal, TimingError, ["j.journal"]),
    "rows": (rows, TimingError, []),
    "merged": (merged, MergeError, []),
}


@pytest.mark.parametrize("name", CASES)
def test_each_writer(small_disk: Path, name: str) -> None:
    write, error, left = CASES[name]
    filler = fill(small_disk, 60_000)
    with pytest.raises(error, match=MAKE_ROOM) as caught:
        write(small_disk)
    assert str(small_disk) in str(caught.value), "the file is named"
    assert sorted(p.name for p in small_disk.iterdir() if p != filler) == left


def test_a_full_disk_keeps_whole_journal_lines(small_disk: Path) -> None:
    fill(small_disk, 60_000)
    with pytest.raises(TimingError):
        journal(small_disk)
    assert (small_disk / "j.journal").read_bytes().endswith(b"\n"), "a torn line stays"
    (small_disk / "filler").unlink()
    with Journal(small_disk / "j.journal", {"job": "j"}) as opened:
        assert len(opened.groups) > 10
        assert list(opened.groups) == [f"g{i}" for i in range(len(opened.groups))]
        opened.append("next", [])


def test_a_plan(small_disk: Path, clips: Path, tmp_path: Path) -> None:
    plan = build_plan(small(clips), tmp_path / "cache")
    plan.write(small_disk / "plan.json")
    before = (small_disk / "plan.json").read_bytes()
    other = build_plan(small(clips, frames={"count": 3}, shards={"max_clips": 1}), tmp_path / "cache")
    fill(small_disk, 0)
    with pytest.raises(PlanError, match=MAKE_ROOM):
        other.write(small_disk / "plan.json")
    assert (small_disk / "plan.json").read_bytes() == before
    assert not [p for p in small_disk.iterdir() if p.name.startswith(".")]


def test_a_merge_leaves_the_tables_of_before(small_disk: Path) -> None:
    plan = make_study(small_disk, samples=4, blocks=1)
    fill(small_disk, 0)
    with pytest.raises(MergeError, match=MAKE_ROOM):
        merge(plan, small_disk)
    assert not (small_disk / "timings.parquet").exists() and not list(small_disk.rglob("*.part"))
