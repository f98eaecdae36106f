"""The digest index: it reads what changed, trusts what it may, and never stops a plan."""

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import stagebench.digests as module
from stagebench.digests import MISSING, UNREADABLE, DigestIndex


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this test count as settled, however young."""
    monkeypatch.setattr(module, "SETTLED_NS", -(10**18))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    seen: list[str] = []
    true = module._hash
    monkeypatch.setattr(module, "_hash", lambda path, stamp: (seen.append(path.name), true(path, stamp))[1])
    return seen


def look(root: Path, *paths: str, index: Path | None = None) -> dict[str, str]:
    with DigestIndex(index or root.parent / "cache/digests.parquet") as digests:
        return digests.digests("d", root, paths, threads=2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_text("one")
    (root / "b").write_text("two")
    return root


def test_a_second_look_reads_nothing(root: Path, old: None, hashed: list[str]) -> None:
    first = look(root, "a", "b")
    assert sorted(hashed) == ["a", "b"] and first["a"] != first["b"]
    assert look(root, "a", "b") == first and len(hashed) == 2
    (root / "b").write_text("TWO")
    assert look(root, "a", "b")["b"] != first["b"] and hashed[2:] == ["b"]


def test_a_file_asked_for_twice_is_read_once(root: Path) -> None:
    """By itself and in its folder, in either order."""
    (root / "f").mkdir()
    for name in ("x", "y"):
        (root / "f" / name).write_text(name)
    for number, paths in enumerate((("f", "f/x"), ("f/x", "f"))):
        told: list[tuple[int, int]] = []
        with DigestIndex(root.parent / f"{number}/digests.parquet") as digests:
            found = digests.digests("d", root, paths, progress=lambda done, of, told=told: told.append((done, of)))
        assert told == [(1, 2), (2, 2)]
        assert found == {path: look(root, path)[path] for path in paths}


def test_a_young_file_is_not_trusted(root: Path, hashed: list[str]) -> None:
    look(root, "a")
    look(root, "a")
    assert hashed == ["a", "a"]


def test_a_moved_root_keeps_its_digests(root: Path, old: None, hashed: list[str]) -> None:
    first = look(root, "a")
    moved = root.rename(root.parent / "moved")
    assert look(moved, "a", index=root.parent / "cache/digests.parquet") == first and hashed == ["a"]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(root: Path, old: None, monkeypatch: pytest.MonkeyPatch) -> None:
    true = module.hashlib.file_digest

    def slow(handle, factory):  # type: ignore[no-untyped-def]
        done = true(handle, factory)
        (root / "a").write_text("one and more")
        return done

    monkeypatch.setattr(module.hashlib, "file_digest", slow)
    before = look(root, "a")
    monkeypatch.undo()
    assert look(root, "a") != before


def test_what_is_not_a_readable_file_has_a_digest_that_says_so(root: Path) -> None:
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    found = look(root, "none", "pipe", "loop", "a\0b")
    assert found == {"none": MISSING, "pipe": UNREADABLE, "loop": UNREADABLE, "a\0b": UNREADABLE}


def test_a_damaged_index_is_made_again(root: Path, old: None, hashed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    first = look(root, "a")
    index = root.parent / "cache/digests.parquet"
    whole = index.read_bytes()
    for bad in (b"", b"not parquet", whole[: len(whole) // 2]):
        index.write_bytes(bad)
        caplog.clear()
        assert look(root, "a") == first
        assert "hashed again" in caplog.text
    assert len(hashed) == 4 and not list(index.parent.glob(".digests*"))


def test_an_index_that_cannot_be_written_stops_nothing(
    root: Path, old: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    assert look(root, "a")["a"] and "No space left" in caplog.text


def test_two_planners_take_turns(root: Path) -> None:
    many = [f"f{n}" for n in range(50)]
    for name in many:
        (root / name).write_text(name)
        os.utime(root / name, ns=(0, 0))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_plan, args=(root, part)) for part in (many[:30], many[20:])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0]
    with DigestIndex(root.parent / "cache/digests.parquet") as index:
        assert {stamp.path for stamp in index._known} == {f"d/{name}" for name in many}


def _plan(root: Path, names: list[str]) -> None:
    module.SETTLED_NS = -(10**18)
    look(root, *names)


def test_an_inode_beyond_63_bits_is_one_like_another(root: Path, old: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems make theirs up from 64 bits. Parquet and the stamps take them, by both ways of looking."""

    def large(found: os.stat_result) -> SimpleNamespace:
        values = {name: getattr(found, name) for name in ("st_mode", "st_size", "st_mtime_ns", "st_ctime_ns")}
        return SimpleNamespace(**values, st_ino=found.st_ino | 1 << 63)

    theirs = SimpleNamespace(**vars(os))
    theirs.stat, theirs.fstat = (lambda path, true=true: large(true(path)) for true in (os.stat, os.fstat))
    monkeypatch.setattr(module, "os", theirs)
    for _ in range(2):
        with DigestIndex(root.parent / "cache/digests.parquet") as digests:
            digests.digests("d", root, ["a", "b"])
            assert len(digests._known) == 2
        seen = digests.looks[0].stamps
        assert seen is not None and module.stamps(root, ["a", "b"]) == seen != module.stamps(root, ["b", "a"])
