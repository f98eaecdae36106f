"""Settings as variants, from the plan to the tables: names, timing jobs, quality, batches, acceptance."""

import json

import polars as pl
import pytest
import torch

from clip_study import extracted
from stagebench import machine, session
from stagebench.config import load_config
from stagebench.demo import write_demo
from stagebench.errors import ConfigError
from stagebench.merge import merge
from stagebench.rows import Status
from stagebench.session import load_adapter, run_job
from stagebench.session.fidelity import TOKENS
from stagebench.session.output import read_metadata
from stagebench.verify import run_verify

torch.set_num_threads(1)
MODELS = {
    "eventgpt": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"},
    "video_llava": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
    "llava": {"adapter": "hf", "input": "frames", "frames_as": "grid", "weights": "dummy:0", "preset": "tiny"},
}
DRAFT = {"draft": {"weights": "dummy:1", "preset": "tiny"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("variants")
    write_demo(root / "demo", clips=3, seconds=0.5, size=(64, 96))
    return root


def planned(root, models, **variants):
    config = load_config(
        {
            "study": "v",
            "datasets": {"demo": {"root": str(root / "demo"), "sensor": [64, 96]}},
            "models": models,
            "variants": variants,
            "timing": {"lengths": [6], "max_new_tokens": 6, "repeats": 1, "warmup": 0},
            "compare": {"reference": next(iter(models)), "resamples": 200},
        }
    )
    return extracted(config, root / "cache")


def timed(plan, root, results):
    rows = {}
    for job in plan.jobs:
        run_job(plan, job, results / job.path, cache=root / "cache", device="cpu", threads=1)
        rows[job.model, job.variant.name.rpartition("-")[0]] = pl.read_parquet(results / job.path)
    return rows


def test_settings_left_at_their_default_are_not_named(root):
    plain, asked = (planned(root, MODELS, **variants) for variants in ({}, {"keep_visual": 1.0, "preprocess": "pil"}))
    assert [job.variant.name for job in plain.jobs] == [job.variant.name for job in asked.jobs]
    assert not any(word in job.variant.name for job in plain.jobs for word in ("keep", "pil"))


def test_every_setting_is_a_variant_of_its_own(root):
    plan = planned(root, {"llava": MODELS["llava"]}, keep_visual=[1.0, 0.5], preprocess=["pil", "device"], quantization=["none", "nf4"])
    names = [job.variant.name for job in plan.jobs]
    assert len(set(names)) == 8
    for word in ("keep0.5", "device", "nf4"):
        assert sum(word in name for name in names) == 4
    # a proof is of the model: one for each way that its weights are held, none for tokens left out
    assert plan.verify_paths == ("verify/llava.json", "verify/llava@nf4.json")


@pytest.fixture(scope="module")
def study(root):
    """All three models: plain, int8, half the visual tokens, pixels from the device."""
    results = root / "results"
    plan = planned(root, MODELS, quantization=["none", "int8"], keep_visual=[1.0, 0.5], preprocess=["pil", "device"])
    wanted = {"eventgpt": ("", "keep"), "video_llava": ("", "keep", "device"), "llava": ("int8",)}
    keep = []
    for job in plan.jobs:
        changed = [word for word in ("int8", "keep", "device") if word in job.variant.name]
        if "-".join(changed) in wanted[job.model]:
            keep.append(job)
    rows = {}
    for job in keep:
        run_job(plan, job, results / job.path, cache=root / "cache", device="cpu", threads=1)
        rows[job.model, job.variant.name] = (pl.read_parquet(results / job.path), read_metadata(results / job.path)["job"], job)
    return plan, results, rows


def test_quality_stands_beside_each_changed_variant(study):
    _, _, rows = study
    assert len(rows) == 6
    for (model, name), (frame, about, job) in rows.items():
        assert set(frame["status"]) == {Status.OK.value}, (model, name, frame["reason"].to_list())
        found, settings = about["quality"], job.variant.settings
        if "int8" not in name and "keep" not in name and "device" not in name:
            assert found is None and about["quantized"] is None
            continue
        assert found["positions"] == 3 * TOKENS and found["samples"] == 3
        assert 0 <= found["mean_kl"] <= found["max_kl"] and 0 <= found["agreement"] <= 1
        if settings["quantization"] == "int8":
            assert found["agreement"] > 0.8 and 0 < found["relative_error"] < 0.1 and found["pixel_max_abs"] == 0
            assert about["quantized"]["scheme"] == "int8" and set(frame["quantization"]) == {"int8"}
        elif "preprocess" in settings:
            assert found["pixel_max_abs"] < 0.02 and found["agreement"] > 0.9 and set(frame["preprocess"]) == {"device"}
        else:
            assert found["relative_error"] > 1e-4 and set(frame["keep_visual"]) == {0.5}
            plain = next(f for (m, n), (f, a, _) in rows.items() if m == model and a["quality"] is None)
            assert frame["visual_tokens"][0] < 0.7 * plain["visual_tokens"][0]
            assert frame["prompt_tokens"][0] == plain["prompt_tokens"][0] - (plain["visual_tokens"][0] - frame["visual_tokens"][0])


def test_a_proof_holds_its_device_as_a_timing_job_does(root, tmp_path, monkeypatch):
    """Else it would run on the first GPU beside the job that has it, which then takes twice as long."""
    held = []

    class Watched(machine.Lease):
        def release(self):
            held.append("released")

    plan = planned(root, {"llava": MODELS["llava"]})
    (path,) = plan.verify_paths
    load = session.load_adapter
    monkeypatch.setattr(machine, "pick_device", lambda device: held.append(device) or Watched("cpu"))
    monkeypatch.setattr(session, "load_adapter", lambda *given, **named: held.append(named["device"]) or load(*given, **named))
    run_verify(plan, plan.verify_job(path), tmp_path / path, cache=root / "cache")
    assert held == [None, "cpu", "released"]


def test_the_tables_rank_them_with_their_quality(root, tmp_path):
    plan = planned(root, {"llava": MODELS["llava"] | DRAFT}, quantization=["none", "nf4"], engine=["generate", "speculative"])
    timed(plan, root, tmp_path)
    for path in plan.verify_paths:
        run_verify(plan, plan.verify_job(path), tmp_path / path, cache=root / "cache", device="cpu")
    merge(plan, tmp_path)
    table = pl.read_parquet(tmp_path / "tables" / "optimisations.parquet")
    assert len(table) == 3
    for row in table.iter_rows(named=True):
        quantised, ahead = "nf4" in row["changed"], "speculative" in row["changed"]
        assert (row["mean_kl"] is not None) == (row["agreement"] is not None) == quantised
        assert (row["acceptance"] is not None) == ahead
        assert row["ratio"] and row["sample_ratio"] == row["ratio"] and row["weights_bytes"]
    assert "Quality and memory" in (tmp_path / "tables" / "optimisations.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["verdict"]


def test_guessing_ahead_says_what_was_accepted_and_the_text_stays(root, tmp_path):
    rows = timed(
        planned(root, {"eventgpt": MODELS["eventgpt"] | DRAFT}, engine=["generate", "prompt_lookup", "speculative"]), root, tmp_path
    )
    plain = rows["eventgpt", "generate-events5-cache"].sort("sample")
    assert plain["drafted_tokens"].null_count() == len(plain)
    for engine in ("prompt_lookup", "speculative"):
        found = rows["eventgpt", f"{engine}-events5-cache"].sort("sample")
        assert found["token_ids"].to_list() == plain["token_ids"].to_list()
        assert (found["accepted_tokens"] <= found["drafted_tokens"]).all()


def test_batches_give_the_text_of_single_samples(root, tmp_path):
    rows = timed(planned(root, MODELS, batch=[1, 2, 16]), root, tmp_path)
    for model in MODELS:
        kind = "events5" if model == "eventgpt" else "frames8"
        single, *batches = (rows[model, f"generate-{b}{kind}-cache"].sort("sample") for b in ("", "b2-", "b16-"))
        for batch in batches:
            assert set(batch["status"]) == {"ok"} and len(batch) == len(single) == 3
            assert batch["token_ids"].to_list() == single["token_ids"].to_list()
            assert batch["prompt_tokens"].to_list() == single["prompt_tokens"].to_list()
        assert batches[0]["kv_bytes"][0] >= 2 * single["kv_bytes"][0]


def test_out_of_memory_at_a_size_is_a_row(root, tmp_path, monkeypatch):
    from stagebench.engines.generate import GenerateEngine

    run = GenerateEngine.run

    def small(self, merge, decoding, clock):
        if merge().embeds.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, merge, decoding, clock)

    monkeypatch.setattr(GenerateEngine, "run", small)
    plan = planned(root, {"llava": MODELS["llava"]}, batch=[1, 4])
    rows = timed(plan, root, tmp_path)
    assert set(rows["llava", "generate-frames8-cache"]["status"]) == {"ok"}
    large = rows["llava", "generate-b4-frames8-cache"]
    assert set(large["status"]) == {"oom"} and len(large) == 3 and set(large["batch"]) == {4}


def test_a_draft_is_loaded_for_its_engine_only(root):
    plan = planned(root, {"llava": MODELS["llava"] | DRAFT}, engine=["generate", "speculative"])
    drafts = [getattr(load_adapter(plan.config, job, device="cpu"), "draft", None) for job in plan.jobs]
    assert drafts[0] is None and drafts[1].revision() == "dummy:1/tiny"
    with pytest.raises(ConfigError, match=r"models.llava.draft"):
        planned(root, {"llava": MODELS["llava"]}, engine=["speculative"])


def test_wrong_shares_are_refused():
    for share in (0, 1.5):
        with pytest.raises(ConfigError, match="keep_visual"):
            load_config(
                {"study": "v", "datasets": {"d": {"root": "x", "sensor": [4, 4]}}, "models": MODELS, "variants": {"keep_visual": share}}
            )
