"""Frames of a clip: which are taken, what is returned, and reading them from image files.

`sources/video.py` returns the same `Frames` from a video file.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from stagebench.errors import CorruptClipError, NoVideoError, RefusedClipError, ShortClipError, SourceError, TooLargeError, UnsafeFileError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MAX_IMAGE_PIXELS", "Frames", "Sampling", "ShortClips", "choose", "pick", "read_folder", "read_images"]

Sampling = Literal["linspace", "stride"]
ShortClips = Literal["error", "repeat"]

MAX_IMAGE_PIXELS = 1 << 26
"""Pixels of one image or frame at most: 67 megapixels, twice an 8K frame. A few kB of PNG can claim gigapixels."""

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
_IMAGE_FORMATS = ("PNG", "JPEG")  # what Pillow may try, whatever the file's name says
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of one clip, in presentation order.

    `pixels` uint8 [T, H, W, 3], RGB, C-contiguous. `pts` int64 [T] in units of `time_base` seconds (the ordinal, for a
    folder). `indices` int64 [T]: each frame's place among the clip's `available` decodable frames.
    """

    pixels: np.ndarray
    pts: np.ndarray
    indices: np.ndarray
    available: int
    time_base: Fraction | None = None

    def __len__(self) -> int:
        return len(self.pixels)


def pick(total: int, count: int, sampling: str = "linspace") -> list[int]:
    """Indices of `count` of `total` frames, ascending, each in [0, total).

    linspace: floor(i (T-1) / (N-1)), first and last included; one frame is floor((T-1) / 2), the middle. stride:
    floor(i T / N). In whole numbers, so that no rounding of floats decides. With fewer frames than asked for the same
    formulas repeat some: `short_clips: repeat`.

    Raises ValueError for a total or count below 1, or an unknown sampling.
    """
    if total < 1 or count < 1:
        raise ValueError(f"pick({total}, {count}): expected at least 1 frame to pick from and 1 to pick")
    if sampling == "linspace":
        return [(total - 1) // 2] if count == 1 else [i * (total - 1) // (count - 1) for i in range(count)]
    if sampling == "stride":
        return [i * total // count for i in range(count)]
    raise ValueError(f"sampling {sampling!r}: expected one of {get_args(Sampling)}")


def choose(where: object, total: int, count: int, sampling: str = "linspace", short_clips: str = "error") -> list[int]:
    """`pick`, with the rule for short clips. Raises ShortClipError with both counts; ValueError for an unknown rule."""
    if short_clips not in get_args(ShortClips):
        raise ValueError(f"short_clips {short_clips!r}: expected one of {get_args(ShortClips)}")
    if total < count and short_clips == "error":
        raise ShortClipError(
            f"{where}: {total} decodable frame{'s' * (total != 1)}, {count} asked for. "
            "Lower frames.count, or set frames.short_clips: repeat."
        )
    return pick(total, count, sampling)


def read_folder(path: str | Path, count: int, sampling: str = "linspace", *, short_clips: str = "error") -> Frames:
    """`count` frames of a folder of PNG or JPEG images, in natural order of their names (`_2` before `_10`).

    `pts` are the ordinals. Other files and hidden ones are passed over. Raises NoVideoError (no such folder, no image in
    it), ShortClipError, CorruptClipError, TooLargeError, and RefusedClipError where an image's size differs.
    """
    folder = Path(path)
    names = _listing(folder)
    indices = choose(folder, len(names), count, sampling, short_clips)
    pixels: np.ndarray | None = None
    for place, index in enumerate(indices):
        if pixels is not None and place and index == indices[place - 1]:
            pixels[place] = pixels[place - 1]
            continue
        image = _read_image(names[index])
        if pixels is None:
            pixels = np.empty((count, *image.shape), np.uint8)
        elif image.shape != pixels.shape[1:]:
            raise RefusedClipError(
                f"{names[index]}: {image.shape[1]}x{image.shape[0]} pixels, {pixels.shape[2]}x{pixels.shape[1]} in "
                f"{names[indices[0]].name} of the same folder. Make all images of a clip one size."
            )
        pixels[place] = image
    chosen = np.asarray(indices, np.int64)
    if pixels is None:  # count is at least 1, or pick would have raised
        raise NoVideoError(f"{folder}: no image was read. Put the clip's frames there as PNG or JPEG.")
    return Frames(pixels, chosen.copy(), chosen, len(names))


def read_images(paths: Sequence[str | Path]) -> list[np.ndarray]:
    """Image files as RGB uint8 [H, W, 3], in the order given, each at its own size.

    Alpha is dropped; a palette is applied; EXIF orientation is not. Raises NoVideoError, CorruptClipError, TooLargeError,
    RefusedClipError (more than 8 bits of grey).
    """
    return [_read_image(Path(path)) for path in paths]


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key in which digits count as numbers: `a_2` < `a_10`. The name itself settles `1` against `01`."""
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(name)], name


def _listing(folder: Path) -> list[Path]:
    try:
        entries = list(folder.iterdir())
    except (OSError, ValueError) as error:
        raise NoVideoError(f"{folder}: cannot be listed as a folder of frames: {error}. Check the path in the index.") from error
    names = [e for e in entries if e.suffix.lower() in _IMAGE_SUFFIXES and not e.name.startswith(".")]
    if not names:
        raise NoVideoError(f"{folder}: no PNG or JPEG among its {len(entries)} entries. Put the clip's frames there.")
    inside = folder.resolve()
    for name in names:
        if name.is_symlink() and not name.resolve().is_relative_to(inside):
            raise UnsafeFileError(f"{name}: a link that leaves its folder. Put the image itself there.")
    return sorted(names, key=lambda name: natural_key(name.name))


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image

    regular_file(path, "image")
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            _check_image(path, image)
            return np.asarray(image.convert("RGB"))
    except SourceError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{path}: {error}. At most {MAX_IMAGE_PIXELS:,} pixels are read; scale the image down.") from error
    except Exception as error:  # Pillow's parsers raise whatever a hostile file makes them: struct.error, SyntaxError, ...
        raise CorruptClipError(f"{path}: does not decode as PNG or JPEG: {error}. Write the image again.") from error


def _check_image(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise TooLargeError(f"{path}: claims {width}x{height} pixels, at most {MAX_IMAGE_PIXELS:,} are read. Scale it down.")
    if image.mode.startswith(("I", "F")):
        raise RefusedClipError(f"{path}: mode {image.mode} (more than 8 bits of grey), expected 8 bits a channel. Convert it to 8 bits.")


def regular_file(path: Path, what: str) -> int:
    """Size of a regular file in bytes. Raises NoVideoError when it is missing, empty, or a folder, pipe or device."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise NoVideoError(f"{path}: {what} cannot be read: {reason}. Check the path in the index.") from error
    if not stat.S_ISREG(found.st_mode):
        raise NoVideoError(f"{path}: expected a file, found something else (a folder, a pipe, a device). Check the path in the index.")
    if not found.st_size:
        raise NoVideoError(f"{path}: the file is empty (0 bytes). Write or download it again.")
    return found.st_size
