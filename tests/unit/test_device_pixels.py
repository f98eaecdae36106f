"""Preprocessing by torch against the reference processors, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from stagebench.errors import ModelError
from stagebench.models import registry
from stagebench.models.base import ModelSpec
from stagebench.models.device_pixels import DevicePixels, resize_weights

torch.set_num_threads(1)
LEVEL = 1 / 255 / 0.26  # one level of a pixel after normalisation, at the smallest of CLIP's deviations
CPU = torch.device("cpu")


def pair(adapter, architecture, frames_as=None):
    made = []
    for how in ("pil", "device"):
        one = registry.create(adapter)
        one.load(ModelSpec("dummy:0", architecture, "tiny", frames_as=frames_as, preprocess=how), "cpu")
        made.append(one)
    return made


def pictures(count, height, width, seed=0):
    """Noise on top of a gradient: edges at every scale, and flat parts."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return [
        np.where(rng.random((height, width, 1)) < 0.5, ramp, rng.integers(0, 256, (height, width, 3))).astype(np.uint8)
        for _ in range(count)
    ]


@pytest.mark.parametrize(("size", "out"), [(640, 224), (480, 336), (60, 224), (336, 336), (7, 3), (3, 7)])
def test_resize_weights_are_pils(size, out):
    rng = np.random.default_rng(1)
    row = rng.integers(0, 256, size, dtype=np.uint8)
    expected = np.asarray(Image.fromarray(row[None]).resize((out, 1), Image.Resampling.BICUBIC))[0]
    found = np.clip(np.floor(resize_weights(size, out) @ row + 0.5), 0, 255)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("adapter", "architecture", "frames_as"),
    [
        ("eventgpt", "eventgpt", None),
        ("hf", "video_llava", None),
        ("hf", "llava", "grid"),
        ("hf", "llava", "images"),
        ("hf", "llava", "first"),
    ],
)
def test_pixels_equal_the_reference_processors(adapter, architecture, frames_as):
    reference, device = pair(adapter, architecture, frames_as)
    for count, height, width in ((3, 120, 160), (5, 61, 47)):
        frames = pictures(count, height, width)
        expected, found = (a.preprocess(frames, "What?") for a in (reference, device))
        assert torch.equal(found.input_ids, expected.input_ids) and found.visual_counts == expected.visual_counts
        for name, tensor in expected.pixels.items():
            other = found.pixels[name]
            assert other.shape == tensor.shape and other.dtype == torch.float32
            difference = (other - tensor).abs()
            assert float(difference.max()) < 1.01 * LEVEL
            assert float((difference > 1e-5).float().mean()) < 1e-3  # sums on a rounding border


def test_frames_of_different_sizes():
    reference, device = pair("eventgpt", "eventgpt")
    frames = [*pictures(1, 80, 60), *pictures(1, 60, 90)]
    expected, found = (a.preprocess(frames, "What?").pixels["pixel_values"] for a in (reference, device))
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 * LEVEL)


def test_other_processors_are_refused():
    with pytest.raises(ModelError, match=r"variants.preprocess: \[pil\]"):
        registry.create("hf").load(ModelSpec("dummy:0", "qwen2_5_vl", "tiny", preprocess="device"), "cpu")
    processor = registry.create("eventgpt")
    processor.load(ModelSpec("dummy:0", "eventgpt", "tiny"), "cpu")
    processor.processor.image_processor.resample = 2
    with pytest.raises(ModelError, match="bicubic"):
        DevicePixels(processor.processor.image_processor, CPU)
