"""merge: what enters a mean, comparisons, determinism, the files that come out."""

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import polars as pl
import pytest
import yaml

from factories import config, make_study, rewrite, stage, study_metadata, table
from stagebench.errors import MergeError
from stagebench.merge import merge
from stagebench.rows import SCHEMA
from stagebench.session import build
from stagebench.stats import CPU_WAIT_MS, speculative_speedup


def test_whole_study(tmp_path: Path, repo: Path) -> None:
    plan = make_study(tmp_path, cuda=True)
    report = merge(plan, tmp_path)
    assert report.verdict.word == "VALID"
    merged = pl.read_parquet(tmp_path / "timings.parquet")
    assert len(merged) == 2 * 12 * 2 * 3
    assert set(SCHEMA.names) <= set(merged.columns)
    assert merged["accepted"].all()
    for name in ("stages", "comparison", "load", "optimisations", "failures"):
        for suffix in ("csv", "md", "tex", "parquet"):
            assert (tmp_path / "tables" / f"{name}.{suffix}").is_file()
    row = stage(tmp_path, "eventgpt", "16")
    assert row["encode_ms"] == pytest.approx(8, rel=0.02)
    assert row["decode_ms"] == pytest.approx(300, rel=0.02)
    assert row["ms_per_token"] == pytest.approx(20, rel=0.02)
    assert row["samples_per_hour"] == pytest.approx(3600 * row["samples_per_s"], rel=1e-3)
    assert row["samples_per_day"] == pytest.approx(86400 * row["samples_per_s"], rel=1e-3)
    assert row["bottleneck"] == "decode"
    assert row["llm_over_vision"] == pytest.approx((30 + 300) / 8, rel=0.02)
    assert row["fastest_ms"] <= row["typical_ms"] <= row["slowest_ms"]
    assert row["host_bound_share"] == pytest.approx(0.5, rel=0.02), "the device worked half of each stage's time"
    assert row["clock_gap_share"] == pytest.approx(0.5, rel=1e-3)
    assert row["peak_bytes"] == 6_000_000
    assert row["first_call_ms"] == 900
    assert row["first_call_encode_ms"] == 24
    assert row["warmup"] == 2
    assert row["measured_share"] == 0.95
    shares = [row[f"{s}_share"] for s in ("load", "preprocess", "h2d", "encode", "prefill", "decode", "residual")]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    jsonschema.validate(summary, yaml.safe_load((repo / "config/schemas/summary.schema.yaml").read_text()))
    assert summary["dummy_weights"] == ["eventgpt", "video_llava"]


def test_comparison_finds_what_was_put_in(tmp_path: Path) -> None:
    merge(make_study(tmp_path, samples=24, sequences=6), tmp_path)
    rows = {(r["length"], r["metric"]): r for r in table(tmp_path, "comparison")}
    assert {r["reference"] for r in rows.values()} == {"video_llava"}
    assert rows["16", "encode"]["ratio"] == pytest.approx(0.5, rel=0.02)
    assert rows["16", "encode"]["verdict"] == "FASTER"
    assert rows["16", "ms_per_token"]["ratio"] == pytest.approx(0.8, rel=0.02)
    assert rows["16", "new_tokens"]["verdict"] == "SAME"
    assert rows["natural", "new_tokens"]["verdict"] == "FEWER"
    assert rows["natural", "total"]["n"] == 24
    parts = [r for r in table(tmp_path, "decomposition") if r["length"] == "natural"]
    whole = next(r for r in parts if r["part"] == "total")
    assert sum(r["ms"] for r in parts if r["part"] != "total") == pytest.approx(whole["ms"], rel=1e-3)
    assert math.prod(r["factor"] for r in parts if r["part"] != "total") == pytest.approx(whole["factor"], rel=1e-3)
    assert whole["factor"] == rows["natural", "total"]["ratio"]


@pytest.mark.parametrize("waiting", ["eventgpt", "video_llava"])
def test_times_that_waited_for_a_cpu_have_no_clear_word(tmp_path: Path, waiting: str) -> None:
    """Whichever side was kept waiting. How many tokens were said has nothing to do with it."""

    def kept(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "cpu_wait_ms": row["total_ms"] * (0.2 if row["model"] == waiting else 0.01)}

    merge(make_study(tmp_path, samples=24, sequences=6, edit=kept), tmp_path)
    rows = {(r["model"], r["length"], r["metric"]): r for r in table(tmp_path, "comparison")}
    assert rows["eventgpt", "16", "encode"]["verdict"] == "AMBIGUOUS"
    assert rows["eventgpt", "16", "encode"]["cpu_wait_share"] == pytest.approx(0.2, rel=1e-3)
    assert rows["eventgpt", "16", "encode"]["high"] < 1, "the interval is printed as it came"
    assert rows["eventgpt", "natural", "new_tokens"]["verdict"] == "FEWER"
    stages = {r["model"]: r["cpu_wait_share"] for r in table(tmp_path, "stages")}
    assert stages[waiting] == pytest.approx(0.2, rel=1e-3)


def in_batches(size: int, sigma: float = 0.0) -> Any:
    """An `edit` that puts a job's samples into batches: one total a batch, repeat and model, and a noise that its samples share."""
    seen: dict[tuple[str, ...], list[str]] = {}

    def edit(row: dict[str, Any]) -> dict[str, Any]:
        there = seen.setdefault((row["model"], row["job"], row["variant"]), [])
        if row["sample"] not in there:
            there.append(row["sample"])
        order = there.index(row["sample"]) // size
        seed = [order, *f"{row['model']}{row['job']}{row['variant']}".encode()]
        noise = float(np.exp(np.random.default_rng(seed).normal(0, sigma)))
        return {**row, "batch": size, "order": order, "total_ms": 400.0 * noise, "encode_ms": 10 * noise}

    return edit


def test_a_batchs_noise_is_no_evidence_of_many_samples(tmp_path: Path) -> None:
    """Two equal models in batches of 4 samples: the words rest on 12 batches, not on 48 samples; on two batches there is no word."""
    equal = {"eventgpt": {}, "video_llava": {}}
    wide = {"models": equal, "variants": {"b-0": {"batch": 4}}, "samples": 48, "sequences": 8, "lengths": ("16",)}
    merge(make_study(tmp_path / "a", **wide, edit=in_batches(4, 0.03)), tmp_path / "a")
    row = next(r for r in table(tmp_path / "a", "comparison") if r["metric"] == "total")
    assert row["method"] == "studentised (sequences and batches)" and row["n"] == 48
    logs = [math.log(v) for v in sorted({r["total_ms"] for r in pl.read_parquet(tmp_path / "a/timings.parquet").to_dicts()})]
    assert len(logs) == 24, "12 batches a model"
    assert math.log(row["high"] / row["low"]) > 2 * 2.2 * math.sqrt(2) * 0.015 / math.sqrt(12), "no narrower than 12 batches allow"
    assert stage(tmp_path / "a", "eventgpt", "16")["total_high_ms"] > stage(tmp_path / "a", "eventgpt", "16")["total_low_ms"] * 1.01
    merge(make_study(tmp_path / "b", **{**wide, "blocks": 1}, edit=in_batches(24, 0.03)), tmp_path / "b")
    few = {r["metric"]: r for r in table(tmp_path / "b", "comparison")}
    assert (few["total"]["verdict"], few["total"]["low"], few["total"]["method"]) == ("AMBIGUOUS", None, "none")
    assert few["new_tokens"]["verdict"] == "SAME", "how much is said is each sample's own"


def test_a_time_slice_is_no_waiting(tmp_path: Path) -> None:
    """0.6 ms of 5 ms: less than a row is warned of, and no reason to hold a word back. 3.6 ms of 30 ms is."""

    def kept(total: float, wait: float) -> Any:
        def edit(row: dict[str, Any]) -> dict[str, Any]:
            slow = 2 if row["model"] == "video_llava" else 1
            return {**row, "total_ms": total * slow, "cpu_wait_ms": wait * slow}

        return edit

    words = {}
    for name, total, wait in (("short", 5.0, 0.6), ("long", 30.0, 3.6)):
        merge(make_study(tmp_path / name, lengths=("16",), edit=kept(total, wait)), tmp_path / name)
        row = next(r for r in table(tmp_path / name, "comparison") if r["metric"] == "total")
        words[name] = (row["verdict"], row["cpu_wait_share"])
    assert words["short"] == ("FASTER", 0)
    assert words["long"] == ("AMBIGUOUS", pytest.approx(0.12, rel=1e-3))
    assert build.CPU_WAIT_MS == CPU_WAIT_MS, "a row's warning and a comparison's word have one floor"


def test_energies_of_stages_and_of_samples_are_of_one_set(tmp_path: Path) -> None:
    """Decode is counted of the long third only: its joules stand beside the total of the same samples, and n says of how many."""

    def counted(row: dict[str, Any]) -> dict[str, Any]:
        if not row["sample"].startswith("seq_00"):
            return {**row, "energy_j": 10.0}
        return {**row, "energy_j": 100.0, "decode_energy_j": 90.0, "prefill_energy_j": 12.0}

    merge(make_study(tmp_path, edit=counted), tmp_path)
    row = stage(tmp_path, "eventgpt", "16")
    assert (row["energy_j"], row["decode_energy_j"], row["energy_n"]) == (100, 90, 3)
    parts = {r["metric"]: r for r in table(tmp_path, "distribution") if r["model"] == "eventgpt" and r["length"] == "16"}
    assert {m: (r["energy_j"], r["energy_n"]) for m, r in parts.items() if r["energy_j"] is not None} == {
        "total": (100, 3),
        "decode": (90, 3),
        "prefill": (12, 3),
    }


def test_shuffled_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name, shuffle in (("a", None), ("b", 1), ("c", 2)):
        merge(
            make_study(tmp_path / name, shuffle=shuffle, variants={"generate-00000000": {}, "nf4-11111111": {"quantization": "nf4"}}),
            tmp_path / name,
        )
    first = {
        p.relative_to(tmp_path / "a"): p.read_bytes()
        for p in sorted((tmp_path / "a").rglob("*"))
        if p.is_file() and "timings/" not in str(p)
    }
    assert len(first) > 30
    for other in ("b", "c"):
        for name, data in first.items():
            assert (tmp_path / other / name).read_bytes() == data, f"{name} depends on the order of the input"


def test_failed_samples_are_counted_named_and_left_out(tmp_path: Path) -> None:
    def fail_one(row: dict[str, Any]) -> dict[str, Any]:
        if row["sample"].startswith("seq_00/000000") and row["model"] == "eventgpt":
            return {**row, "status": "oom", "reason": "out of memory", "total_ms": None, "decode_ms": None}
        return row

    report = merge(make_study(tmp_path, edit=fail_one), tmp_path)
    row = stage(tmp_path, "eventgpt", "natural")
    assert (row["samples"], row["n"], row["failed"]) == (12, 11, 1)
    failure = table(tmp_path, "failures")[0]
    assert (failure["status"], failure["reason"], failure["runs"]) == ("oom", "out of memory", 3)
    assert all(r["n"] == 11 and r["failed"] == 1 for r in table(tmp_path, "comparison") if r["metric"] == "total")
    assert report.verdict.word == "INVALID"
    assert {f.code for f in report.verdict.reasons} == {"invalid_too_many_failed"}, "1 of 12 is above the 5 % allowed"


def test_discarded_runs_stay_out_and_are_counted(tmp_path: Path) -> None:
    def throttle(row: dict[str, Any]) -> dict[str, Any]:
        if row["model"] == "eventgpt" and row["sample"].startswith("seq_00") and row["length"] == "16":
            slow = {"total_ms": row["total_ms"] * 100, "codes": ["discarded_throttled"]}
            return {**row, **slow} if row["sample"].startswith("seq_00/000000") or row["repeat"] == 0 else row
        return row

    report = merge(make_study(tmp_path, edit=throttle), tmp_path)
    row = stage(tmp_path, "eventgpt", "16")
    assert (row["n"], row["discarded"], row["discarded_runs"]) == (11, 1, 3 + 2)
    assert row["total_ms"] == pytest.approx(350, rel=0.03)
    assert row["slowest_ms"] < 400
    assert report.verdict.word == "VALID"
    assert any(f.code == "discarded_throttled" and f.count == 5 for f in report.verdict.warnings)


def test_capped_runs_stay_out_of_natural_figures(tmp_path: Path) -> None:
    def cap(row: dict[str, Any]) -> dict[str, Any]:
        capped = row["length"] == "natural" and row["sample"].startswith("seq_00") and row["model"] == "eventgpt"
        return {**row, "status": "capped", "decode_ms": 1e6, "total_ms": 1e6 + 50} if capped else row

    merge(make_study(tmp_path, edit=cap), tmp_path)
    natural, apart = stage(tmp_path, "eventgpt", "natural"), stage(tmp_path, "eventgpt", "natural (capped)")
    assert (natural["n"], natural["capped"], natural["samples"]) == (9, 3, 12)
    assert natural["slowest_ms"] < 2000
    assert (apart["n"], apart["total_ms"]) == (3, 1_000_050)
    assert stage(tmp_path, "eventgpt", "16")["n"] == 12
    assert next(r for r in table(tmp_path, "comparison") if r["length"] == "natural" and r["metric"] == "total")["n"] == 9


def test_settings_of_one_model_are_ranked(tmp_path: Path) -> None:
    study = config(variants={"quantization": ["none", "int8"]})
    plan = make_study(
        tmp_path, plan_config=study, variants={"zz-none": {"quantization": "none"}, "aa-int8": {"quantization": "int8"}}, cuda=True
    )
    merge(plan, tmp_path)
    rows = table(tmp_path, "optimisations")
    assert {(r["variant"], r["reference_variant"]) for r in rows} == {("aa-int8", "zz-none")}, (
        "the base is the axis's first value, not the first name"
    )
    assert rows[0]["changed"] == "quantization: none -> int8"
    sentences = json.loads((tmp_path / "summary.json").read_text())["bottlenecks"]
    assert any("The one other measured variant, aa-int8 (quantization: none -> int8), has the ratio: " in s["sentence"] for s in sentences)
    compared = {(r["variant"], r["reference_variant"]) for r in table(tmp_path, "comparison")}
    assert compared == {("zz-none", "zz-none"), ("aa-int8", "aa-int8")}, "models are compared at equal settings"


def test_frame_counts_are_compared_along_their_axis(tmp_path: Path) -> None:
    study = config(variants={"frames": [1, 8]})
    merge(make_study(tmp_path, plan_config=study, variants={"f1": {"frames": 1}, "f8": {"frames": 8}}), tmp_path)
    assert {r["changed"] for r in table(tmp_path, "optimisations")} == {"frames: 1 -> 8"}
    assert {(r["variant"], r["reference_variant"]) for r in table(tmp_path, "comparison")} == {("f1", "f1"), ("f8", "f8")}


def test_a_batch_decodes_until_its_longest_answer(tmp_path: Path) -> None:
    def batched(row: dict[str, Any]) -> dict[str, Any]:
        own = 21 if row["sample"].startswith("seq_00/000000") else 11
        return {**row, "order": 0, "decode_ms": 1000.0, "new_tokens": own, "steps": 50}  # the longest answer is one that fills the batch

    variants = {"b4": {"batch": 4}}
    merge(make_study(tmp_path, samples=4, sequences=2, blocks=1, lengths=("natural",), edit=batched, variants=variants), tmp_path)
    assert stage(tmp_path, "eventgpt", "natural")["ms_per_token"] == 20
    row = stage(tmp_path, "eventgpt", "natural")
    assert row["sample_ms"] == pytest.approx(row["total_mean_ms"] / 4, rel=1e-3)
    assert row["decode_tokens_per_s"] == 50, "of each sample, as docs/tables.md says"
    assert "tokens a second those of each sample" in (tmp_path / "tables/stages.md").read_text()


def test_unequal_answers_do_not_leak_into_pace(tmp_path: Path) -> None:
    """Equal pace, one model says three times as much: the natural total is longer for its words alone, and the tables say so."""
    merge(make_study(tmp_path, samples=40, models={"eventgpt": {"tokens": 60}, "video_llava": {"tokens": 20}}), tmp_path)
    rows = {(r["length"], r["metric"]): r for r in table(tmp_path, "comparison")}
    assert rows["natural", "total"]["verdict"] == "SLOWER" and rows["natural", "new_tokens"]["verdict"] == "MORE"
    assert rows["natural", "ms_per_token"]["verdict"] == rows["16", "total"]["verdict"] == "SAME"
    parts = {r["part"]: r["factor"] for r in table(tmp_path, "decomposition") if r["length"] == "natural"}
    assert parts["tokens"] > 2 and parts["ms_per_token"] == pytest.approx(1, abs=0.01)
    slopes = [stage(tmp_path, model, "natural")["slope_ms_per_token"] for model in ("eventgpt", "video_llava")]
    assert slopes == pytest.approx([20, 20], rel=0.01)


def test_acceptance_needs_one_tokenizer(tmp_path: Path) -> None:
    plan = make_study(tmp_path)
    merge(plan, tmp_path)
    fixed = next(r for r in table(tmp_path, "acceptance") if r["length"] == "16")
    assert (fixed["position_share"], fixed["note"]) == (1.0, None)
    drafts = [r for r in table(tmp_path, "acceptance") if r["length"] == "16"]
    assert [r["gamma"] for r in drafts] == [1, 3, 5, 8]
    expected = [speculative_speedup(1.0, r["gamma"], r["cost"]) for r in drafts]
    assert [r["speculative_speedup_computed"] for r in drafts] == pytest.approx(expected, rel=2e-3)
    for number in (2, 3):
        rewrite(tmp_path, plan, number, study=study_metadata(model={"revision": "dummy:0/tiny", "tokenizer": "t1"}))
    merge(plan, tmp_path)
    refused = table(tmp_path, "acceptance")[0]
    assert refused["position_share"] is None
    assert "tokenizers differ" in refused["note"]
    assert not any("acceptance" in key for key in json.loads((tmp_path / "legacy_results.json").read_text())[0])


def test_one_model_alone(tmp_path: Path) -> None:
    study = config(models={"eventgpt": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"}}, compare={})
    report = merge(make_study(tmp_path, plan_config=study, models={"eventgpt": {}}), tmp_path)
    assert report.verdict.word == "VALID"
    assert table(tmp_path, "comparison") == []
    assert "None." in (tmp_path / "tables/comparison.md").read_text()


def test_no_nan_reaches_a_file(tmp_path: Path) -> None:
    merge(make_study(tmp_path, edit=lambda r: {**r, "residual_ms": float("nan"), "energy_j": float("inf")}), tmp_path)
    text = (tmp_path / "summary.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in summary.json"))
    for path in (tmp_path / "tables").glob("*.csv"):
        assert "nan" not in path.read_text().lower().replace("nano", ""), path


@pytest.mark.filterwarnings("error")
def test_a_stage_that_takes_no_time_has_no_coefficient_of_variation(tmp_path: Path) -> None:
    merge(make_study(tmp_path, samples=4, sequences=2, blocks=1, edit=lambda row: {**row, "h2d_ms": 0.0}), tmp_path)
    assert {row["cv"] for row in table(tmp_path, "distribution") if row["metric"] == "h2d"} == {None}


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_study(tmp_path)
    merge(plan, tmp_path)
    before = (tmp_path / "summary.json").read_bytes()

    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MergeError, match="No space left on device.*Make room"):
        merge(plan, tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    merge(make_study(tmp_path), tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_a_batch_s_steps_are_what_decode_is_divided_by(tmp_path: Path) -> None:
    """An answer of few tokens in a batch that went on for 40: the pace and the slope are the batch's, and all of the ratio is pace."""

    def batched(row: dict[str, Any]) -> dict[str, Any]:
        ms = 40 * (10.0 if row["model"] == "eventgpt" else 20.0)
        return {**row, "steps": 40, "decode_ms": ms, "total_ms": row["total_ms"] - row["decode_ms"] + ms}

    merge(make_study(tmp_path, samples=24, sequences=6, edit=batched), tmp_path)
    rows = {(r["metric"], r["length"]): r for r in table(tmp_path, "comparison")}
    assert rows["ms_per_token", "natural"]["ratio"] == pytest.approx(0.5, rel=1e-3)
    parts = {r["part"]: r["ms"] for r in table(tmp_path, "decomposition") if r["length"] == "natural"}
    assert parts["tokens"] == 0 and parts["ms_per_token"] == pytest.approx(-400, rel=1e-3)


def test_variants_stand_in_the_order_of_the_config_everywhere(tmp_path: Path) -> None:
    """Batches 2 to 32 sort as b16, b2, b32, b4, b8 by name; models and lengths have their own order, too."""
    one = {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"}
    study = config(variants={"batch": [2, 4, 8, 16, 32]}, models={"zz": one, "aa": one}, compare={"resamples": 200})
    variants = {f"b{n}": {"batch": n} for n in (16, 8, 2, 32, 4)}

    def failing(row: dict[str, Any]) -> dict[str, Any]:
        failed = row["sample"].startswith("seq_00/000000")
        return {**row, "order": 0} | ({"status": "error", "reason": "why", "total_ms": None} if failed else {})

    merge(
        make_study(
            tmp_path, plan_config=study, models={"aa": {}, "zz": {}}, variants=variants, lengths=("128", "16"), edit=failing, blocks=1
        ),
        tmp_path,
    )
    wanted = [("zz", b) for b in ("b2", "b4", "b8", "b16", "b32")] + [("aa", b) for b in ("b2", "b4", "b8", "b16", "b32")]
    for name in ("stages", "load", "failures", "distribution", "views", "axis", "comparison", "decomposition", "acceptance"):
        rows = table(tmp_path, name)
        models = [m for m in ("zz", "aa") if any(row["model"] == m for row in rows)]
        found = list(dict.fromkeys((row["model"], row["variant"]) for row in rows if row.get("metric", "total") in ("total", "load")))
        assert found == [key for key in wanted if key[0] in models], name
        lengths = list(dict.fromkeys(row["length"] for row in rows if row.get("length")))
        assert lengths in ([], ["16", "128"]), name
    assert "b32 (batch: 2 -> 32) has the lowest ratio of total / batch: 0.0625" in (tmp_path / "summary.json").read_text()
    ranked = table(tmp_path, "optimisations")
    assert list(dict.fromkeys(row["model"] for row in ranked)) == ["zz", "aa"]
    assert {row["reference_variant"] for row in ranked} == {"b2"}
    written = (tmp_path / "tables/stages.csv").read_text().splitlines()
    assert [line.split(",")[4] for line in written[1:6]] == ["b2", "b4", "b8", "b16", "b32"]


def test_the_old_form_holds_the_first_variant_of_the_config(tmp_path: Path) -> None:
    study = config(variants={"quantization": ["none", "int8"]})

    def slow(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "total_ms": 9e6} if row["quantization"] == "int8" else row

    variants = {"zz-none": {"quantization": "none"}, "aa-int8": {"quantization": "int8"}}
    merge(make_study(tmp_path, plan_config=study, variants=variants, edit=slow), tmp_path)
    assert all(entry["egpt_time"] < 9000 for entry in json.loads((tmp_path / "legacy_results.json").read_text()))
