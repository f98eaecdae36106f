"""How an image model takes several frames, and what it is asked then."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["FRAMES_AS", "GRID_COLUMNS", "arrange", "frame_grid", "llava_prompt", "pad_to_square", "video_llava_prompt"]

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
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    columns = min(columns, len(frames))
    grid = np.zeros((math.ceil(len(frames) / columns) * height, columns * width, 3), np.uint8)
    for i, frame in enumerate(frames):
        top, left = i // columns * height, i % columns * width
        grid[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return grid


def pad_to_square(image: np.ndarray, fill: Sequence[int]) -> np.ndarray:
    """uint8 [H, W, 3] -> [max, max, 3], the image in the middle of a plain colour: LLaVA-1.5's own setting (`image_aspect_ratio: pad`)."""
    height, width = image.shape[:2]
    edge = max(height, width)
    square = np.empty((edge, edge, 3), np.uint8)
    square[:] = np.asarray(fill, np.uint8)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def llava_prompt(frames_as: str) -> str:
    if frames_as == "grid":
        return "USER: <image>\nThis image shows {n} video frames arranged in a grid. {query}\nASSISTANT:"
    return "USER: {images}{query} ASSISTANT:"


def video_llava_prompt(frames_as: str) -> str:
    return "USER: <video>\n{query} ASSISTANT:" if frames_as == "video" else llava_prompt(frames_as)
