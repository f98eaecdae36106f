"""What a journal survives, and what it refuses."""

import errno
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagebench.errors import TimingError
from stagebench.session import Journal, journal

WHO = {"study": "s1", "machine": "m1", "job": "j"}


def write(path, count=3, who=WHO):
    with Journal(path, who) as journal:
        for n in range(count):
            journal.append(f"sample{n}", [{"sample": f"sample{n}", "total_ms": n + 0.25, "codes": []}])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.parquet.journal"


def test_rows_come_back_as_they_were(path):
    write(path)
    with Journal(path, WHO) as journal:
        assert journal.groups["sample2"] == [{"sample": "sample2", "total_ms": 2.25, "codes": []}]
        assert journal.resumed == 3


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=0, max_value=10_000))
def test_cut_anywhere_only_the_torn_line_is_lost(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "j"
    write(path)
    data = path.read_bytes()
    cut = cut % len(data)
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    with Journal(path, WHO) as journal:
        assert list(journal.groups) == [f"sample{n}" for n in range(max(0, whole - 1))]
        journal.append("next", [{"sample": "next"}])
    with Journal(path, WHO) as journal:
        assert journal.groups["next"] == [{"sample": "next"}]
        assert journal.resumed == max(0, whole - 1) + 1


def test_a_changed_byte_ends_what_is_believed(path):
    write(path)
    data = bytearray(path.read_bytes())
    lines = bytes(data).splitlines(keepends=True)
    at = len(lines[0]) + len(lines[1]) + lines[2].index(b"1.25")
    data[at] = ord("9")
    path.write_bytes(data)
    with Journal(path, WHO) as journal:
        assert list(journal.groups) == ["sample0"]


@pytest.mark.parametrize("changed", ["study", "machine", "job"])
def test_a_journal_of_something_else_is_set_aside_and_kept(path, changed, caplog):
    write(path)
    before = path.read_bytes()
    with Journal(path, WHO | {changed: "other"}) as journal:
        assert journal.groups == {}
    assert path.with_name(f"{path.name}.1.aside").read_bytes() == before
    assert changed in caplog.text and "starts again" in caplog.text
    with Journal(path, WHO):
        pass
    assert path.with_name(f"{path.name}.2.aside").exists()


def test_garbage_is_set_aside(path):
    path.write_bytes(b"\x00\xffnot a journal\n")
    with Journal(path, WHO) as journal:
        assert journal.groups == {}
    assert path.with_name(f"{path.name}.1.aside").exists()


def test_a_second_process_is_refused_with_the_owners_pid(path):
    with Journal(path, WHO), pytest.raises(TimingError, match=f"pid {os.getpid()} on "):
        Journal(path, WHO)
    with Journal(path, WHO):
        pass


def test_the_lock_dies_with_its_process(path):
    code = f"from stagebench.session.journal import Journal; import os; j = Journal(__import__('pathlib').Path({str(path)!r}), {WHO!r})\n"
    code += "j.append('a', [{'x': 1}]); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with Journal(path, WHO) as journal:
        assert journal.groups == {"a": [{"x": 1}]}


def test_a_full_disk_leaves_whole_lines_only(path, monkeypatch):
    journal = Journal(path, WHO)
    journal.append("a", [{"x": 1}])
    size = path.stat().st_size
    real = os.write

    def half_then_full(fd, data):
        if len(data) > 20:
            return real(fd, bytes(data[:10]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stagebench.session.journal.os.write", half_then_full)
    monkeypatch.setattr("stagebench.session.journal.os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(TimingError, match=r"No space left on device.*Make room"):
        journal.append("b", [{"x": 2}])
    journal.close()
    assert path.stat().st_size == size


def test_nan_is_never_written(path):
    with Journal(path, WHO) as journal, pytest.raises(ValueError, match="JSON"):
        journal.append("a", [{"x": float("nan")}])
    assert "NaN" not in path.read_text()


def test_lines_are_json_behind_a_checksum(path):
    write(path, 1)
    for line in path.read_text().splitlines():
        json.loads(line.partition(" ")[2])


def test_a_file_system_without_locks_costs_a_warning_not_the_job(path, monkeypatch, caplog):
    """NFS mounted with nolock, Lustre without flock."""

    def no_locks(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal.fcntl, "flock", no_locks)
    with Journal(path, WHO) as written:
        written.append("a", [{"sample": "a"}])
    with Journal(path, WHO) as again:
        assert again.groups == {"a": [{"sample": "a"}]}
    assert "has no locks" in caplog.text
