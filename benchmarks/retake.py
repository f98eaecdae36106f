"""Takes the video, write and read tables of docs/results/store.md again, one after the other on cores of their own.

    python3 benchmarks/retake.py                  # one quiet machine with 4 cores or more, about 6 minutes
    python3 benchmarks/retake.py --parts video    # or write, read: 1 to 3 minutes each
    python3 benchmarks/retake.py --quick          # every part, few rounds: does it work here?

Needs numpy, pyarrow, Pillow, pydantic, PyYAML, filelock, av, and what of the peers there is: torch with torchcodec, decord,
opencv-python-headless. No network. torchcodec finds FFmpeg's libraries in the PyAV wheel where the system has none that fit. Each part's
output is in --output as it ends; the video table is printed in the form of the docs. The load is printed before each part: above 2, take
the wall times for the other work's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from video import ALONE, CLASSES, make_clip

HERE = Path(__file__).resolve().parent
READERS = ["torchcodec exact", "PyAV full decode", "OpenCV grab", "decord", "PyAV seek a frame"]


def plain_names(folder: Path) -> str:
    """LD_LIBRARY_PATH with the PyAV wheel's libraries under the names that other programs know them by; "" where there are none."""
    import av

    bundled = Path(av.__file__).resolve().parent.parent / "av.libs"
    for library in bundled.glob("lib*.so*"):
        plain = re.sub(r"-[0-9a-f]{8,}(?=\.so)", "", library.name)
        for name in {plain, re.sub(r"(\.so\.\d+).*", r"\1", plain)}:
            (folder / name).symlink_to(library)
    return f"{folder}:{bundled}" if bundled.exists() else ""


def run(output: Path, name: str, cores: Sequence[int], script: str, *arguments: str, libraries: str = "") -> tuple[str, bool]:
    """A benchmark on these cores; what it prints, which is also put into the folder, and whether it ended well."""
    paths = [str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    if libraries:
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [libraries, os.environ.get("LD_LIBRARY_PATH")]))
    begin = time.monotonic()
    pin = functools.partial(os.sched_setaffinity, 0, cores)
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, preexec_fn=pin
    )
    told = f"$ {script} {' '.join(arguments)}   # cores {list(cores)}, {time.monotonic() - begin:.0f} s, exit {done.returncode}\n"
    (output / f"{name}.txt").write_text(told + done.stdout)
    return told + done.stdout, done.returncode == 0


def video(output: Path, cores: Sequence[int], folder: Path, quick: bool) -> bool:
    """All classes into one table: ours in ms, peers as multiples of it. One after the other: of two at a time, each in a memory that the
    other fills, the larger took half as long again, and its peers another part of that."""
    (folder / "names").mkdir()
    libraries = plain_names(folder / "names")
    classes = list(CLASSES)[:2] if quick else list(CLASSES)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: make_clip(folder / f"{name.replace(' ', '_')}.mp4", *CLASSES[name]), classes))
    path = output / "video.json"
    path.unlink(missing_ok=True)  # of an earlier run: a run that fails must not give its figures
    wanted = ["--readers", *READERS, "--cache", str(folder), "--output", str(path), "--seconds", "2" if quick else "12"]
    told, done = run(output, "video", cores[:1], "video.py", "--classes", *classes, *wanted, libraries=libraries)
    if not done or not path.exists():
        print(told)
        return False
    report = json.loads(path.read_text())
    found = report["clips"]
    print("; ".join(f"{k} {v}" for k, v in [*report["versions"].items(), *report["missing"].items()]))
    print(f"\n| reader | {' | '.join(found)} |\n" + "|---" * (len(found) + 1) + "|")
    for reader in ["stagebench", *READERS, ALONE]:
        print(f"| {reader} | " + " | ".join(_cell(clip, reader) for clip in found.values()) + " |", flush=True)
    return True


def _cell(clip: dict, reader: str) -> str:
    row = clip["readers"].get(reader)
    if row is None:
        return clip["frames"].get(reader, "-")
    if reader == "stagebench":
        return f"{row['cpu_ms']:.1f} ms"
    differs = "" if reader == ALONE or clip["frames"][reader] == "identical" else f", {clip['frames'][reader]}"
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}){differs}"


def write(output: Path, cores: Sequence[int], folder: Path, quick: bool) -> bool:
    """MP4 -> shard, on two cores."""
    two = [cores[0], cores[len(cores) // 2]]  # neighbours may be two threads of one core
    told, done = run(output, "write", two, "extract.py", "--folder", str(folder), *(["--quick"] if quick else ["--clips", "32", "64"]))
    print(told)
    return done


def read(output: Path, cores: Sequence[int], folder: Path, quick: bool) -> bool:
    """Frames from shards, on one core: uncompressed by number of frames, then the codecs."""
    whole: list[tuple[str, list[str]]] = [("read", ["--codecs", "none"]), ("read-codecs", ["--frames", "8"])]
    well = True
    for name, arguments in [("read", ["--quick"])] if quick else whole:
        told, done = run(output, name, cores[:1], "store_read.py", "--folder", str(folder), *arguments)
        print(told)
        well = well and done
    return well


PARTS = {"video": video, "write": write, "read": read}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "results/bench")), help="folder for what is printed")
    parser.add_argument("--folder", help="where clips and shards are written, 4 GB; default: the temporary folder")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    failed: list[str] = []
    for name in arguments.parts:
        begin = time.monotonic()
        print(f"\n## {name}: {len(cores)} cores, load {os.getloadavg()[0]:.1f}\n", flush=True)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            if not PARTS[name](arguments.output, cores, Path(folder), arguments.quick):
                failed.append(name)
        print(f"\n{name}: {time.monotonic() - begin:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
