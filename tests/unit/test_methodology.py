"""docs/methodology.md: every item has its rule and a test that exists; the list of codes is the code's own."""

import ast
import re
from pathlib import Path

import pytest

from reliability.mutations import Guard
from reliability.validity_guards import VALIDITY
from stagebench.rows import Code

ITEMS = range(1, 20)


@pytest.fixture
def text(repo: Path) -> str:
    return (repo / "docs/methodology.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> list[list[str]]:
    """Cells of the table rows below a heading, its head left out."""
    part = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, flags=re.S | re.M)
    assert part is not None
    rows = [line for line in part[1].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[1:]]


def test_every_item_names_tests_that_exist(repo: Path, text: str) -> None:
    rows = section(text, "Which test sees each fault")
    named = {int(number) for row in rows for number in re.findall(r"\d+", row[0])}
    assert named == set(ITEMS)
    for item, fault, rule, tests in rows:
        files = re.findall(r"`(test_\w+)`: ((?:`test_\w+`(?:, )?)+)", tests)
        assert fault and rule and files, f"item {item} names no test"
        for file, listed in files:
            (path,) = (repo / "tests/unit").rglob(f"{file}.py")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert set(re.findall(r"`(test_\w+)`", listed)) <= there, f"item {item}: {file} lacks one of {listed}"


def test_codes_named_in_rules_exist(text: str) -> None:
    codes = {code.value for code in Code}
    named = set(re.findall(r"`((?:invalid|suspect|discarded|warn)_\w+)`", text))
    assert named <= codes


def test_the_list_of_codes_is_complete_and_has_no_other(text: str) -> None:
    rows = section(text, "Codes")
    assert [row[0].strip("`") for row in rows] == [code.value for code in sorted(Code, key=[r[0].strip("`") for r in rows].index)]
    for code, meaning, consequence in rows:
        known = Code(code.strip("`"))
        expected = "study INVALID" if known.invalid else "row kept out of means" if known.discards else "shown"
        assert meaning and consequence == expected, code


@pytest.mark.parametrize("guard", VALIDITY, ids=lambda guard: guard.what)
def test_the_rule_that_is_taken_out_is_there(repo: Path, text: str, guard: Guard) -> None:
    assert guard.text in (repo / guard.file).read_text(encoding="utf-8"), (
        f"{guard.file} has changed: say in validity_guards.py what the rule is"
    )
    name = guard.test.partition("::")[2].partition("[")[0]
    assert f"`{name}`" in text and f"def {name}(" in (repo / guard.test.partition("::")[0]).read_text(encoding="utf-8")
