"""How an image model takes several frames, and what it is asked then."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = [
    "FRAMES_AS",
    "GRID_COLUMNS",
    "arrange",
    "frame_grid",
    "grid_cells",
    "llava_prompt",
    "pad_to_square",
    "square_middle",
    "video_llava_prompt",
]

FRAMES_AS = ("grid", "images", "first", "video")
GRID_COLUMNS = 4


def arrange(frames: Sequence[np.ndarray], frames_as: str) -> list[np.ndarray]:
    """Frames -> the images that the model is given: one grid, all, or the first. A video's frames stay as they are."""
    if frames_as == "grid":
        return [frame_grid(frames)]
    return list(frames[:1]) if frames_as == "first" else list(frames)


def frame_grid(frames: Sequence[np.ndarray], columns: int = GRID_COLUMNS) -> np.ndarray:
    """uint8 [H, W, 3] frames -> one uint8 image, row by row, each at its own size.

    Cells are as large as the largest frame; what a frame does not fill is black.
    """
    size, cells = grid_cells([frame.shape for frame in frames], columns)
    grid = np.zeros((*size, 3), np.uint8)
    for frame, cell in zip(frames, cells, strict=True):
        grid[cell] = frame
    return grid


def grid_cells(shapes: Sequence[Sequence[int]], columns: int) -> tuple[tuple[int, int], list[tuple[slice, slice]]]:
    """(H, W) of the grid of frames of these shapes (H, W, ...), and the rows and columns of each in it."""
    height, width = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    columns = min(columns, len(shapes))
    corners = [(i // columns * height, i % columns * width) for i in range(len(shapes))]
    cells = [(slice(top, top + shape[0]), slice(left, left + shape[1])) for (top, left), shape in zip(corners, shapes, strict=True)]
    return (math.ceil(len(shapes) / columns) * height, columns * width), cells


def pad_to_square(image: np.ndarray, fill: Sequence[int]) -> np.ndarray:
    """uint8 [H, W, 3] -> [max, max, 3], the image in the middle of a plain colour: LLaVA-1.5's own setting (`image_aspect_ratio: pad`)."""
    edge, middle = square_middle(image.shape)
    square = np.empty((edge, edge, 3), np.uint8)
    square[:] = np.asarray(fill, np.uint8)
    square[middle] = image
    return square


def square_middle(shape: Sequence[int]) -> tuple[int, tuple[slice, slice]]:
    """Edge of the square around an image of this shape (H, W, ...), and the rows and columns of the image in it."""
    height, width = shape[:2]
    edge = max(height, width)
    top, left = (edge - height) // 2, (edge - width) // 2
    return edge, (slice(top, top + height), slice(left, left + width))


def llava_prompt(frames_as: str) -> str:
    if frames_as == "grid":
        return "USER: <image>\nThis image shows {n} video frames arranged in a grid. {query}\nASSISTANT:"
    return "USER: {images}{query} ASSISTANT:"


def video_llava_prompt(frames_as: str) -> str:
    return "USER: <video>\n{query} ASSISTANT:" if frames_as == "video" else llava_prompt(frames_as)
