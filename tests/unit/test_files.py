"""Files that are whole or not there."""

from pathlib import Path

import pytest

from stagebench.errors import PlanError
from stagebench.files import whole_file


def test_two_writers_with_one_process_id_do_not_meet(tmp_path: Path) -> None:
    """As processes in two containers have that share a folder: each file is one writer's own, and the last one stays."""
    path = tmp_path / "plan.json"
    with whole_file(path, PlanError) as one:
        one.write_text("one, which is longer")
        with whole_file(path, PlanError) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one, which is longer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(path, PlanError) as temporary:
        temporary.write_text("half")
        _ = 1 // 0
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
