"""merge: which files may be pooled, and what makes a study INVALID."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from factories import job_metadata, make_rows, make_study, rewrite, stage, study_metadata, table, write_rows
from stagebench.errors import MergeError
from stagebench.merge import merge


def test_every_sample_failed_is_an_error_and_no_table(tmp_path: Path) -> None:
    def fail(row: dict[str, Any]) -> dict[str, Any]:
        nulls = {f"{s}_ms": None for s in ("load", "preprocess", "h2d", "encode", "prefill", "decode", "total", "residual", "ttft")}
        return {**row, **nulls, "status": "error", "reason": "weights do not fit", "new_tokens": None}

    plan = make_study(tmp_path, edit=fail)
    with pytest.raises(MergeError, match="all 144 runs failed .*weights do not fit"):
        merge(plan, tmp_path)
    assert not (tmp_path / "tables").exists()
    assert not (tmp_path / "summary.json").exists()
    assert not list(tmp_path.glob("*.parquet")) and not list(tmp_path.glob(".*.parquet"))


def test_a_refused_merge_leaves_the_rows_of_the_tables_before_it(tmp_path: Path) -> None:
    merge(make_study(tmp_path), tmp_path)
    before = (tmp_path / "timings.parquet").read_bytes()
    failing = make_study(tmp_path, edit=lambda r: {**r, "status": "error", "reason": "No such folder.", "codes": ["warn_load_average"]})
    with pytest.raises(MergeError, match=r": error No such folder\. No table is written\."):
        merge(failing, tmp_path)
    assert (tmp_path / "timings.parquet").read_bytes() == before, "the tables and the report beside it are of these rows"


def test_only_capped_natural_runs_leave_the_study_valid(tmp_path: Path) -> None:
    """Random weights seldom say EOS: a demo is no invalid study for that."""
    report = merge(make_study(tmp_path, edit=lambda r: {**r, "status": "capped"} if r["length"] == "natural" else r), tmp_path)
    assert report.verdict.word == "VALID"
    natural = stage(tmp_path, "eventgpt", "natural")
    assert (natural["n"], natural["capped"], natural["total_ms"]) == (0, 12, None)
    assert {r["length"] for r in table(tmp_path, "comparison")} >= {"16", "natural (capped)"}


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("invalid_encoder_calls", "ok", "invalid_encoder_calls"),
        ("invalid_token_count", "ok", "invalid_token_count"),
        ("invalid_plain_differs", "ok", "invalid_plain_differs"),
        (None, "nan", "invalid_nan"),
    ],
)
def test_one_invalid_row_makes_the_study_invalid(tmp_path: Path, code: str | None, status: str, expected: str) -> None:
    hit = []

    def spoil(row: dict[str, Any]) -> dict[str, Any]:
        if not hit:
            hit.append(row["sample"])
            return {**row, "status": status, "codes": [code] if code else []}
        return row

    report = merge(make_study(tmp_path, edit=spoil), tmp_path)
    assert report.verdict.word == "INVALID"
    assert expected in {f.code for f in report.verdict.reasons}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["verdict"] == "INVALID"
    for name in ("stages", "comparison", "failures"):
        text = (tmp_path / "tables" / f"{name}.md").read_text()
        assert text.splitlines()[2].startswith(f"Verdict: INVALID ({expected}"), f"{name}.md says it on top"
        assert "Verdict: INVALID" in (tmp_path / "tables" / f"{name}.tex").read_text().splitlines()[0]
    assert (tmp_path / "tables/stages.csv").read_text().splitlines()[1].startswith("INVALID,")


def test_no_accepted_sample_of_one_model_is_invalid(tmp_path: Path) -> None:
    report = merge(make_study(tmp_path, edit=lambda r: {**r, "codes": ["suspect_residual"]} if r["model"] == "eventgpt" else r), tmp_path)
    assert "invalid_no_accepted" in {f.code for f in report.verdict.reasons}
    row = stage(tmp_path, "eventgpt", "16")
    assert (row["n"], row["discarded"], row["total_ms"]) == (0, 12, None), "nothing stands where nothing was measured: no NaN, no zero"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing"),
        ("{", "cannot be read"),
        ('{"model": "eventgpt", "passed": true, "checks": []}', "no check ran"),
        ('{"model": "eventgpt", "passed": true, "checks": [{"name": "logits", "passed": false, "detail": "1e-2"}]}', "failed: logits"),
        ('{"model": "eventgpt", "passed": "yes", "checks": [{"name": "logits", "passed": true, "detail": ""}]}', "failed"),
    ],
)
def test_a_missing_or_failed_proof_makes_the_study_invalid(tmp_path: Path, content: str | None, said: str) -> None:
    plan = make_study(tmp_path)
    proof = tmp_path / "verify/eventgpt.json"
    proof.unlink() if content is None else proof.write_text(content)
    report = merge(plan, tmp_path)
    reasons = [f for f in report.verdict.reasons if f.code == "invalid_not_verified"]
    assert [f.where for f in reasons] == ["eventgpt"]
    assert said in reasons[0].detail


def test_refuses_differing_study_fingerprints_and_shows_the_difference(tmp_path: Path) -> None:
    plan = make_study(tmp_path)
    rewrite(tmp_path, plan, 1, study=study_metadata(dtype="float16"))
    with pytest.raises(MergeError, match=r'(?s)dtype: "float\d+" -> "float\d+".*Delete the file'):
        merge(plan, tmp_path)


def test_refuses_two_revisions_of_one_model(tmp_path: Path) -> None:
    plan = make_study(tmp_path, blocks=1, variants={"a-0": {}, "b-1": {"batch": 1, "quantization": "int8"}})
    rewrite(tmp_path, plan, 1, study=study_metadata(model={"revision": "dummy:1/tiny", "tokenizer": "t0"}))
    with pytest.raises(MergeError, match="model.revision"):
        merge(plan, tmp_path)


def test_refuses_rows_of_other_timing_settings(tmp_path: Path) -> None:
    plan = make_study(tmp_path)
    timing = plan.config.timing.model_dump(mode="json", exclude={"max_samples", "reuse"})
    for number in range(len(plan.jobs)):
        rewrite(tmp_path, plan, number, study=study_metadata(timing=timing))
    merge(plan, tmp_path)
    for number in range(len(plan.jobs)):
        rewrite(tmp_path, plan, number, study=study_metadata(timing={**timing, "warmup": 0}))
    with pytest.raises(MergeError, match=r"(?s)the config.*timing.warmup: 2 -> 0"):
        merge(plan, tmp_path)


def test_keeps_machines_apart(tmp_path: Path) -> None:
    plan = make_study(tmp_path)
    for number in (0, 2):  # one block of each model
        rewrite(tmp_path, plan, number, machine={"cpu": {"model": "Other CPU"}, "gpu": None, "digest": "x"})
    report = merge(plan, tmp_path)
    rows = table(tmp_path, "stages")
    assert len({r["machine"] for r in rows}) == 2
    assert all(r["n"] == 6 for r in rows)
    assert all(r["n"] == 6 for r in table(tmp_path, "comparison"))
    assert len(json.loads((tmp_path / "summary.json").read_text())["machines"]) == 2
    assert "| machine |" in (tmp_path / "tables/stages.md").read_text()
    assert report.rows == 144


def test_two_hosts_of_one_build_are_one_machine(tmp_path: Path) -> None:
    plan = make_study(tmp_path)
    for number in range(4):
        rewrite(tmp_path, plan, number, machine={"cpu": {"model": "C"}, "host": {"name": f"node{number}"}, "digest": "same"})
    merge(plan, tmp_path)
    assert len({r["machine"] for r in table(tmp_path, "stages")}) == 1


def test_refuses_gpu_jobs_whose_anchors_differ(tmp_path: Path) -> None:
    plan = make_study(tmp_path, job=job_metadata(device="cuda:0"))
    merge(plan, tmp_path)
    slow = {"before": {"gemv": 1.3}, "after": {"gemv": 1.3}}
    rewrite(tmp_path, plan, 1, job=job_metadata(device="cuda:1", anchors=slow))
    with pytest.raises(MergeError, match="anchor 'gemv'.*changed speed"):
        merge(plan, tmp_path)


def test_warns_of_anchors_on_a_cpu(tmp_path: Path) -> None:
    plan = make_study(tmp_path)
    rewrite(tmp_path, plan, 1, job=job_metadata(anchors={"before": {"gemv": 1.3}, "after": {"gemv": 1.3}}))
    report = merge(plan, tmp_path)
    assert report.verdict.word == "VALID"
    assert "warn_anchor_drift" in {f.code for f in report.verdict.warnings}


def test_reads_the_plans_files_only(tmp_path: Path) -> None:
    plan = make_study(tmp_path)
    stale = tmp_path / "timings/set/eventgpt/generate-00000000/stale-cccccccc.parquet"
    write_rows(stale, make_rows(samples=["seq_99/000000#00000000"], factor=1000))
    assert merge(plan, tmp_path).rows == 144


@pytest.mark.parametrize("fault", ["missing", "truncated", "flipped", "other model", "lost sample", "twice", "old schema", "no metadata"])
def test_refuses_a_file_that_is_not_what_the_plan_says(tmp_path: Path, fault: str) -> None:
    plan = make_study(tmp_path)
    path = tmp_path / plan.jobs[0].path
    rows = pq.read_table(path, partitioning=None).to_pylist()
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif fault == "flipped":
        metadata = pq.read_schema(path).metadata
        pq.write_table(
            pq.read_table(path, partitioning=None).replace_schema_metadata(metadata), path, write_page_checksum=True, compression="none"
        )
        data = bytearray(path.read_bytes())
        at = data.find(b"a road, said")
        data[at] ^= 1
        path.write_bytes(bytes(data))
    elif fault == "other model":
        write_rows(path, [{**r, "model": "llava"} for r in rows])
    elif fault == "lost sample":
        write_rows(path, [r for r in rows if r["sample"] != rows[0]["sample"]])
    elif fault == "twice":
        write_rows(path, [*rows, rows[0]])
    elif fault == "old schema":
        pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["encode_ms"]), path)
    else:
        pq.write_table(pq.read_table(path, partitioning=None).replace_schema_metadata(None), path)
    with pytest.raises(MergeError, match=r"\.parquet.*[Rr]un its timing job again"):
        merge(plan, tmp_path)


def test_a_job_named_twice_does_not_count_twice(tmp_path: Path) -> None:
    plan = make_study(tmp_path)
    plan.jobs.append(plan.jobs[0])
    with pytest.raises(MergeError, match="named twice"):
        merge(plan, tmp_path)
