"""The table of guards is true: each text is in the source once, and each test is there. `make guards` takes them out."""

from pathlib import Path

import pytest

from reliability.mutations import GUARDS, Guard


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.what)
def test_the_guard_is_there(repo: Path, guard: Guard) -> None:
    assert guard.text in (repo / guard.file).read_text(encoding="utf-8"), f"{guard.file} has changed: say in mutations.py what the guard is"
    file, _, name = guard.test.partition("::")
    source = (repo / file).read_text(encoding="utf-8")
    assert not name or f"def {name.partition('[')[0]}(" in source


def test_every_guard_is_documented(repo: Path) -> None:
    text = (repo / "docs/reliability.md").read_text(encoding="utf-8")
    missing = sorted({guard.test.partition("::")[2].partition("[")[0] for guard in GUARDS} - set())
    assert not [name for name in missing if name and name not in text]
