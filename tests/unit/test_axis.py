"""Comparison along an axis: frames, and datasets of other clip lengths."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from factories import FakeJob, FakePlan, FakeVariant, config, make_study, write_rows
from stagebench.config import load_config
from stagebench.demo import write_demo
from stagebench.merge import merge
from stagebench.merge.axis import seconds_of
from stagebench.standalone import run_study
from stagebench.stats import unpaired_ratio

Rows = list[dict[str, Any]]


def axis(results: Path, **wanted: Any) -> Rows:
    rows = pl.read_parquet(results / "tables/axis.parquet").to_dicts()
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_frames_are_paired_by_sample(tmp_path: Path) -> None:
    """Encode costs 1 ms a frame and nothing else changes: the ratio, and the slope of total and encode."""

    def edit(row: dict[str, Any]) -> dict[str, Any]:
        extra = float(row["frames"])
        return {**row, "encode_ms": extra, "total_ms": row["total_ms"] - row["encode_ms"] + extra}

    study = config(variants={"frames": [1, 8, 16]})
    variants = {f"f{n}": {"frames": n} for n in (1, 8, 16)}
    merge(make_study(tmp_path, plan_config=study, variants=variants, edit=edit, samples=24), tmp_path)
    rows = axis(tmp_path, model="eventgpt", length="16", metric="encode")
    assert [(r["axis"], r["value"], r["x"], r["against"]) for r in rows] == [
        ("frames", "1", 1, "1"),
        ("frames", "8", 8, "1"),
        ("frames", "16", 16, "1"),
    ]
    assert [r["ratio"] for r in rows] == [None, 8, 16] and [r["how"] for r in rows] == [None, *["paired by sample"] * 2]
    assert all(r["pairs"] == r["n"] == 24 and r["verdict"] == "SLOWER" for r in rows[1:])
    assert all(r["slope"] == 1 and r["intercept"] == 0 for r in rows)
    total = axis(tmp_path, model="eventgpt", length="16", metric="total")[0]
    assert total["slope"] == pytest.approx(1, rel=0.1)
    assert {r["axis"] for r in axis(tmp_path)} == {"frames"}


def test_more_samples_in_more_time_are_not_slower(tmp_path: Path) -> None:
    """Batch 8 in twice the time of batch 1: the batch takes longer, a sample a quarter."""

    def edit(row: dict[str, Any]) -> dict[str, Any]:
        place = row["order"] // (2 * 3 * row["batch"])  # two lengths, three repeats
        return {**row, "total_ms": 100.0 * (2 if row["batch"] == 8 else 1) * (1 + 0.001 * (place % 3)), "order": place}

    study = config(variants={"batch": [1, 8]})
    variants = {f"b{n}": {"batch": n} for n in (1, 8)}
    merge(make_study(tmp_path, plan_config=study, variants=variants, edit=edit, samples=48, blocks=1), tmp_path)
    words = {r["metric"]: r for r in axis(tmp_path, model="eventgpt", length="16", value="8")}
    assert words["total"]["verdict"] == "SLOWER" and words["total"]["ratio"] == pytest.approx(2, rel=0.01)
    assert words["sample"]["verdict"] == "FASTER" and words["sample"]["ratio"] == pytest.approx(0.25, rel=0.01)
    assert "sample is total / batch" in (tmp_path / "tables/axis.md").read_text()


def test_tokens_between_datasets_are_more_or_fewer(tmp_path: Path) -> None:
    """A dataset whose answers are longer is not a slower one: the word is that of the comparison within a dataset."""
    plan = durations(tmp_path, {"set_200ms": 0.2, "set_1s": 1.0})
    for job in plan.jobs:
        path = tmp_path / job.path
        rows = pq.read_table(path, partitioning=None).to_pylist()
        more = 3 if job.dataset == "set_1s" else 1
        write_rows(path, [{**row, "new_tokens": row["new_tokens"] * more} for row in rows])
    merge(plan, tmp_path)
    row = axis(tmp_path, length="natural", metric="new_tokens")[1]
    assert (row["how"], row["verdict"]) == ("paired by sequence", "MORE")


def durations(folder: Path, datasets: dict[str, float], sequences: dict[str, str] | None = None) -> FakePlan:
    """One study over several datasets; load takes 2 ms and 10 ms a second of clip, more on some sequences."""
    names = {name: {"root": "nowhere", "sensor": [480, 640]} for name in datasets}
    whole = config(
        datasets=names, models={"eventgpt": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"}}, compare={}
    )
    jobs: list[FakeJob] = []
    for name, seconds in datasets.items():

        def edit(row: dict[str, Any], name: str = name, seconds: float = seconds) -> dict[str, Any]:
            # neighbouring clips of one drive resemble each other: each sequence has a speed of its own
            own = 1 + 0.3 * int(row["sequence"][-2:])
            load = own * (2 + 10 * seconds)
            prefix = (sequences or {}).get(name, "seq")
            moved = {column: row[column].replace("seq", prefix) for column in ("sample", "clip", "sequence")}
            return {**row, **moved, "dataset": name, "load_ms": load, "total_ms": row["total_ms"] - row["load_ms"] + load}

        part = make_study(folder / "parts" / name, plan_config=whole, models={"eventgpt": {}}, samples=24, sequences=6, blocks=1, edit=edit)
        for job in part.jobs:
            samples = tuple(s.replace("seq", (sequences or {}).get(name, "seq")) for s in job.block.samples)
            moved = FakeJob(name, job.model, FakeVariant(job.variant.name), type(job.block)(job.block.name, samples))
            target = folder / moved.path
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / "parts" / name / job.path).rename(target)
            jobs.append(moved)
    (folder / "verify").mkdir()
    (folder / "parts" / next(iter(datasets)) / "verify/eventgpt.json").rename(folder / "verify/eventgpt.json")
    return FakePlan(whole, jobs)


def test_durations_are_paired_by_sequence_and_have_a_slope(tmp_path: Path) -> None:
    """10 ms of load a second of clip: clips of 200 ms and 5 s are other clips, their recordings the same. The config's order stands."""
    merge(durations(tmp_path, {"set_200ms": 0.2, "set_1s": 1.0, "set_5s": 5.0}), tmp_path)
    rows = axis(tmp_path, length="16", metric="load")
    assert [(r["axis"], r["value"], r["x"], r["unit"]) for r in rows] == [
        ("dataset", "set_200ms", 0.2, "s"),
        ("dataset", "set_1s", 1, "s"),
        ("dataset", "set_5s", 5, "s"),
    ]
    assert [r["ratio"] for r in rows] == [None, 3, 13] and all(r["how"] == "paired by sequence" and r["pairs"] == 6 for r in rows[1:])
    assert all(r["low"] == r["high"] == r["ratio"] for r in rows[1:]), "sequences of unlike speed do not widen a paired ratio"
    assert rows[0]["slope"] == pytest.approx(10 * np.mean([1 + 0.3 * s for s in range(6)]), rel=1e-3)
    assert rows[0]["slope_low"] < rows[0]["slope"] < rows[0]["slope_high"] and rows[0]["n"] == 24
    same = axis(tmp_path, length="16", metric="prefill")
    assert {r["verdict"] for r in same[1:]} <= {"SAME", "AMBIGUOUS"}


def test_datasets_without_common_sequences_are_unpaired(tmp_path: Path) -> None:
    """The same figures under other sequence names: the ratio stays, its interval knows that drives differ, and the row says so."""
    merge(durations(tmp_path, {"town": 0.2, "night": 1.0}, {"town": "seq", "night": "dark"}), tmp_path)
    first, second = axis(tmp_path, length="16", metric="load")
    assert second["how"] == "unpaired" and second["pairs"] == 0 and second["ratio"] == 3
    assert second["low"] < 2.5 < 3 < second["high"]
    assert first["x"] is None and first["slope"] is None, "a dataset whose name ends in no duration has no place in seconds"


def test_an_unpaired_interval_covers() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(500):
        sides = []
        for groups in (7, 5):
            sizes = rng.integers(3, 9, groups)
            values = np.concatenate([rng.normal(0, 0.1) + rng.normal(0, 0.1, n) for n in sizes])
            sides += [np.exp(values), [f"s{g}" for g, n in enumerate(sizes) for _ in range(n)]]
        found = unpaired_ratio(*sides)
        assert found.low is not None and found.high is not None
        covered += found.low <= 1 <= found.high
    assert 0.92 <= covered / 500 <= 0.98


def test_unpaired_without_evidence() -> None:
    assert unpaired_ratio(np.array([2.0]), ["a"], np.array([1.0, 1.0]), ["b", "c"]).verdict == "AMBIGUOUS"
    with pytest.raises(ValueError, match="times above 0"):
        unpaired_ratio(np.array([0.0]), ["a"], np.array([1.0]), ["b"])


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("dsec_200ms", 0.2), ("dsec_1s", 1), ("DSEC-2.5s", 2.5), ("20s", 20), ("cars", None), ("dsec_1s_night", None), ("class10s2", None)],
)
def test_seconds_of_a_name(name: str, seconds: float | None) -> None:
    assert seconds_of(name) == seconds


def test_durations_of_the_demo(tmp_path: Path) -> None:
    """A real study: the demo at two clip lengths, from MP4 to the table and the page."""
    for name, seconds in (("demo_200ms", 0.2), ("demo_1s", 1.0)):
        write_demo(tmp_path / name, clips=4, seconds=seconds, size=(64, 96))
    datasets = {name: {"root": str(tmp_path / name), "sensor": [64, 96]} for name in ("demo_200ms", "demo_1s")}
    study = load_config(
        {
            "study": "durations",
            "datasets": datasets,
            "frames": {"count": 4, "source": "mp4"},
            "models": {"llava": {"adapter": "hf", "input": "frames", "frames_as": "grid", "weights": "dummy:0", "preset": "tiny"}},
            "timing": {"lengths": [3], "warmup": 1, "repeats": 2, "plain_share": 0},
        }
    )
    run_study(study, tmp_path / "results", tmp_path / "cache", device="cpu")
    rows = axis(tmp_path / "results", metric="load", length="3")
    assert [(r["value"], r["x"]) for r in rows] == [("demo_200ms", 0.2), ("demo_1s", 1)]
    assert rows[1]["how"] == "paired by sequence" and rows[1]["pairs"] == 2 and rows[1]["ratio"] > 1, "a longer clip decodes for longer"
    assert rows[0]["slope"] > 0 and rows[0]["median"] < rows[1]["median"]
    assert "Along an axis" in (tmp_path / "results/report.html").read_text()
    drawn = (tmp_path / "results/figures/axis.svg").read_text()
    assert "demo_200ms" in drawn and "load (ms)" in drawn
