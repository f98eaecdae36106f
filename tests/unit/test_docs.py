"""Docs that name things of the code are held true."""

import ast
import doctest
import posixpath
import re
import shlex
import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

from stagebench import cli, clidoc
from stagebench.config import Config, load_config
from stagebench.merge.layout import COLUMNS
from stagebench.rows import SCHEMA, Code, Status
from stagebench.stages import STAGES


def test_every_column_is_documented(repo: Path) -> None:
    text = (repo / "docs/results-schema.md").read_text()
    ranges = {f"{stage}{suffix}" for stage in STAGES for suffix in ("_gpu_ms", "_peak_bytes")}  # written as first … last
    missing = [name for name in SCHEMA.names if name not in ranges and f"`{name}`" not in text]
    assert not missing, f"docs/results-schema.md does not name {missing}"
    named = set(re.findall(r"`([a-z0-9_]+_(?:ms|bytes|tokens))`", text))
    assert named <= set(SCHEMA.names), f"docs/results-schema.md names columns that do not exist: {named - set(SCHEMA.names)}"


def test_every_column_of_every_table_is_documented(repo: Path) -> None:
    schema, tables = ((repo / f"docs/{name}.md").read_text() for name in ("results-schema", "tables"))
    named = set(re.findall(r"`([a-z0-9_]+)`", tables))
    columns = {column for of_table in COLUMNS.values() for column in of_table}
    missing = sorted(c for c in columns - named if f"`{c}`" not in schema and c not in SCHEMA.names)
    assert not missing, f"docs/tables.md does not name {missing}"
    first = {c for line in re.findall(r"^\| (`.*?) \|", tables, flags=re.M) for c in re.findall(r"`([a-z0-9_]+)`", line)}
    assert first <= columns, f"docs/tables.md names columns that no table has: {sorted(first - columns)}"
    assert set(COLUMNS) == {n for line in re.findall(r"^## (.*)$", tables, flags=re.M)[1:] for n in line.split(", ")} | {"failures"}


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


def blocks(repo: Path, language: str) -> Iterator[tuple[str, str]]:
    """(page, text) of each fenced block in a language."""
    for page in [repo / "README.md", *sorted((repo / "docs").rglob("*.md"))]:
        for found in re.finditer(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), flags=re.S | re.M):
            yield page.name, textwrap.dedent(found[2])


def slug(heading: str) -> str:
    """mkdocs' anchor of a heading (Python-Markdown's slugify)."""
    text = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip())


def test_anchors_lead_to_headings(repo: Path) -> None:
    broken = []
    for page in (repo / "docs").rglob("*.md"):
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text()):
            if target.endswith(".png"):
                assert anchor in ("only-light", "only-dark"), f"{page.name}: {target}#{anchor}"
                continue
            text = (page.parent / target if target else page).read_text()
            if anchor not in {slug(h) for h in re.findall(r"^#+ (.+)$", text, flags=re.M)}:
                broken.append(f"{page.name} -> {target}#{anchor}")
    assert not broken, broken


def test_the_command_line_reference_is_up_to_date(repo: Path) -> None:
    assert (repo / "docs/cli.md").read_text() == clidoc.markdown(), "python -m stagebench.clidoc > docs/cli.md"


def test_every_command_has_help_for_all_it_takes() -> None:
    def walk(command, name: str) -> Iterator[str]:
        if not command.help:
            yield f"{name}: no help"
        yield from (f"{name} {p.name}: no help" for p in command.params if not getattr(p, "help", None))
        for child in getattr(command, "commands", {}).values():
            yield from walk(child, f"{name} {child.name}")

    assert not list(walk(typer.main.get_command(cli.app), "stagebench"))


def test_commands_in_the_docs_exist(repo: Path) -> None:
    root = typer.main.get_command(cli.app)
    seen = 0
    for page, text in blocks(repo, "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if not words or words[0] != "stagebench":
                continue
            seen += 1
            command, rest = root, words[1:]
            while rest and rest[0] in getattr(command, "commands", {}):
                command, rest = command.commands[rest[0]], rest[1:]
            assert not hasattr(command, "commands") or rest[:1] in ([], ["--install-completion"]), f"{page}: {line}"
            known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            unknown = [w for w in rest if w.startswith("-") and w not in known]
            assert not unknown, f"{page}: {line}: no {unknown}"
            arguments = [p for p in command.params if p.param_type_name == "argument"]
            assert rest.count("") == 0 and (not arguments or len(rest) >= sum(p.required for p in arguments)), f"{page}: {line}"
    assert seen > 10


def test_make_targets_in_the_docs_exist(repo: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (repo / "Makefile").read_text(), flags=re.M))
    named = {
        m
        for page in [*repo.glob("*.md"), *(repo / "docs").rglob("*.md")]
        for m in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", page.read_text(), re.M)
    }
    assert named and named <= targets, named - targets


def test_yaml_blocks_are_valid_studies_or_parts_of_one(repo: Path) -> None:
    seen = 0
    for page, text in blocks(repo, "yaml"):
        data = yaml.safe_load(text)
        if not isinstance(data, dict) or not set(data) <= set(Config.model_fields):
            continue  # a Snakemake profile, or another tool's file
        seen += 1
        whole = {
            "study": "docs",
            "datasets": {"d": {"root": "d"}},
            "models": {"m": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"}},
        }
        try:
            load_config({**whole, **data})
        except Exception as error:
            pytest.fail(f"{page}: {error}\n{text}")
    assert seen >= 2


def test_python_blocks_compile_and_examples_give_what_they_say(repo: Path) -> None:
    examples = 0
    for page in sorted((repo / "docs").rglob("*.md")):
        own = [text for name, text in blocks(repo, "python") if name == page.name]
        plain = [text for text in own if ">>>" not in text]
        for text in plain:
            ast.parse(text)
        session = "\n".join(text for text in own if ">>>" in text)
        if not session:
            continue
        test = doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0)
        report: list[str] = []
        failed, tried = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
        assert not failed, "".join(report)
        examples += tried
    assert examples > 20


def test_every_key_and_flag_of_the_migration_table_exists(repo: Path) -> None:
    text = (repo / "docs/old-flags.md").read_text()
    benchmark, _ = text.split("## Extraction and datasets")
    commands = {c.name: {o for p in c.params for o in p.opts} for c in typer.main.get_command(cli.app).commands.values()}
    for row in re.findall(r"^\| `--.*\|$", benchmark, flags=re.M):
        new = set(re.findall(r"--[a-z][a-z0-9-]+", row.split("|")[2]))
        assert new <= commands["run"], f"{row}: {new - commands['run']}"
    config = (repo / "docs/config.md").read_text()
    sections = {
        re.sub(r"&lt;name&gt;", "<name>", m[1]): m[2] for m in re.finditer(r"^## (\S+)\n(.*?)(?=^## |\Z)", config, flags=re.S | re.M)
    }
    for key in re.findall(r"`((?:datasets|frames|events|shards|models|variants|timing)\.[a-z_.<>]+)", text):
        section, _, leaf = key.rpartition(".")
        assert section in sections and f"| `{leaf}` |" in sections[section], f"{key} is no key of a study"


def test_the_site_lists_every_page(repo: Path) -> None:
    """mkdocs itself is not needed here: `make docs` builds strictly."""

    def files(entry) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for child in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(child)

    listed = set(files(yaml.safe_load((repo / "mkdocs.yml").read_text())["nav"]))
    there = {posixpath.relpath(p.as_posix(), (repo / "docs").as_posix()) for p in (repo / "docs").rglob("*.md")}
    assert listed == there, listed ^ there


def test_captions_of_the_workflow_report_exist(repo: Path) -> None:
    text = "".join((repo / "rules" / name).read_text() for name in ("merge.smk", "report.smk"))
    tables = re.search(r"TABLES = \((.*?)\)", text, flags=re.S)
    assert tables is not None
    named = {f"captions/{t}.rst" for t in re.findall(r'"(\w+)"', tables[1])} | set(re.findall(r'"(captions/\w+\.rst)"', text))
    assert named == {f"captions/{p.name}" for p in (repo / "rules/captions").iterdir()}
