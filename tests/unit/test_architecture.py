"""Imports run one way, and modules that Snakemake parses with stay light."""

import ast
import subprocess
import sys
from pathlib import Path

ORDER = [
    ("__main__", "cli", "clidoc"),
    ("scripting", "standalone", "console", "doctor"),
    ("report",),
    ("compare",),
    ("merge",),
    ("tables", "thumbnails"),
    ("verify",),
    ("session",),
    ("engines",),
    ("models",),
    ("loading",),
    ("extract", "building"),
    ("plan",),
    ("digests",),
    ("cache", "store"),
    ("sources",),
    ("render",),
    ("dataset",),
    ("demo",),
    ("machine",),
    ("stats",),
    ("rows",),
    ("stages",),
    ("config",),
    ("files",),
    ("errors",),
]
"""From the top to the bottom, as ARCHITECTURE.md draws it. A private module `_x_y` or `x_y` belongs to the room whose files import it."""

LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def rooms(src: Path) -> dict[Path, str]:
    """Which room each file belongs to: its top-level module or package, without a leading underscore."""
    return {path: path.relative_to(src).parts[0].removesuffix(".py") for path in src.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Rooms imported at the top level of a file (a lazy import inside a function is a decision of its own)."""
    found = set()
    type_checking = {
        id(child)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.parse(path.read_text()).body:
        if id(node) in type_checking or isinstance(node, ast.If):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stagebench"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("stagebench.")}
    return found


def test_every_module_has_its_place(repo: Path) -> None:
    src = repo / "src/stagebench"
    public = {room for room in rooms(src).values() if not room.startswith("_")} - {"__init__"}
    assert public <= set(LEVEL), f"say in ORDER and in ARCHITECTURE.md where {sorted(public - set(LEVEL))} stand"
    text = (repo / "ARCHITECTURE.md").read_text()
    missing = [room for room in sorted(public - {"__main__"}) if f"`{room}.py`" not in text and f"`{room}/`" not in text]
    assert not missing, f"ARCHITECTURE.md does not name {missing}"


def test_imports_run_one_way(repo: Path) -> None:
    src = repo / "src/stagebench"
    wrong = [
        f"{path.relative_to(src)} imports {target}"
        for path, room in rooms(src).items()
        for target in imported(path)
        if room in LEVEL and target in LEVEL and room != target and LEVEL[target] < LEVEL[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_planning_is_light() -> None:
    code = (
        "import sys, stagebench.plan, stagebench.config, stagebench.dataset, stagebench.demo\n"
        "heavy = {'torch', 'transformers', 'numba', 'pandas', 'altair'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_library_does_not_assert_or_print(repo: Path) -> None:
    found = []
    for path in (repo / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"):
                found.append(f"{path.name}:{node.lineno}")
    assert not found, found
