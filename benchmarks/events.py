"""Events to pictures, voxel grids and histograms: ns an event against a plain loop, numpy, tonic and evlib; equal values checked first.

    /tmp/peers/bin/python benchmarks/events.py            # with the peers of requirements-peers.txt; about a minute
    .venv/bin/python benchmarks/events.py --quick         # without them: they are left out by name

CPU time, all ways interleaved in one run, medians; ratios are medians over rounds. tonic is given int p, as it needs (it changes p in
place, so it gets a fresh column each time: 1 byte an event); evlib is given its own polars frame.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from common import interleaved, machine, ratio, real_events, synthetic_events, table
from stagebench.render import event_frames, event_histogram, prepare, voxel_grid
from stagebench.sources.events import Events

SENSOR, PARTS, BINS = (480, 640), 5, 5
BLUE, RED = np.array([0, 0, 255], np.uint8), np.array([255, 0, 0], np.uint8)


def plain_loop(events: Events, policy: str) -> list[np.ndarray]:
    """The published renderers' rules, an event at a time."""
    each = len(events) // PARTS
    images = []
    for part in range(PARTS):
        chosen = slice(part * each, (part + 1) * each if part < PARTS - 1 else len(events))
        image = np.full((*SENSOR, 3), 255, np.uint8)
        for x, y, p in zip(events.x[chosen], events.y[chosen], events.p[chosen], strict=True):
            if p == 0:
                image[y, x] = BLUE
            elif policy == "original" or not (image[y, x] == BLUE).all():
                image[y, x] = RED
        images.append(image)
    return images


def by_numpy(events: Events, policy: str) -> list[np.ndarray]:
    each = len(events) // PARTS
    colours = np.stack([BLUE, RED])
    images = []
    for part in range(PARTS):
        chosen = slice(part * each, (part + 1) * each if part < PARTS - 1 else len(events))
        x, y, p = events.x[chosen], events.y[chosen], events.p[chosen]
        image = np.full((*SENSOR, 3), 255, np.uint8)
        if policy == "original":
            image[y, x] = colours[p]
        else:
            image[y[p == 1], x[p == 1]] = RED
            image[y[p == 0], x[p == 0]] = BLUE
        images.append(image)
    return images


def tonic_ways(events: Events) -> dict[str, Callable[[], np.ndarray]]:
    import tonic.functional as tonic

    height, width = SENSOR
    given = np.empty(len(events), [("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.int8)])
    given["x"], given["y"], given["t"], given["p"] = events.x, events.y, events.t, events.p
    kept = given["p"].copy()

    def voxel() -> np.ndarray:
        given["p"] = kept
        return tonic.to_voxel_grid_numpy(given, (width, height, 2), BINS)[:, 0]

    def histogram() -> np.ndarray:
        given["p"] = kept
        return tonic.to_frame_numpy(given, (width, height, 2), n_event_bins=1)[0]

    return {"voxel": voxel, "histogram": histogram}


def evlib_ways(events: Events) -> dict[str, Callable[[], Any]]:
    import evlib.representations as evlib
    import polars as pl

    height, width = SENSOR
    frame = pl.DataFrame(
        {
            "x": events.x.astype(np.int16),
            "y": events.y.astype(np.int16),
            "t": pl.Series(events.t - events.t0).cast(pl.Duration("us")),
            "polarity": events.p.astype(np.int8),
        }
    )

    def voxel() -> Any:
        made = evlib.create_voxel_grid(frame.lazy(), height=height, width=width, n_time_bins=BINS)
        return made.collect() if hasattr(made, "collect") else made

    return {"voxel": voxel}


def frames_table(clips: dict[str, Events], seconds: float, loop: bool) -> None:
    rows = []
    for name, events in clips.items():
        for policy in ("original", "negative_on_top"):
            how: Any = {"parts": PARTS, "policy": policy, "sensor": SENSOR}
            want = plain_loop(events, policy) if loop and len(events) < 400_000 else by_numpy(events, policy)
            got = event_frames(events, **how)
            same = all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
            ways = {"ours": lambda e=events, h=how: event_frames(e, **h), "numpy": lambda e=events, p=policy: by_numpy(e, p)}
            times = interleaved(ways, seconds)
            ns = {way: np.median(values) / len(events) * 1e9 for way, values in times.items()}
            slow = "-"
            if loop and len(events) < 400_000:
                once = interleaved({"loop": lambda e=events, p=policy: plain_loop(e, p)}, 0, least=1)["loop"][0]
                slow = f"{once / len(events) * 1e9:.0f}"
            rows.append(
                (
                    name,
                    f"{len(events):,}",
                    policy,
                    f"{ns['ours']:.1f}",
                    f"{ns['numpy']:.1f}",
                    slow,
                    f"{ratio(times, 'numpy', 'ours'):.1f}",
                    same,
                )
            )
    table("clip | events | policy | ours ns/event | numpy ns/event | plain loop ns/event | numpy / ours | pixels equal", rows)


def grids_table(clips: dict[str, Events], seconds: float, missing: dict[str, str]) -> None:
    rows = []
    for name, events in clips.items():
        ours = {"voxel": lambda e=events: voxel_grid(e, BINS, SENSOR), "histogram": lambda e=events: event_histogram(e, SENSOR)}
        for peer, make in {"tonic": tonic_ways, "evlib": evlib_ways}.items():
            try:
                theirs = make(events)
                for way in theirs.values():
                    way()
            except Exception as error:  # a peer may fail in any way
                missing[peer] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            for what, way in theirs.items():
                value = way()
                equal = "other layout"
                if isinstance(value, np.ndarray):
                    equal = f"largest difference {np.abs(value - ours[what]()).max():.1g}"
                times = interleaved({"ours": ours[what], peer: way}, seconds)
                ns = {key: np.median(values) / len(events) * 1e9 for key, values in times.items()}
                quotient = ratio(times, peer, "ours")
                rows.append((name, f"{len(events):,}", what, peer, f"{ns['ours']:.1f}", f"{ns[peer]:.1f}", f"{quotient:.1f}", equal))
    table("clip | events | what | peer | ours ns/event | peer ns/event | peer / ours | values", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="measuring time of a comparison")
    parser.add_argument("--quick", action="store_true", help="a few seconds in all")
    arguments = parser.parse_args()
    seconds = 0.5 if arguments.quick else arguments.seconds
    print(machine("numpy", "numba", "tonic", "evlib"))
    print(f"compiling the kernels took {prepare():.0f} ms, outside of every measurement")
    clips = real_events() | {"synthetic 2M": synthetic_events(2_000_000)}
    if arguments.quick:
        clips = dict(list(clips.items())[-2:])
    missing: dict[str, str] = {}
    frames_table(clips, seconds, loop=not arguments.quick)
    grids_table(clips, seconds, missing)
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    main()
