"""The demo's world: a road with lane markings, cars and posts under a horizon, and an event camera that watches it.

Drawn by numpy from a flat-ground pinhole model: row y below the horizon shows the ground at depth f * h / (y - horizon). Luminance has
12 bits; the event camera works on a table of its logarithm in whole numbers, so that the events do not hang on how a machine rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["EventCamera", "Scene"]

_LEVELS = 4096
_LOG_UNIT = 4096
_CAMERA_HEIGHT = 1.5
_LANE = 3.5
_DASH = 6.0
_POST_GAP = 14.0
_FAR = 120.0

_SKY, _GRASS, _ROAD, _MARK, _CAR, _GLASS, _LAMP, _POST = range(8)
_TINTS = np.array(
    [[0.80, 0.90, 1.0], [0.75, 1.0, 0.60], [1, 1, 1], [1, 1, 0.95], [1, 1, 1], [0.6, 0.75, 0.9], [1.0, 0.35, 0.3], [0.9, 0.75, 0.6]],
    np.float32,
)
_CAR_TINTS = np.array([[1.0, 0.45, 0.4], [0.5, 0.65, 1.0], [0.95, 0.95, 0.95], [0.9, 0.85, 0.5]], np.float32)


@dataclass(frozen=True)
class _Car:
    lane: float
    """Metres right of the road's middle."""
    start: float
    """Metres ahead at time 0."""
    speed: float
    """Metres a second, against the camera's own: below 0 it comes nearer."""
    shade: int
    tint: int


class Scene:
    """A drive. `draw(t)` gives the picture at t seconds; the same seed and size give the same pictures."""

    def __init__(self, seed: tuple[int, ...], size: tuple[int, int]) -> None:
        rng = np.random.default_rng(seed)
        self.height, self.width = size
        self.speed = float(rng.uniform(10, 16))
        self.horizon = int(self.height * rng.uniform(0.38, 0.46))
        self.focal = 0.9 * self.width
        rows = np.arange(self.horizon, self.height)
        self.depth = np.minimum(_CAMERA_HEIGHT * self.focal / (rows - self.horizon + 0.5), 4 * _FAR)
        across = (np.arange(self.width) - self.width / 2 + 0.5)[None, :] * (self.depth / self.focal)[:, None]
        road = np.abs(across) < 1.5 * _LANE + 0.4
        # One texture, walked along z by rows and along x by columns; far away it would only flicker, so its contrast fades.
        self.texture = rng.integers(-400, 401, (1024, 512), dtype=np.int16)
        self.columns = (np.floor(across * 3.0).astype(np.int64)) % self.texture.shape[1]
        fade = np.clip(14.0 / self.depth, 0, 1)
        self.contrast = np.where(road, fade[:, None] * 0.45, fade[:, None] * 1.1).astype(np.float32)
        self.ground = np.where(road, 1150.0, 1600.0).astype(np.float32)
        self.ground_kind = np.where(road, _ROAD, _GRASS).astype(np.uint8)
        near = self.depth[:, None] < 80.0
        self.solid = (np.abs(np.abs(across) - 1.5 * _LANE) < 0.09) & near
        self.dashed = (np.abs(np.abs(across) - 0.5 * _LANE) < 0.09) & near
        sky = np.linspace(2900, 3700, max(self.horizon, 1))[:, None] + rng.normal(0, 60, (max(self.horizon, 1), 1)) * 0.2
        self.sky = np.broadcast_to(sky, (max(self.horizon, 1), self.width)).astype(np.float32).copy()
        self._hills(rng)
        self.cars = [
            _Car(
                lane, float(rng.uniform(9, 50)), float(rng.uniform(-9, 4)), int(rng.integers(600, 3000)), int(rng.integers(len(_CAR_TINTS)))
            )
            for lane in (-_LANE, 0.0, _LANE)
            for _ in range(2)
        ]
        self.post_shades = rng.integers(300, 1100, 64)

    def _hills(self, rng: np.random.Generator) -> None:
        """Blocks along the horizon: they stand still, as things far away do."""
        at = 0
        while at < self.width:
            wide, high = int(rng.integers(8, 60)), int(rng.integers(1, max(2, self.height // 10)))
            self.sky[max(0, self.horizon - high) : self.horizon, at : at + wide] = float(rng.integers(900, 2200))
            at += wide

    def draw(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """(luminance uint16 [H, W] below 4096, tint index uint8 [H, W]) at t seconds."""
        travelled = self.speed * t
        luminance = np.empty((self.height, self.width), np.float32)
        kind = np.empty((self.height, self.width), np.uint8)
        luminance[: self.horizon] = self.sky[: self.horizon]
        kind[: self.horizon] = _SKY
        along = np.floor((self.depth + travelled) * 3.0).astype(np.int64) % self.texture.shape[0]
        below = luminance[self.horizon :]
        np.multiply(self.texture[along[:, None], self.columns], self.contrast, out=below)
        below += self.ground
        on = ((self.depth + travelled) % (2 * _DASH) < _DASH)[:, None]
        marks = self.solid | (self.dashed & on)
        below[marks] = 3600
        kind[self.horizon :] = self.ground_kind
        kind[self.horizon :][marks] = _MARK
        self._draw_posts(luminance, kind, travelled)
        self._draw_cars(luminance, kind, t)
        return np.clip(luminance, 1, _LEVELS - 1).astype(np.uint16), kind

    def rgb(self, t: float) -> np.ndarray:
        """uint8 [H, W, 3] at t seconds."""
        luminance, kind = self.draw(t)
        tints = np.concatenate([_TINTS, _CAR_TINTS])
        return np.clip(luminance[:, :, None] * np.float32(255 / _LEVELS) * tints[kind], 0, 255).astype(np.uint8)

    def _box(self, across: float, depth: float, width: float, low: float, high: float) -> tuple[slice, slice]:
        """Pixels of an upright box: metres right of the middle, ahead, wide, and above the ground from low to high."""
        scale = self.focal / depth
        left = self.width / 2 + (across - width / 2) * scale
        top = self.horizon + (_CAMERA_HEIGHT - high) * scale
        bottom = self.horizon + (_CAMERA_HEIGHT - low) * scale
        rows = slice(max(0, round(top)), max(0, min(self.height, round(bottom))))
        return rows, slice(max(0, round(left)), max(0, min(self.width, round(left + width * scale))))

    def _draw_posts(self, luminance: np.ndarray, kind: np.ndarray, travelled: float) -> None:
        first = int(travelled // _POST_GAP) + 1
        for number in range(first + int(_FAR / _POST_GAP), first - 1, -1):
            depth = number * _POST_GAP - travelled
            if depth < 2.5:
                continue
            shade = float(self.post_shades[number % len(self.post_shades)])
            for side in (-8.0, 8.0):
                for width, low, high, value in ((0.25, 0.0, 3.2, shade), (1.8, 2.6, 4.6, shade + 250)):
                    box = self._box(side, depth, width, low, high)
                    luminance[box] = value
                    kind[box] = _POST

    def _draw_cars(self, luminance: np.ndarray, kind: np.ndarray, t: float) -> None:
        placed = sorted(((car.start + car.speed * t - 4.0) % 70.0 + 4.0, i) for i, car in enumerate(self.cars))
        for depth, index in reversed(placed):
            car = self.cars[index]
            for width, low, high, value, part in (
                (1.8, 0.0, 0.25, 150, _ROAD),
                (1.8, 0.25, 1.0, car.shade, len(_TINTS) + car.tint),
                (1.5, 1.0, 1.5, max(100, car.shade - 350), len(_TINTS) + car.tint),
                (1.3, 1.05, 1.4, 420, _GLASS),
            ):
                box = self._box(car.lane, depth, width, low, high)
                luminance[box] = value
                kind[box] = part
            for side in (-0.75, 0.75):
                box = self._box(car.lane + side, depth, 0.25, 0.6, 0.8)
                luminance[box] = 3300
                kind[box] = _LAMP


class EventCamera:
    """Contrast threshold on log intensity, with times interpolated between pictures, as ESIM does.

    A pixel remembers the level of its last event. Whenever its log intensity has moved by `threshold` from there, an event comes, at the
    moment that a straight line between the two pictures crosses the level.
    """

    def __init__(self, first: np.ndarray, rng: np.random.Generator, *, threshold: float = 0.28, noise_hz: float = 0.05) -> None:
        table = np.rint(np.log(np.maximum(np.arange(_LEVELS), 16)) * _LOG_UNIT).astype(np.int32)
        self.table = table
        self.threshold = round(threshold * _LOG_UNIT)
        self.rng = rng
        self.noise_hz = noise_hz
        self.width = first.shape[1]
        self.last = table[first].ravel()
        # Every pixel begins somewhere between two events, or the first pictures would all fire at once.
        self.level = self.last + rng.integers(-self.threshold // 2, self.threshold // 2 + 1, self.last.size, dtype=np.int32)

    def step(self, picture: np.ndarray, micros: int) -> dict[str, np.ndarray]:
        """Events of the `micros` microseconds (below 65536) up to this picture: t uint16 from the step's begin, sorted; x, y, p."""
        now = self.table[picture].ravel()
        moved = now - self.level
        fired = np.flatnonzero(np.abs(moved) >= self.threshold)
        moved_fired, before = moved[fired], self.last[fired]
        change = now[fired] - before
        sign = np.sign(moved_fired)
        crossings = np.abs(moved_fired) // self.threshold
        pixels, times, signs = [], [], []
        for k in range(1, int(crossings.max(initial=0)) + 1):
            some = np.flatnonzero(crossings >= k)
            way = self.level[fired[some]] + sign[some] * k * self.threshold - before[some]
            # Crossed before this step (noise in the first level) counts for its begin.
            share = np.where(change[some] != 0, way / np.where(change[some] != 0, change[some], 1), 0.0)
            pixels.append(fired[some])
            times.append(np.clip(np.floor(share * micros), 0, micros - 1).astype(np.uint16))
            signs.append((sign[some] > 0).astype(np.uint8))
        self.level[fired] += sign * crossings * self.threshold
        self.last = now
        stray = int(self.rng.poisson(self.noise_hz * now.size * micros / 1e6))
        pixels.append(self.rng.integers(0, now.size, stray))
        times.append(self.rng.integers(0, micros, stray).astype(np.uint16))
        signs.append(self.rng.integers(0, 2, stray).astype(np.uint8))
        t, pixel, p = np.concatenate(times), np.concatenate(pixels), np.concatenate(signs)
        order = np.argsort(t, kind="stable")
        pixel = pixel[order]
        return {"t": t[order], "x": (pixel % self.width).astype(np.uint16), "y": (pixel // self.width).astype(np.uint16), "p": p[order]}
