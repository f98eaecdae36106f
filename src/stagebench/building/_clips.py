"""What all builders share: durations and windows, atomic clip files, an H.264 encoder, the index and the record of how it was built."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from stagebench.demo import INDEX, QUESTION
from stagebench.errors import ConfigError, DatasetError
from stagebench.files import whole_file

__all__ = [
    "Encoder",
    "cannot_write",
    "claim",
    "clip_files",
    "duration_label",
    "parse_duration",
    "save_events",
    "windows",
    "worker_pool",
    "write_index",
    "write_text",
]

_RECORD = "built.json"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_UNITS = {"us": 1, "ms": 1000, "s": 1_000_000}


def parse_duration(text: str) -> int:
    """`200ms`, `1s`, `0.5s` -> microseconds. Raises ConfigError."""
    found = _DURATION.fullmatch(text.strip().lower())
    micros = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not 10_000 <= micros <= 600_000_000:
        raise ConfigError(f"duration {text!r}: expected a number and a unit, as in 200ms or 1s, from 10ms to 600s.")
    return micros


def duration_label(micros: int) -> str:
    """1_000_000 -> 1s, 200_000 -> 200ms: how a dataset of this duration is called."""
    return f"{micros // 1_000_000}s" if micros % 1_000_000 == 0 else f"{micros / 1000:g}ms"


def windows(begin: int, end: int, duration: int, overlap: float) -> Iterator[tuple[int, int]]:
    """Whole clips [t0, t0 + duration) of [begin, end), in microseconds; each begins duration * (1 - overlap) after the one before.

    Raises ConfigError for an overlap outside [0, 0.95].
    """
    _check_overlap(overlap)
    step = max(1, round(duration * (1 - overlap)))
    t0 = begin
    while t0 + duration <= end:
        yield t0, t0 + duration
        t0 += step


def _check_overlap(overlap: float) -> None:
    if not 0 <= overlap <= 0.95:
        raise ConfigError(f"overlap {overlap}: expected a share from 0 to 0.95; 0.5 lets each clip share half of the one before.")


def claim(root: Path, parameters: Mapping[str, Any]) -> None:
    """Make `root` a dataset built with these parameters, or find that it is one.

    Raises DatasetError when it is another, ConfigError for an overlap that `windows` refuses: nothing may be claimed for such a one.
    """
    _check_overlap(parameters["overlap"])
    record = root / _RECORD
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (root / INDEX).exists():
            raise DatasetError(
                f"{root}: holds {INDEX} but no {_RECORD}: a dataset that was not built here. Choose another folder."
            ) from None
        write_text(record, json.dumps(dict(parameters), indent=2) + "\n")
        return
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{record}: cannot be read ({error}). Delete the folder and build again.") from error
    if before != parameters:
        changed = ", ".join(k for k in sorted({*before, *parameters}) if before.get(k) != parameters.get(k))
        raise DatasetError(f"{root}: built before with another {changed}. Choose another folder, or the same settings.")


def write_index(root: Path, names: Iterable[str], splits: Mapping[str, str], query: str | None) -> int:
    """Write the index of these clips and of what an earlier call put there; how many clips it holds.

    names: `<sequence>/<number>`. splits: sequence -> split. Only clips whose two files are there are listed.
    """
    path = root / INDEX
    try:
        before = {entry["id"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        before = {}
    for name in names:
        human = {"from": "human", "value": f"<event>\n{query or QUESTION}"}
        files = {"event_data": f"{name}.npy", "mp4_data": f"{name}.mp4"}
        split = splits.get(name.rpartition("/")[0], "")
        before[name] = {"id": name, "split": split, **files, "event_image": [], "conversations": [human, {"from": "gpt", "value": ""}]}
    entries = [before[name] for name in sorted(before) if all(p.exists() for p in clip_files(root, name))]
    write_text(path, json.dumps(entries, indent=1) + "\n")
    return len(entries)


def clip_files(root: Path, name: str) -> tuple[Path, Path]:
    """(events, video) of a clip."""
    return root / "event_npy" / f"{name}.npy", root / "mp4" / f"{name}.mp4"


def save_events(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """A 0-d object array that holds the dict, as published; whole or not there."""
    content = np.array(dict(columns), dtype=object)
    with whole_file(path, DatasetError) as temporary, temporary.open("wb") as handle:
        np.save(handle, content, allow_pickle=True)


class Encoder:
    """An H.264 file (yuv420p, CRF 18) that is there only when it is whole. A context manager; `add` takes uint8 [H, W, 3].

    Odd sides lose their last row or column: yuv420p has none.
    """

    def __init__(self, path: Path, fps: Fraction | float) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.stem}.{os.getpid()}.part.mp4")
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames = 0
        self._stream: Any = None
        path.parent.mkdir(parents=True, exist_ok=True)
        import av

        self._container: Any = av.open(str(self.temporary), "w", format="mp4", options={"fflags": "+bitexact"})

    def add(self, pixels: np.ndarray) -> None:
        import av

        height, width = (side - side % 2 for side in pixels.shape[:2])
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self.fps, options={"crf": "18", "preset": "fast"})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.thread_type, self._stream.thread_count = "AUTO", 1
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
        self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def close(self, *, keep: bool) -> None:
        """Finish the file under its name, or throw it away. A second call does nothing."""
        if self._container is None:
            return
        container, self._container = self._container, None
        keep = keep and self._stream is not None
        try:
            if keep:
                container.mux(self._stream.encode())
            container.close()
            if keep:
                self.temporary.replace(self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(keep=kind is None)


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of their own (spawned: decoders and HDF5 do not survive a fork). Raises DatasetError when one of them was killed."""
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    except BrokenProcessPool:
        raise DatasetError(
            f"one of {workers} workers was killed, for want of memory most likely. Call the same again with fewer --workers: "
            "what is done stays."
        ) from None


def cannot_write(root: Path, error: OSError) -> DatasetError:
    """What a clip's files could not be written for."""
    return DatasetError(
        f"{root}: cannot be written ({error}). Make room or check the folder's rights, then call again: what is done stays."
    )


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not there."""
    with whole_file(path, DatasetError) as temporary:
        temporary.write_text(text, encoding="utf-8")
