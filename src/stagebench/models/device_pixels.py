"""CLIP's image preprocessing by torch, on the model's device: PIL's bicubic resize, centre crop, rescaling, normalisation.

PIL's arithmetic is kept: its filter (a = -0.5, widened by the scale when shrinking), its two passes, columns first, and its rounding to
whole levels after each. Both passes are matrix products, so pixels differ from PIL's only where a sum lies on a rounding border.
Frames go to the device as uint8, a quarter of the bytes of the float32 pixels that the host would send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from stagebench.errors import ModelError
from stagebench.models._frames import grid_cells, square_middle

__all__ = ["DevicePixels", "frame_grid", "pad_to_square", "resize_weights"]

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


class DevicePixels:
    """uint8 [H, W, 3] frames -> float32 [n, 3, S, S] on the device.

    arrange: what is done to the frames on the device before they are resized (a grid, padding); null leaves them.
    Raises ModelError for an image processor with other steps than CLIP's.
    """

    def __init__(
        self,
        image_processor: Any,
        device: torch.device,
        arrange: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None,
    ) -> None:
        self.device, self._arrange = device, arrange
        self.edge, self.crop = _sizes(image_processor)
        self._factor = float(image_processor.rescale_factor)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
            for values in (image_processor.image_mean, image_processor.image_std)
        )

    @torch.inference_mode()
    def __call__(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        uploaded = [torch.from_numpy(np.ascontiguousarray(frame)).to(self.device) for frame in frames]
        images = self._arrange(uploaded) if self._arrange is not None else uploaded
        if all(image.shape == images[0].shape for image in images):
            return self._pixels(torch.stack(images))
        return torch.cat([self._pixels(image[None]) for image in images])

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, H, W, 3] -> float32 [n, 3, S, S]."""
        height, width = images.shape[1:3]
        down, across = _weights(height, width, self.edge, self.crop, str(self.device))
        x = images.permute(0, 3, 1, 2).to(torch.float32)
        x = _levels(x @ across)  # [n, 3, H, S]
        x = _levels(down @ x)  # [n, 3, S, S]
        return (x * self._factor - self._mean) / self._std


def resize_weights(size: int, out: int) -> np.ndarray:
    """[out, size] float64: row i holds what PIL's bicubic filter takes of each input pixel for output pixel i."""
    scale = size / out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    weights = np.zeros((out, size))
    for i in range(out):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
        taps = np.array([_bicubic((x - centre + 0.5) / stretch) for x in range(first, last)])
        weights[i, first:last] = np.rint(taps / taps.sum() * 2**22) / 2**22  # PIL works with 22 binary places
    return weights


def frame_grid(frames: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """As `_frames.frame_grid`, on the device."""
    size, cells = grid_cells([frame.shape for frame in frames], columns)
    grid = frames[0].new_zeros(*size, 3)
    for frame, cell in zip(frames, cells, strict=True):
        grid[cell] = frame
    return grid


def pad_to_square(image: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    """As `_frames.pad_to_square`, on the device."""
    edge, middle = square_middle(image.shape)
    square = torch.empty(edge, edge, 3, dtype=torch.uint8, device=image.device)
    for channel, level in enumerate(fill):
        square[..., channel].fill_(level)
    square[middle] = image
    return square


def _levels(x: torch.Tensor) -> torch.Tensor:
    """To whole levels, halves up, as PIL's fixed-point sums are."""
    return x.add_(0.5).floor_().clamp_(0, 255)


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


@lru_cache(maxsize=64)
def _weights(height: int, width: int, edge: int, crop: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(down [S, H], across [W, S]) float32: resize of the shortest edge, with the centre crop taken out of it."""
    short, long = sorted((height, width))
    resized_long = int(edge * long / short)
    rows, columns = (edge, resized_long) if height <= width else (resized_long, edge)
    parts = []
    for size, out in ((height, rows), (width, columns)):
        start = (out - crop) // 2
        parts.append(torch.from_numpy(resize_weights(size, out)[start : start + crop]).to(torch.float32))
    with torch.inference_mode(False):
        return parts[0].to(device), parts[1].T.contiguous().to(device)


def _sizes(processor: Any) -> tuple[int, int]:
    """(shortest edge, crop) in pixels."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    size, crop = dict(processor.size or {}), dict(processor.crop_size or {})
    edge = size.get("shortest_edge")
    resample = getattr(processor, "resample", None)
    serves = all(getattr(processor, step, False) for step in steps) and edge and crop.get("height") == crop.get("width")
    if not serves or resample is None or int(resample) != _BICUBIC or crop["height"] > edge:
        raise ModelError(
            f"{type(processor).__name__} with size {size}, crop {crop}, resample {resample}: preprocessing on the device serves CLIP's "
            "steps only (shortest edge, bicubic, square centre crop, rescale, normalise). Set variants.preprocess: [pil]."
        )
    return int(edge or 0), int(crop["height"])
