"""Docs that name things of the code are held true."""

import re
from pathlib import Path

from stagebench.rows import SCHEMA, Code, Status
from stagebench.stages import STAGES


def test_every_column_is_documented(repo: Path) -> None:
    text = (repo / "docs/results-schema.md").read_text()
    ranges = {f"{stage}{suffix}" for stage in STAGES for suffix in ("_gpu_ms", "_peak_bytes")}  # written as first … last
    missing = [name for name in SCHEMA.names if name not in ranges and f"`{name}`" not in text]
    assert not missing, f"docs/results-schema.md does not name {missing}"
    named = set(re.findall(r"`([a-z0-9_]+_(?:ms|bytes|tokens))`", text))
    assert named <= set(SCHEMA.names), f"docs/results-schema.md names columns that do not exist: {named - set(SCHEMA.names)}"


def test_every_status_and_code_is_documented(repo: Path) -> None:
    text = (repo / "docs/results-schema.md").read_text() + (repo / "docs/methodology.md").read_text()
    assert not [status for status in Status if status.value not in text]
    methodology = (repo / "docs/methodology.md").read_text()
    assert not [code.value for code in Code if f"`{code.value}`" not in methodology]


def test_links_between_files_lead_somewhere(repo: Path) -> None:
    broken = []
    for page in [*repo.glob("*.md"), *(repo / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http://", "https://", "mailto:")) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(repo)} -> {target}")
    assert not broken, broken
