"""legacy: the old system's results file, from our rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from factories import config, job_metadata, make_study
from stagebench.merge import merge
from stagebench.merge.legacy import dated_name, prefixes


def entries(results: Path) -> list[dict[str, Any]]:
    return json.loads((results / "legacy_results.json").read_text())


def test_prefixes_are_the_old_ones_and_never_shared() -> None:
    model = {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"}
    egpt = {**model, "adapter": "eventgpt", "input": "events"}
    study = config(models={"eventgpt": egpt, "video_llava": model, "llava": model, "llava_grid": model, "qwen": model}, compare={})
    names = prefixes(study)
    assert list(names.values()) == ["egpt", "videollava", "llava", "llava_grid", "qwen"]


def test_the_old_form(tmp_path: Path) -> None:
    merge(make_study(tmp_path), tmp_path)
    found = entries(tmp_path)
    assert len(found) == 12
    entry = found[0]
    for prefix in ("egpt", "videollava"):
        for key in ("time", "stage1_time", "stage2_time", "stage3_time", "token_ids"):
            assert f"{prefix}_{key}" in entry
        parts = [entry[f"{prefix}_stage{n}_time"] for n in (1, 2, 3)]
        assert sum(parts) == pytest.approx(entry[f"{prefix}_time"], abs=1e-4), "seconds, and they sum to the whole but for the residual"
        four = entry[f"{prefix}_4stage"]
        assert four["stage3_time"] + four["stage4_time"] == pytest.approx(parts[2], abs=2e-6)
        assert four["stage2_time"] == parts[1]
        five = entry[f"{prefix}_5stage"]
        assert five["stage4_time"] + five["stage5_time"] == pytest.approx(four["stage4_time"], abs=2e-6)
        assert len(entry[f"{prefix}_token_ids"]) == entry[f"{prefix}_num_tokens"]
    assert entry["egpt_stage2_time"] == pytest.approx(0.0105, rel=0.05), "h2d counts to stage 2"
    assert entry["egpt"] == "a road, said eventgpt"
    assert entry["benchmark_datetime"] == "2026-01-24T10:05:00"
    assert 0 <= entry["egpt_vs_videollava_acceptance_rate"] <= 1
    assert "egpt_vs_videollava_speculative_speedup_computed_gamma5" in entry


def test_the_dated_copy_is_named_by_the_measurement(tmp_path: Path) -> None:
    merge(make_study(tmp_path, job=job_metadata(finished="2026-01-24T11:05:09+01:00")), tmp_path)
    copy = tmp_path / "set_results_n12_20260124_100509.json"
    assert copy.read_bytes() == (tmp_path / "legacy_results.json").read_bytes()
    assert dated_name("set", 3, None) == "set_results_n3.json"


def test_a_failed_model_leaves_its_keys_out(tmp_path: Path) -> None:
    def fail(row: dict[str, Any]) -> dict[str, Any]:
        bad = row["model"] == "eventgpt" and row["sample"].startswith("seq_00/000000")
        return {**row, "status": "error", "reason": "x", "total_ms": None, "text": None, "token_ids": None} if bad else row

    merge(make_study(tmp_path, edit=fail), tmp_path)
    entry = next(e for e in entries(tmp_path) if e["sample"].startswith("seq_00/000000"))
    assert "egpt_time" not in entry, "a hook that found no tower once reported 0.0 ms"
    assert "videollava_time" in entry


def test_capped_samples_stand_in_the_old_form_with_their_status(tmp_path: Path) -> None:
    merge(make_study(tmp_path, edit=lambda r: {**r, "status": "capped"} if r["length"] == "natural" else r), tmp_path)
    assert {e["egpt_status"] for e in entries(tmp_path)} == {"capped"}


def test_a_slice_at_a_time_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a text holds what other programs take for a line's end."""

    def odd(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "text": "a\nb\u2028c\x85d"}

    merge(make_study(tmp_path / "a", edit=odd), tmp_path / "a")
    monkeypatch.setattr("stagebench.merge.legacy.AT_ONCE", 1)
    merge(make_study(tmp_path / "b", edit=odd), tmp_path / "b")
    text = (tmp_path / "a/legacy_results.json").read_text(encoding="utf-8")
    assert text == (tmp_path / "b/legacy_results.json").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
    assert json.loads(text)[0]["egpt"] == "a\nb\u2028c\x85d"
