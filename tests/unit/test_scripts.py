"""What a job costs before it works: each script's imports, as Snakemake starts them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "scripts").glob("*.py"))
NEEDS_TORCH = ("timing", "verify")


def imports_of(script: Path) -> str:
    """Every import statement that runs in a job, type checking left out."""
    tree = ast.parse(script.read_text())
    unused = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in unused]
    return "\n".join(map(ast.unparse, found))


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.stem not in NEEDS_TORCH], ids=lambda s: s.stem)
def test_imports_take_less_than_a_second_of_cpu(script: Path) -> None:
    code = (
        f"{imports_of(script)}\n"
        "import resource, sys\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, *{'torch', 'transformers', 'numba', 'pandas'} & set(sys.modules))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert runs[0][1:] == [], "a module that takes seconds"
    assert min(float(run[0]) for run in runs) < 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_nothing_heavy_is_imported_before_the_log_file_is_open(script: Path) -> None:
    """So that an import that fails stands in the rule's log."""
    top = [node for node in ast.parse(script.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {node.module for node in top if isinstance(node, ast.ImportFrom)} <= {"pathlib", "typing", "stagebench.scripting"}
