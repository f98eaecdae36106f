"""envs/*.yaml: offline checks of what conda would be asked for."""

import ast
import re
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
ENVS = sorted((REPO / "envs").glob("*.yaml"))
# What the modules of each rule family import, beyond the standard library and stagebench itself.
FAMILIES = {
    "extract": ("extract.py", "plan", "store", "sources", "render.py", "dataset", "digests.py", "cache.py"),
    "timing": ("session", "verify.py", "loading.py", "models", "engines", "machine", "store", "sources", "render.py"),
    "report": ("merge", "report", "stats", "tables.py"),
}
PACKAGE_OF = {"yaml": "pyyaml", "PIL": "pillow", "pynvml": "nvidia-ml-py", "vl_convert": "vl-convert-python"}
OPTIONAL = {"bitsandbytes", "flash_attn", "torchao", "torchvision", "triton", "kernels"}


def pins() -> dict[str, str]:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    return {_norm(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def wanted(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in yaml.safe_load(path.read_text())["dependencies"]:
        for item in entry["pip"] if isinstance(entry, dict) else [entry]:
            name, _, version = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(={1,2})?\s*(\S*)", item).groups()
            found[_norm(name)] = version
    return found


def _norm(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("path", ENVS, ids=lambda p: p.stem)
def test_env_agrees_with_the_constraints(path: Path) -> None:
    env = yaml.safe_load(path.read_text())
    assert set(env) == {"channels", "dependencies"}
    assert env["channels"][-1] == "nodefaults"
    known = pins()
    found = wanted(path)
    assert found.pop("python") == "3.11" and found.pop("pip") == ""
    assert found == {name: known.get(name, "not in constraints.txt") for name in found}


@pytest.mark.parametrize("path", ENVS, ids=lambda p: p.stem)
def test_env_holds_what_its_modules_import(path: Path) -> None:
    found = wanted(path)
    missing = set()
    for name in FAMILIES[path.stem]:
        part = REPO / "src" / "stagebench" / name
        for file in sorted(part.rglob("*.py")) if part.is_dir() else [part]:
            missing |= {m for m in _imports(file) if _norm(PACKAGE_OF.get(m, m)) not in found}
    assert missing - OPTIONAL == set(), f"{path.name} lacks these"


def test_every_env_has_a_rule_and_every_rule_an_env() -> None:
    used = set(re.findall(r'"\.\./envs/(\w+)\.yaml"', "\n".join(p.read_text() for p in (REPO / "rules").glob("*.smk"))))
    assert used == {p.stem for p in ENVS}


def test_every_env_installs_the_package() -> None:
    for path in ENVS:
        assert "pip install" in path.with_suffix(".post-deploy.sh").read_text()


def _imports(path: Path) -> set[str]:
    import sys

    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"stagebench", "snakemake"}


@pytest.mark.parametrize("path", ["fetch/requirements-s3.txt", "tests/requirements-s3.txt"])
def test_the_environment_that_fetches_from_s3_is_pinned_as_ours_but_for_what_it_is_there_for(path: str) -> None:
    lines = [line for line in (REPO / path).read_text().splitlines() if not line.startswith("#")]
    found = {_norm(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert all(found.values()), "every line is a pin"
    ours = pins()
    other = {name: version for name, version in found.items() if ours.get(name, version) != version}
    assert set(other) <= {"python-dateutil"}
