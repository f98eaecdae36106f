"""A small dataset in the layout that EventGPT users have: a drawn drive as H.264 MP4, and the events that a camera would see of it.

It exercises every part of the pipeline that real data does, on a machine with nothing downloaded. It says nothing about answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stagebench.demo.scene import EventCamera, Scene
from stagebench.errors import ConfigError, DatasetError
from stagebench.files import whole_file

__all__ = ["INDEX", "QUESTION", "write_demo"]

INDEX = "EventGPT_Instruction_Subset.json"
QUESTION = "What are the key elements in this scene?"

_RECORD = "demo.json"
_FORMAT = 1
_FPS = 20
_STEP_US = 10_000
_CLIPS_A_SEQUENCE = 2
_T0_US = 51_800_000_000
"""Times as DSEC has them: beyond 32 bits."""


def write_demo(root: Path, clips: int = 6, seed: int = 0, seconds: float = 1.0, size: tuple[int, int] = (480, 640)) -> None:
    """Write the demo dataset: `clips` clips of `seconds` at `size` (height, width), two to a sequence.

    Clip i is the same bytes whatever `clips` is, so a demo can grow. What is there already, of the same seed, seconds and size, is left
    alone; a call that finds all of it writes nothing. Each file comes to its name whole, the index last.

    Raises ConfigError for sizes that cannot be encoded, DatasetError where `root` holds a dataset that is not a demo.
    """
    height, width = size
    if clips < 1 or round(seconds * _FPS) < 1 or min(size) < 32 or height % 2 or width % 2:
        raise ConfigError(
            f"demo of {clips} clips, {seconds} s, {height}x{width}: expected 1 clip or more, 0.05 s or more, even sides of 32 or more."
        )
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise DatasetError(f"{root}: a file, expected a folder to write the demo to. Choose another name.")
    index, record = root / INDEX, root / _RECORD
    parameters = {"format": _FORMAT, "seed": seed, "seconds": seconds, "size": list(size)}
    entries = [_entry(i) for i in range(clips)]
    before = _read_record(record)
    if before is None and index.exists():
        raise DatasetError(f"{root}: holds {INDEX} but no {_RECORD}: a dataset that is no demo. Choose another folder for the demo.")
    if before != parameters:
        # Another demo: its clips must not be taken for these. Without its index it is no dataset from here on.
        index.unlink(missing_ok=True)
        for folder, suffix in (("event_npy", ".npy"), ("mp4", ".mp4")):
            for file in (root / folder).glob(f"demo_*/*{suffix}"):
                file.unlink()
        _write(record, lambda handle: handle.write(_json(parameters)))
    for i in range(clips):
        _write_clip(root, i, seed, seconds, size)
    text = _json(entries)
    if not index.exists() or index.read_bytes() != text:
        _write(index, lambda handle: handle.write(text))


def _name(clip: int) -> str:
    return f"demo_{clip // _CLIPS_A_SEQUENCE:02d}_a/{clip % _CLIPS_A_SEQUENCE:06d}"


def _entry(clip: int) -> dict[str, Any]:
    name = _name(clip)
    return {
        "id": f"demo_{clip:06d}",
        "split": "demo",
        "event_data": f"{name}.npy",
        "mp4_data": f"{name}.mp4",
        "event_image": [],
        "conversations": [{"from": "human", "value": f"<event>\n{QUESTION}"}, {"from": "gpt", "value": ""}],
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_record(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _write_clip(root: Path, clip: int, seed: int, seconds: float, size: tuple[int, int]) -> None:
    """One clip's two files, unless they are there."""
    events, video = root / "event_npy" / f"{_name(clip)}.npy", root / "mp4" / f"{_name(clip)}.mp4"
    if events.exists() and video.exists():
        return
    sequence, place = divmod(clip, _CLIPS_A_SEQUENCE)
    scene = Scene((seed, sequence), size)  # clips of a sequence follow each other on one drive
    begin = place * seconds
    if not video.exists():
        _write(video, lambda handle: _encode(handle, scene, begin, seconds))
    if not events.exists():
        columns = _simulate(scene, begin, seconds, np.random.default_rng((seed, sequence, place)))
        columns["t"] += _T0_US + sequence * 1_000_000_000 + round(begin * 1e6)
        content = np.array(columns, dtype=object)  # the published form: a 0-d object array that holds a dict
        _write(events, lambda handle: np.save(handle, content, allow_pickle=True))


def _simulate(scene: Scene, begin: float, seconds: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """p uint8, t int64 microseconds from the clip's begin, x, y uint16."""
    total = round(seconds * 1e6)
    camera = EventCamera(scene.draw(begin)[0], rng)
    steps: list[dict[str, np.ndarray]] = []
    for start in range(0, total, _STEP_US):
        micros = min(_STEP_US, total - start)
        step = camera.step(scene.draw(begin + (start + micros) / 1e6)[0], micros)
        step["t"] = step["t"].astype(np.int64) + start
        steps.append(step)
    return {key: np.concatenate([step[key] for step in steps]) for key in ("p", "t", "x", "y")}


def _encode(handle: BinaryIO, scene: Scene, begin: float, seconds: float) -> None:
    import av

    options = {"crf": "23", "preset": "medium", "bf": "3", "g": str(_FPS)}
    with av.open(handle, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libx264", rate=_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        # PyAV's default cuts every frame into slices, one a thread. A fixed count, because x264's choices hang on the number of threads.
        stream.thread_type = "AUTO"
        stream.thread_count = 2
        for i in range(round(seconds * _FPS)):
            picture = av.VideoFrame.from_ndarray(scene.rgb(begin + i / _FPS), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    with whole_file(path, DatasetError) as temporary, temporary.open("w+b") as handle:
        fill(handle)
