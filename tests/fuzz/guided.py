"""Coverage-guided fuzzing of readers that are written in Python: atheris (libFuzzer) keeps inputs that reach new code, and changes them.

    pip install -r tests/fuzz/requirements.txt
    cd tests && python -m fuzz.guided npy -max_total_time=300

Readers: npy, index, config. Whatever stands behind the reader goes to libFuzzer. A finding is kept under tests/fuzz/findings/ and ends the
run with libFuzzer's exit code; `python -m fuzz --replay` does not read these: give the file as the last argument here instead.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["stagebench", "yaml"]):
    import stagebench.dataset  # these the readers import when they are called, and that would not be instrumented
    import stagebench.sources.events
    import stagebench.sources.safe_npy  # noqa: F401
    from fuzz import readers

NAMES = ("npy", "index", "config")
TOKENS = {"npy": readers.NPY_TOKENS, "index": readers.INDEX_TOKENS, "config": readers.YAML_TOKENS}
FINDINGS = Path(__file__).parent / "findings"
SEEDS = 60


def main() -> None:
    name, *options = sys.argv[1:] or [""]
    if name not in NAMES:
        sys.exit(f"fuzz.guided: {name!r} is none of {', '.join(NAMES)}")
    reader = readers.READERS[name]
    before = b"Y" if name == "config" else b""  # as YAML, which JSON is, too

    def read(data: bytes) -> None:
        reader.holds(before + data)

    logging.disable(logging.CRITICAL)
    FINDINGS.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="stagebench-guided-"))
    (folder / "corpus").mkdir()
    for number in range(SEEDS):
        (folder / "corpus" / str(number)).write_bytes(reader.make(random.Random(number)).removeprefix(b"V").removeprefix(b"Y"))
    lines = ['"' + "".join(f"\\x{byte:02x}" for byte in token) + '"' for token in TOKENS[name] if len(token) < 64]
    (folder / "tokens").write_text("\n".join(lines) + "\n")
    given = [f"-dict={folder / 'tokens'}", f"-artifact_prefix={FINDINGS}/guided-{name}-"]
    given += ["-timeout=60", "-rss_limit_mb=4096", "-max_len=8192"]
    replay = [option for option in options if not option.startswith("-")]
    atheris.Setup([sys.argv[0], *given, *options, *([] if replay else [str(folder / "corpus")])], read)
    atheris.Fuzz()  # does not come back


if __name__ == "__main__":
    main()
