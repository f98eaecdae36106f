"""The renderer against a plain loop over events, on real clips and on random ones, with numba and without."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagebench import render
from stagebench.errors import ConfigError, CorruptClipError, ShortClipError
from stagebench.sources.events import Events, read_events

WHITE, BLUE, RED = (255, 255, 255), (0, 0, 255), (255, 0, 0)
SENSOR = (480, 640)


@pytest.fixture(params=["numba", "numpy"])
def backend(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
        assert render._kernel() is not None
    else:
        monkeypatch.setattr(render, "_kernel", lambda: None)
    return request.param


def make(x, y, p, t=None):
    t = np.arange(len(x)) if t is None else np.asarray(t)
    return Events(np.asarray(x, np.uint16), np.asarray(y, np.uint16), np.asarray(p, np.uint8), t.astype(np.int64))


def cut(events, parts, split):
    """The rule in words: equal counts with the rest in the last part; or equal shares of the time from first to last event."""
    n = len(events)
    if split == "count":
        each = n // parts
        return [list(range(k * each, n if k == parts - 1 else (k + 1) * each)) for k in range(parts)]
    first, span = int(events.t[0]), int(events.t[-1]) - int(events.t[0]) + 1
    groups = [[] for _ in range(parts)]
    for i, t in enumerate(events.t.tolist()):
        k = max(k for k in range(parts) if t >= first + k * span // parts)
        groups[k].append(i)
    return groups


def loop(events, members, policy, shape):
    """One event after the other."""
    picture = {}
    for i in members:
        place, negative = (int(events.y[i]), int(events.x[i])), events.p[i] == 0
        if policy == "original" or negative or place not in picture:
            picture[place] = BLUE if negative else RED
    image = np.full((*shape, 3), 255, np.uint8)
    for (row, column), colour in picture.items():
        image[row, column] = colour
    return image


def extent(events, members):
    return max(int(events.y[i]) for i in members) + 1, max(int(events.x[i]) for i in members) + 1


@pytest.mark.parametrize("clip", ["eventgpt/000000", "interlaken_00_d/000069", "interlaken_00_d/000074", "interlaken_00_d/000079"])
def test_real_clips_equal_the_loop(real_data, clip, monkeypatch):
    events = read_events(real_data / "real" / "event_npy" / f"{clip}.npy")
    assert len(events) > 100_000
    lists = make(events.x, events.y, events.p, events.t)
    columns = [lists.x.tolist(), lists.y.tolist(), lists.p.tolist()]
    kernel = render._kernel()
    for split, policy in itertools.product(("count", "time"), ("original", "negative_on_top")):
        cuts = cut_fast(events, 5, split)
        canvases = [loop_fast(columns, members, policy, SENSOR) for members in cuts]
        sizes = {
            "sensor": [SENSOR] * 5,
            "clip": [(int(events.y.max()) + 1, int(events.x.max()) + 1)] * 5,
            "part": [(int(events.y[m].max()) + 1, int(events.x[m].max()) + 1) for m in cuts],
        }
        for (size, shapes), compiled in itertools.product(sizes.items(), (True, False)):
            monkeypatch.setattr(render, "_kernel", lambda on=compiled: kernel if on else None)
            settings_ = {"parts": 5, "split": split, "policy": policy, "size": size, "sensor": SENSOR if size == "sensor" else None}
            frames = render.event_frames(events, **settings_)
            codes = render.event_codes(events, **settings_)
            for frame, code, canvas, shape in zip(frames, codes, canvases, shapes, strict=True):
                assert frame.shape == (*shape, 3) and frame.dtype == np.uint8 and frame.flags.c_contiguous
                assert np.array_equal(frame, canvas[: shape[0], : shape[1]]), (split, policy, size, compiled)
                assert np.array_equal(render.codes_to_rgb(code), frame) and code.max() <= 2


def cut_fast(events, parts, split):
    """As `cut`, in slices; the small cases below hold the two against each other."""
    groups = cut(events, parts, split) if len(events) < 1000 or split == "count" else None
    if groups is None:
        first, span = int(events.t[0]), int(events.t[-1]) - int(events.t[0]) + 1
        part = np.zeros(len(events), int)
        for k in range(1, parts):
            part += events.t >= first + k * span // parts
        edges = [0, *np.cumsum([int((part == k).sum()) for k in range(parts)]).tolist()]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]
    return [slice(g[0], g[-1] + 1) for g in groups]


def loop_fast(columns, members, policy, shape):
    """`loop` over Python lists, for a hundred thousand events."""
    x, y, p = (column[members] for column in columns)
    canvas = [[WHITE] * shape[1] for _ in range(shape[0])]
    for x_, y_, p_ in zip(x, y, p, strict=True):
        if policy == "original" or p_ == 0 or canvas[y_][x_] == WHITE:
            canvas[y_][x_] = BLUE if p_ == 0 else RED
    return np.array(canvas, np.uint8)


def test_parity_fixture(real_data, backend):
    from safetensors.numpy import load_file

    folder = real_data / "eventgpt_parity"
    expected = load_file(folder / "expected.safetensors")
    frames = render.event_frames(read_events(folder / "events.npy"), parts=5, size="part")
    for i, frame in enumerate(frames):
        assert np.array_equal(frame, expected[f"event_image_{i}"])
    assert [list(frame.shape) for frame in frames] == json.loads((folder / "expected.json").read_text())["image_shapes"]


events_ = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 1), st.integers(0, 9)), min_size=1, max_size=40).map(
    lambda rows: make(*[[row[i] for row in rows] for i in range(3)], np.sort([row[3] for row in rows]) + 51_835_949_776)
)


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=150, deadline=None)
@given(
    events=events_,
    parts=st.integers(1, 6),
    split=st.sampled_from(["count", "time"]),
    policy=st.sampled_from(["original", "negative_on_top"]),
)
def test_random_clips_equal_the_loop(compiled, events, parts, split, policy):
    kernel = render._kernel
    if not compiled:
        render._kernel = lambda: None
    try:
        if split == "count" and len(events) < parts:
            with pytest.raises(ShortClipError, match=f"{len(events)} events, {parts} parts"):
                render.event_frames(events, parts=parts, split=split, policy=policy, sensor=(5, 6))
            return
        groups = cut(events, parts, split)
        assert list(itertools.chain.from_iterable(groups)) == list(range(len(events)))
        frames = render.event_frames(events, parts=parts, split=split, policy=policy, sensor=(5, 6))
        assert len(frames) == parts
        for frame, members in zip(frames, groups, strict=True):
            assert np.array_equal(frame, loop(events, members, policy, (5, 6)))
        if all(groups):
            for frame, members in zip(
                render.event_frames(events, parts=parts, split=split, policy=policy, size="part"), groups, strict=True
            ):
                assert np.array_equal(frame, loop(events, members, policy, extent(events, members)))
    finally:
        render._kernel = kernel


def voxel_loop(events, bins, shape):
    """Zhu et al.'s event volume, as tonic defines it, in float64; and how far a float32 sum of as many events may be off it."""
    grid, adds = np.zeros((bins, *shape)), np.zeros((bins, *shape))
    first, span = float(events.t[0]), float(events.t[-1] - events.t[0]) or 1.0
    for x, y, p, t in zip(events.x, events.y, events.p, events.t, strict=True):
        at = bins * (float(t) - first) / span
        bin_ = int(at)
        for place, share in ((bin_, 1.0 - (at - bin_)), (bin_ + 1, at - bin_)):
            if place < bins:
                grid[place, y, x] += share if p else -share
                adds[place, y, x] += 1
    return grid, adds * (adds + 5) * 2.0**-25


@settings(max_examples=100, deadline=None)
@given(events=events_, bins=st.integers(1, 6))
def test_voxel_grid_equals_the_definition(events, bins):
    expected, bound = voxel_loop(events, bins, (5, 6))
    grid = render.voxel_grid(events, bins, (5, 6))
    # where a time falls on a bin's edge by less than float64 tells apart, its share is 0 or 1 to 1e-12 on either side
    assert (np.abs(grid - expected) <= bound + 1e-12).all()
    kernel, render._kernel = render._kernel, lambda: None
    try:
        assert np.array_equal(render.voxel_grid(events, bins, (5, 6)), grid)
    finally:
        render._kernel = kernel


def test_voxel_grid_and_histogram_of_a_real_clip(real_data, backend):
    whole = read_events(real_data / "real" / "event_npy" / "eventgpt" / "000000.npy")
    events = make(whole.x[:20_000], whole.y[:20_000], whole.p[:20_000], whole.t[:20_000])
    grid = render.voxel_grid(events, 5, SENSOR)
    expected, bound = voxel_loop(events, 5, SENSOR)
    assert grid.dtype == np.float32
    assert (np.abs(grid - expected) <= bound + 1e-12).all()
    assert np.abs(grid - expected).max() < 2e-6
    counts = render.event_histogram(events, SENSOR)
    expected = np.zeros((2, *SENSOR), np.int32)
    np.add.at(expected, (events.p, events.y, events.x), 1)
    assert counts.dtype == np.int32 and np.array_equal(counts, expected)


def test_voxel_grid_of_one_moment(backend):
    grid = render.voxel_grid(make([1, 1], [0, 0], [1, 1], [7, 7]), 3, (2, 2))
    assert grid[0, 0, 1] == 2 and grid.sum() == 2


def test_voxel_frames():
    grid = np.zeros((2, 1, 3), np.float32)
    grid[0, 0] = [-4, 0, 2]
    frames = render.voxel_to_frames(grid)
    assert [f.shape for f in frames] == [(1, 3, 3)] * 2 and frames[0].dtype == np.uint8
    assert frames[0][0, :, 0].tolist() == [1, 128, 192] and frames[1].min() == frames[1].max() == 128
    assert render.voxel_to_frames(np.zeros((1, 2, 2), np.float32))[0].max() == 128


def test_what_cannot_be_drawn(backend):
    three = make([0, 1, 2], [0, 0, 0], [1, 0, 1], [0, 50, 1000])
    none = make([], [], [])
    for call in (
        lambda: render.event_frames(none, parts=5, sensor=(5, 5)),
        lambda: render.event_frames(none, parts=5, split="time", sensor=(5, 5)),
        lambda: render.voxel_grid(none, 5, (5, 5)),
    ):
        with pytest.raises(ShortClipError, match="no events"):
            call()
    with pytest.raises(ShortClipError, match="3 events, 5 parts"):
        render.event_frames(three, parts=5, sensor=(5, 5))
    for call in (
        lambda: render.event_frames(three, parts=1, sensor=(5, 2)),
        lambda: render.event_frames(three, parts=1, size="clip", sensor=(5, 2)),
        lambda: render.voxel_grid(three, 2, (5, 2)),
        lambda: render.event_histogram(three, (5, 2)),
    ):
        with pytest.raises(CorruptClipError, match="reach 1 rows and 3 columns, the sensor has 5 and 2"):
            call()
    with pytest.raises(ConfigError, match="needs the dataset's sensor"):
        render.event_frames(three, parts=1)
    with pytest.raises(ShortClipError, match="part 1 of 4 holds no event"):
        render.event_frames(three, parts=4, split="time", size="part")
    stray = make([0, 65_535], [0, 65_535], [1, 1])
    with pytest.raises(CorruptClipError, match="65536x65536 pixels"):
        render.event_frames(stray, parts=1, size="clip")
    for wrong in ({"policy": "best"}, {"split": "space"}, {"size": "huge"}, {"parts": 0}):
        with pytest.raises(ConfigError):
            render.event_frames(three, **{"parts": 1, "sensor": (5, 5), **wrong})


def test_empty_part_of_time_is_white(backend):
    frames = render.event_frames(make([0, 1], [0, 0], [1, 0], [0, 1000]), parts=4, split="time", sensor=(1, 2))
    assert [int(frame.min()) for frame in frames] == [0, 255, 255, 0]


def test_one_compiled_form_serves_every_array():
    """Columns that view a file are read-only and unaligned; numba must not compile for them inside a timed load."""
    pytest.importorskip("numba")
    render.prepare()
    raw = np.frombuffer(b"\x00" + np.array([3, 1], np.uint16).tobytes(), np.uint8)[1:].view(np.uint16)
    assert not raw.flags.aligned and not raw.flags.writeable
    render.event_frames(Events(raw, np.zeros(2, np.uint16), np.ones(2, np.uint8), np.zeros(2, np.int64)), parts=1, size="clip")
    for name in ("rgb_last", "rgb_negative"):
        assert len(render._kernel()(name).signatures) == 1
    assert render.prepare() < 5


def test_without_numba_pixels_are_numpys(monkeypatch):
    """An environment where numba refuses to be imported (numpy too new) still renders."""
    import sys

    render._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "stagebench._kernels", None)
    try:
        assert render._kernel() is None and render.prepare() == 0
        frame = render.event_frames(make([0, 0], [0, 0], [0, 1]), parts=1, size="clip")[0]
        assert tuple(frame[0, 0]) == RED
    finally:
        render._kernel.cache_clear()
