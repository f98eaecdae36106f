"""What could run code from a file, or open the network, is used nowhere in the library; what tells durations is no wall clock."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

NEVER = {
    "eval", "exec", "compile", "__import__",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads", "shelve.open",
    "torch.load", "np.load", "numpy.load", "pd.read_pickle",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load",
    "os.system", "os.popen", "runpy.run_path",
    "urllib.request.urlopen", "requests.get", "httpx.get", "socket.socket", "socket.create_connection",
    "tempfile.mktemp", "ctypes.CDLL",
}  # fmt: skip
WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}
MEASURING = ("stages.py", "session/core.py", "session/run.py", "session/build.py", "session/repeats.py", "engines/", "machine/anchor.py")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def files(repo: Path) -> list[tuple[str, Path]]:
    src = repo / "src/stagebench"
    found = [(path.relative_to(src).as_posix(), path) for path in sorted(src.rglob("*.py"))]
    assert len(found) > 80
    return found


def test_nothing_runs_code_from_files(repo: Path) -> None:
    wrong = [
        f"{name}:{node.lineno} {called}"
        for name, path in files(repo)
        for called, node in calls(path)
        if called in NEVER and ast.unparse(node) != "ctypes.CDLL(None)"  # the process itself, whose symbols are loaded already
    ]
    assert not wrong


@pytest.mark.parametrize(
    "keyword, safe", [("allow_pickle", ()), ("trust_remote_code", (False,)), ("shell", (False,)), ("weights_only", (True,))]
)
def test_switches_that_allow_code(repo: Path, keyword: str, safe: tuple[bool, ...]) -> None:
    """`np.save(..., allow_pickle=True)` of the demo writes what users' datasets look like; nothing reads that way."""
    wrong = [
        f"{name}:{node.lineno} {called}({keyword}={ast.unparse(given.value)})"
        for name, path in files(repo)
        for called, node in calls(path)
        for given in node.keywords
        if given.arg == keyword and called != "np.save" and not (isinstance(given.value, ast.Constant) and given.value.value in safe)
    ]
    assert not wrong


def test_pretrained_parts_say_that_no_code_is_run(repo: Path) -> None:
    """The Auto classes follow `auto_map`; a class that is named here cannot."""
    wrong = [
        f"{name}:{node.lineno} {called}"
        for name, path in files(repo)
        if name.startswith("models/")
        for called, node in calls(path)
        if called.endswith(".from_pretrained")
        and called.removeprefix("transformers.").startswith(("Auto", "auto."))
        and "trust_remote_code" not in {k.arg for k in node.keywords}
    ]
    assert not wrong


def test_durations_come_from_no_wall_clock(repo: Path) -> None:
    """A step of the wall clock by an hour must not show in a time. `datetime.now` may date a job, in job.py only."""
    wrong = [
        f"{name}:{node.lineno} {called}"
        for name, path in files(repo)
        if name.startswith(MEASURING)
        for called, node in calls(path)
        if called in WALL_CLOCK
    ]
    assert not wrong


def test_every_dependency_is_audited(repo: Path) -> None:
    """SECURITY.md says of each what it parses and what it could run; those of development and documentation see nothing of a stranger's."""
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    stated = [*project["dependencies"], *(line for name in extras if name not in ("dev", "docs", "all") for line in extras[name])]
    names = {re.split(r"[\s<>=!~\[;]", line)[0] for line in stated}
    table = (repo / "SECURITY.md").read_text(encoding="utf-8").partition("## Dependencies")[2]
    audited = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    assert len(names) > 20
    assert not [name for name in sorted(names) if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", audited)]


def test_no_compiled_code_is_kept_as_pickles(repo: Path) -> None:
    """numba's cache on disk is pickles beside the source or in NUMBA_CACHE_DIR."""
    jit = [node for _, path in files(repo) for called, node in calls(path) if called.split(".")[-1] in ("njit", "jit", "vectorize")]
    ours = [node for node in jit if "numba" in ast.unparse(node.func)]
    assert ours
    assert not [node.lineno for node in ours for given in node.keywords if given.arg == "cache"]
