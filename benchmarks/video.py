"""CPU time of reading 8 frames of a clip: `stagebench.sources.video` against its peers, in one process, interleaved.

    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install -e . -r benchmarks/requirements-peers.txt
    /tmp/peers/bin/python benchmarks/video.py                          # six clip classes, about 5 minutes on 2 cores
    /tmp/peers/bin/python benchmarks/video.py --clips a.mp4 b.mp4      # your own, as they are
    /tmp/peers/bin/python benchmarks/video.py --footage a.mp4          # the six classes of your own pictures, encoded alike

Every reader opens the file, picks the same 8 frames (linspace), returns RGB uint8 [8, H, W, 3], and closes; one decode
thread each. Time is CPU time of the process (and of the ffmpeg program's), so that waiting for a neighbour does not count. Each
round runs every reader once, and FFmpeg's decoder alone on the packets that we decode, in an order drawn anew; a ratio is the median
over rounds of peer / ours in the same round, with its quartiles. Each reader's frames are compared with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

from stagebench.sources import _fast
from stagebench.sources._request import Request
from stagebench.sources.frames import pick
from stagebench.sources.video import LIMITS, read_frames

COUNT, RATE = 8, 20
ALONE = "decoder alone"
CLASSES = {f"{w}x{h} {s} s": (w, h, s) for w, h in ((640, 480), (1440, 1080)) for s in (1, 5, 20)}
Reader = Callable[[Path], np.ndarray]


# --- clips ----------------------------------------------------------------------------------------------------------


def scene(width: int, height: int, frames: int, seed: int = 0) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3]: a camera that moves over a texture with detail at all scales, an object that moves, sensor noise."""
    rng = np.random.default_rng(seed)
    tall, wide = 2 * height, 2 * width
    texture = np.full((tall, wide, 3), 110, np.float32)
    for scale, strength in ((128, 60), (32, 30), (8, 16), (2, 6)):
        coarse = rng.normal(size=(tall // scale + 2, wide // scale + 2, 3)).astype(np.float32)
        fine = coarse.repeat(scale, 0).repeat(scale, 1)[:tall, :wide]
        for axis in (0, 1):
            total = fine.cumsum(axis)
            reach = max(1, scale // 2)
            fine = (np.roll(total, -reach, axis) - np.roll(total, reach, axis)) / (2 * reach)
        texture += strength * fine
    for i in range(frames):
        x, y = int(width / 2 * (1 + np.sin(i * 0.03))), int(height / 2 * (1 + np.cos(i * 0.021)))
        frame = texture[y : y + height, x : x + width].copy()
        left, top = int(width * 5 / 12 * (1 + np.sin(i * 0.11))), int(height * 5 / 12 * (1 + np.cos(i * 0.07)))
        box = frame[top : top + height // 6, left : left + width // 6]
        box[:] = 255 - box
        frame += rng.normal(scale=2, size=(height, width, 1)).astype(np.float32)
        yield frame.clip(0, 255).astype(np.uint8)


def footage(video: Path, width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3]: a video's own pictures, cut to the shape about their middle and scaled, forwards and backwards by turns."""
    import av

    pictures = []
    with av.open(str(video)) as container:
        for frame in container.decode(video=0):
            cut = min(frame.width / width, frame.height / height)
            wide, tall = round(width * cut), round(height * cut)
            left, top = (frame.width - wide) // 2, (frame.height - tall) // 2
            whole = frame.to_ndarray(format="rgb24")[top : top + tall, left : left + wide]
            part = av.VideoFrame.from_ndarray(np.ascontiguousarray(whole), format="rgb24")
            pictures.append(part.reformat(width, height, interpolation="BICUBIC").to_ndarray())
            if len(pictures) == frames:
                break
    there_and_back = [*range(len(pictures)), *range(len(pictures) - 2, 0, -1)]
    for i in range(frames):
        yield pictures[there_and_back[i % len(there_and_back)]]


def make_clip(path: Path, width: int, height: int, seconds: int, video: Path | None = None) -> Path:
    """H.264 yuv420p at 20 frames a second with x264's defaults: B-frames in a pyramid, a keyframe every 250.

    Of drawn pictures, or those of `video`.

    One encoding thread: x264's motion vectors reach less far the more threads it has, by default one and a half for each core, and the
    1440x1080 clip of 20 s was twice as large on 16 cores as on 2.
    """
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "medium", "crf": "23"}
        stream.thread_type, stream.thread_count = "FRAME", 1  # slices, PyAV's default, would change what is decoded
        size = width, height, RATE * seconds
        for pixels in footage(video, *size) if video else scene(*size):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def unreferenced(path: Path) -> float:
    """Share of frames that no other frame refers to: what may be left out."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        context = stream.codec_context
        context.thread_count, context.skip_frame = 1, "NONREF"
        packets = [p for p in container.demux(stream) if p.size]
        decoded = sum(len(context.decode(p)) for p in [*packets, None])
    return 1 - decoded / len(packets)


# --- readers --------------------------------------------------------------------------------------------------------


def ours() -> Reader:
    return lambda path: read_frames(path, COUNT).pixels


def torchcodec() -> Reader:
    import torch
    from torchcodec.decoders import VideoDecoder

    torch.set_num_threads(1)

    def read(path: Path) -> np.ndarray:
        decoder = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC")
        return decoder.get_frames_at(pick(decoder.metadata.num_frames, COUNT)).data.numpy()

    return read


def opencv() -> Reader:
    import cv2

    cv2.setNumThreads(1)

    def read(path: Path) -> np.ndarray:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        wanted = pick(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), COUNT)
        frames = []
        for index in range(wanted[-1] + 1):
            capture.grab()
            if index in wanted:
                frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
        capture.release()
        return np.stack(frames)

    return read


def decord() -> Reader:
    from decord import VideoReader, cpu

    def read(path: Path) -> np.ndarray:
        reader = VideoReader(str(path), ctx=cpu(0), num_threads=1)
        return reader.get_batch(pick(len(reader), COUNT)).asnumpy()

    return read


def pyav_full() -> Reader:
    import av
    from av.video.reformatter import VideoReformatter

    def read(path: Path) -> np.ndarray:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count, stream.thread_type = 1, "NONE"
            wanted, convert, frames = set(pick(stream.frames, COUNT)), VideoReformatter(), []
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted:
                    frames.append(convert.reformat(frame, format="rgb24", threads=1).to_ndarray())
        return np.stack(frames)

    return read


def pyav_seek() -> Reader:
    import av
    from av.video.reformatter import VideoReformatter

    def read(path: Path) -> np.ndarray:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count, stream.thread_type = 1, "NONE"
            convert, frames = VideoReformatter(), []
            step = 1 / (stream.average_rate * stream.time_base)
            for index in pick(stream.frames, COUNT):
                pts = int((stream.start_time or 0) + index * step)
                container.seek(pts, stream=stream)
                frame = next(f for f in container.decode(stream) if f.pts >= pts)
                frames.append(convert.reformat(frame, format="rgb24", threads=1).to_ndarray())
        return np.stack(frames)

    return read


def ffmpeg_program() -> Reader:
    program = shutil.which("ffmpeg")
    if program is None:
        raise ImportError("no ffmpeg program on PATH")

    def read(path: Path) -> np.ndarray:
        import av

        with av.open(str(path), options={"skip_frame": "all"}) as container:
            stream = container.streams.video[0]
            width, height, total = stream.width, stream.height, stream.frames
        chosen = "+".join(f"eq(n\\,{index})" for index in pick(total, COUNT))
        command = [program, "-v", "error", "-threads", "1", "-i", str(path), "-vf", f"select={chosen}", "-fps_mode", "passthrough"]
        raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True).stdout
        return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)

    return read


class DecoderAlone:
    """FFmpeg's decoder on the packets that the asked frames need: no opening, no demuxing, no RGB, nothing of ours.

    What no reader that uses it goes below, as long as all frames that others may refer to are decoded.
    """

    def __init__(self, path: Path) -> None:
        request = Request(path, path.stat().st_size, COUNT, "linspace", "error", "apply", LIMITS)
        self._opened = request.open(probe=False)  # held: when it goes, the file is closed
        video = self._opened.__enter__()
        index = _fast._index(request, video)
        self._runs = _fast._needed(index, {index.pts[i] for i in pick(len(index.pts), COUNT)})
        self._context = video.stream.codec_context
        self._context.reorder_depth = max(self._context.reorder_depth, _fast._reordering(index.packets))
        self._context.skip_frame = "DEFAULT"

    def __call__(self, path: Path) -> None:
        for packets in self._runs:
            for packet in [*packets, None]:
                self._context.decode(packet)
            self._context.flush_buffers()


READERS: dict[str, Callable[[], Reader]] = {
    "stagebench": ours,
    "torchcodec exact": torchcodec,
    "PyAV full decode": pyav_full,
    "OpenCV grab": opencv,
    "decord": decord,
    "ffmpeg program": ffmpeg_program,
    "PyAV seek a frame": pyav_seek,
}


# --- measuring ------------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    return sum(r.ru_utime + r.ru_stime for r in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)))


def measure(path: Path, readers: dict[str, Callable[[Path], object]], seconds: float) -> dict[str, list[float]]:
    """CPU seconds of each reader in each round. At least 5 rounds, then until `seconds` have passed."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    order = list(readers)
    shuffle = random.Random(0).shuffle
    end = time.monotonic() + seconds
    while len(times["stagebench"]) < 5 or time.monotonic() < end:
        shuffle(order)
        for name in order:
            begin = cpu_seconds()
            readers[name](path)
            times[name].append(cpu_seconds() - begin)
    return times


def compare(path: Path, readers: dict[str, Reader]) -> tuple[dict[str, Reader], dict[str, str]]:
    """The readers that can read the file, and what their frames are against ours."""
    reference = readers["stagebench"](path).astype(np.int16)
    working, notes = {}, {}
    for name, read in readers.items():
        try:
            found = read(path)
        except Exception as error:
            notes[name] = f"failed: {type(error).__name__}: {str(error)[:80]}"
            continue
        if found.shape != reference.shape:
            notes[name] = f"{found.shape} instead of {reference.shape}"
            continue
        working[name] = read
        difference = np.abs(reference - found)
        notes[name] = "identical" if not difference.any() else f"differs by up to {difference.max()}, {difference.mean():.2f} on average"
    return working, notes


def summarise(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    result = {}
    for name, seconds in times.items():
        ratios = [peer / own for peer, own in zip(seconds, times["stagebench"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        result[name] = {
            "cpu_ms": 1e3 * statistics.median(seconds),
            "cpu_ms_min": 1e3 * min(seconds),
            "ratio": statistics.median(ratios),
            "ratio_low": low,
            "ratio_high": high,
            "rounds": len(seconds),
        }
    return result


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cpu": _cpu(), "cores": str(os.cpu_count())}
    for name in ("av", "torchcodec", "torch", "opencv-python-headless", "decord", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if shutil.which("ffmpeg"):
        words = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=False).stdout.split()
        found["ffmpeg program"] = words[2] if len(words) > 2 else "does not start"
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", nargs="*", type=Path, help="files to read, instead of the six classes")
    parser.add_argument("--classes", nargs="*", choices=CLASSES, default=list(CLASSES), help="clip classes to measure (default: all)")
    parser.add_argument("--footage", type=Path, help="make the clips of the classes from this video's pictures, not from drawn ones")
    parser.add_argument("--readers", nargs="*", choices=READERS, default=list(READERS))
    parser.add_argument("--seconds", type=float, default=30, help="measuring time of a clip class (default: 30)")
    parser.add_argument("--cache", type=Path, help="keep the clips that are made here")
    parser.add_argument("--output", type=Path, help="write all times as JSON here")
    arguments = parser.parse_args()

    readers, missing = {}, {}
    for name in dict.fromkeys(["stagebench", *arguments.readers]):
        try:
            readers[name] = READERS[name]()
        except Exception as error:  # a peer may fail in any way at import: a missing library is a RuntimeError or OSError
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"

    report: dict[str, object] = {"command": " ".join(sys.argv), "versions": versions(), "missing": missing}
    clips: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.cache or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.clips:
            todo = {path.name: path for path in arguments.clips}
        else:
            of = f"_{arguments.footage.stem}" if arguments.footage else ""
            todo = {name: folder / f"{name.replace(' ', '_')}{of}.mp4" for name in arguments.classes}
            for name, path in todo.items():
                if not path.exists():
                    print(f"making {path.name}", file=sys.stderr)
                    make_clip(path, *CLASSES[name], arguments.footage)
        for name, path in todo.items():
            working, notes = compare(path, readers)
            times = measure(path, working | {ALONE: DecoderAlone(path)}, arguments.seconds)
            notes[ALONE] = "not read"
            clips[name] = {"unreferenced": unreferenced(path), "bytes": path.stat().st_size, "frames": notes, "readers": summarise(times)}
            show(name, clips[name])
    report["clips"] = clips
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    print("; ".join(f"{name} {version}" for name, version in versions().items()))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1))
    return 0


def show(name: str, clip: dict) -> None:
    print(f"\n{name}: {clip['bytes']:,} bytes, {clip['unreferenced']:.0%} of its frames unreferenced")
    print("| reader | CPU ms (median) | x stagebench (quartiles) | frames |\n|---|---|---|---|")
    for reader, note in clip["frames"].items():
        row = clip["readers"].get(reader)
        figures = f"{row['cpu_ms']:.1f} | {row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})" if row else "- | -"
        print(f"| {reader} | {figures} | {note} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
