"""Engines that capture, inside the session: nothing is captured in a timed window, and what is captured there is caught."""

import contextlib
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from stagebench import engines
from stagebench.config import RepeatsConfig, load_config
from stagebench.engines import _stepped
from stagebench.engines import encoder as encoder_module
from stagebench.engines._graphs import Captured, NotCapturable
from stagebench.engines._stepped import SteppedEngine, _captured_encoder
from stagebench.engines.encoder import GraphedCall
from stagebench.models.base import Decoding
from stagebench.rows import Code
from stagebench.session import DeviceLostError, Settings, Subject, time_samples
from stagebench.session.admission import admit_shapes
from stagebench.session.order import groups
from stagebench.session.validity import accepted
from timing_jobs import Frames, tasks, tiny_llava

torch.set_num_threads(1)
SETTINGS = Settings(lengths=("natural", "4"), max_new_tokens=6, repeats=RepeatsConfig(min=2, max=2), warmup=1, plain_share=1.0)
QUERIES = ("What?", "What is there?", "What do you see on the left of the road?")


@pytest.fixture(scope="module")
def adapter():
    return tiny_llava()


def measured(adapter, name, count=4, loader=None, **changes):
    subject = Subject(adapter, engines.create(name), loader or Frames(), "cpu")
    return subject, time_samples(subject, tasks(count, QUERIES), replace(SETTINGS, **changes))


@pytest.mark.parametrize("name", ["graph", "fused", "static"])
@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_is_captured_inside_a_window(adapter, name, batch):
    """Three prompt lengths, two length modes, padded batches: all of it is ready before the first run."""
    subject, outcome = measured(adapter, name, batch=batch)
    assert subject.engine.late == []
    assert outcome.admission.failed == []
    assert outcome.admission.shapes == (3 if batch == 1 else 2)
    assert len(outcome.admission.captured_ms) >= 2
    assert outcome.admission.total_ms >= sum(outcome.admission.captured_ms.values())
    assert not {code for row in outcome.rows for code in row["codes"]} & {Code.DISCARDED_CAPTURE, Code.INVALID_ENCODER_CALLS}
    assert all(row["status"] in ("ok", "capped") and row["encoder_calls"] == 1 for row in outcome.rows)


def test_rows_are_the_same_as_with_generate(adapter):
    found = {}
    for name in ("generate", "graph", "fused"):
        _, outcome = measured(adapter, name)
        found[name] = {(row["sample"], row["length"]): row["token_ids"] for row in outcome.rows}
    assert found["graph"] == found["fused"] == found["generate"]


def test_kv_bytes_are_those_in_use(adapter):
    """Not the allocated capacity: the limit beside a figure counts what a step reads."""
    sizes = {name: {(r["sample"], r["length"]): r["kv_bytes"] for r in measured(adapter, name)[1].rows} for name in ("generate", "fused")}
    assert sizes["fused"] == sizes["generate"]


def test_engines_that_capture_nothing_cost_no_preparation(adapter):
    _, outcome = measured(adapter, "generate", 1)
    assert outcome.admission.shapes == 0
    assert outcome.admission.total_ms == 0


def test_a_capture_inside_the_window_is_marked_kept_out_and_measured_again(adapter, monkeypatch):
    monkeypatch.setattr(SteppedEngine, "admit", lambda *_: {})
    subject, outcome = measured(adapter, "graph", 2, warmup=0)
    assert subject.engine.late
    late = [row for row in outcome.rows if Code.DISCARDED_CAPTURE in row["codes"]]
    assert late
    assert all("captured" in row["reason"] and not accepted(row) and row["repeat"] == 0 for row in late)
    for row in late:
        same = [r for r in outcome.rows if (r["sample"], r["length"]) == (row["sample"], row["length"])]
        assert len(same) == 1 + SETTINGS.repeats.min
    assert Code.INVALID_ENCODER_CALLS not in {code for row in outcome.rows for code in row["codes"]}


def test_a_shape_that_cannot_be_prepared_is_left_to_its_run(adapter):
    _, outcome = measured(adapter, "graph", 3, Frames(bad=("seq/1",)))
    assert len(outcome.admission.failed) == 1
    assert "seq/1" in outcome.admission.failed[0]
    assert {row["status"] for row in outcome.rows if row["clip"] == "seq/1"} == {"error"}
    assert all(row["status"] in ("ok", "capped") for row in outcome.rows if row["clip"] != "seq/1")


@pytest.mark.parametrize("name", ["graph", "fused"])
def test_a_model_that_cannot_be_captured_runs_on_the_fallback(adapter, monkeypatch, name):
    """It shows at the first capture only; the rows are those of generate, nothing is late, and the job says so."""

    def refuse(*_):
        raise NotCapturable("AcceleratorError: CUDA error: operation not permitted when stream is capturing. Use another.")

    monkeypatch.setattr(_stepped, "capture", refuse)
    subject, outcome = measured(adapter, name, 2)
    assert "graph falls back to generate" in outcome.admission.note
    assert (f"{name} falls back to graph" in outcome.admission.note) == (name == "fused")
    assert "operation not permitted" in outcome.admission.note
    assert outcome.admission.failed == []
    assert subject.engine.late == []
    _, plain = measured(adapter, "generate", 2)
    assert [row["token_ids"] for row in outcome.rows] == [row["token_ids"] for row in plain.rows]


def test_an_encoder_that_cannot_be_captured_runs_as_it_is(monkeypatch):
    def refuse(*_):
        raise NotCapturable("it waits for the device")

    monkeypatch.setattr(encoder_module, "capture", refuse)
    graphed = GraphedCall(lambda x: x * 2)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    for _ in range(2):
        assert torch.equal(graphed(torch.ones(2)), torch.full((2,), 2.0))
    assert graphed.eager == "it waits for the device"
    assert graphed.calls == 0
    assert graphed.captures == 1


def test_a_device_lost_while_preparing_ends_the_job(adapter):
    engine = engines.create("graph")
    engine.prepare(adapter, Decoding(4), 1)

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine.admit = lost
    subject = Subject(adapter, engine, Frames(), "cpu")
    told = []

    @contextlib.contextmanager
    def noted(group):
        try:
            yield
        except DeviceLostError:
            told.append(group.order)
            raise

    with pytest.raises(DeviceLostError, match="illegal memory"):
        admit_shapes(subject, groups(tasks(2, QUERIES), seed=0, batch=1), [Decoding(4)], noted)
    assert told == [0]


def test_a_captured_graph_keeps_what_its_function_closes_over():
    """A graph knows addresses only. The causal mask of padded prefills was freed under one, and batches came out wrong on CUDA."""

    class Graph:
        replayed = 0

        def replay(self):
            self.replayed += 1

    class Mask:
        pass

    def build():
        mask = Mask()
        return weakref.ref(mask), Captured(Graph(), lambda: mask)

    alive, replay = build()
    gc.collect()
    replay()
    assert replay.graph.replayed == 1
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None


def test_encoders_that_cannot_be_captured_stay_eager(adapter, monkeypatch):
    assert _captured_encoder(adapter, {}) == (None, None)  # on a CPU there is nothing to say
    monkeypatch.setattr(adapter, "device", torch.device("cuda"))
    pruned = replace(adapter.spec, keep_visual=0.5)
    monkeypatch.setattr(adapter, "spec", pruned)
    encoder, why = _captured_encoder(adapter, {})
    assert encoder is None
    assert "hook" in why
    graphed = GraphedCall(lambda x: x * 2)
    assert torch.equal(graphed(torch.ones(2)), torch.full((2,), 2.0))
    assert graphed.calls == 0  # its hooks fired: only replays are counted here
    assert graphed.captures == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["graph", "fused"])
@pytest.mark.parametrize("batch", [1, 3])
def test_captured_rows_equal_generate_on_a_device(name, batch):
    """Padded batches with memory churned between capture and replay; encode replays are counted once a run."""
    on_device = tiny_llava("cuda")

    class Churning(Frames):
        def load(self, clip):
            torch.full((64, 1024, 1024), float("nan"), device="cuda")
            for size in (2**k for k in range(4, 20)):
                torch.full((size,), float("nan"), device="cuda")
            return super().load(clip)

    found = {}
    for engine in ("generate", name):
        subject = Subject(on_device, engines.create(engine), Churning(), "cuda")
        outcome = time_samples(subject, tasks(6, QUERIES), replace(SETTINGS, batch=batch, plain_share=0.0))
        assert all(row["encoder_calls"] == 1 and Code.DISCARDED_CAPTURE not in row["codes"] for row in outcome.rows)
        found[engine] = {(row["sample"], row["length"]): row["token_ids"] for row in outcome.rows}
    assert subject.engine.late == []
    assert subject.engine.encoder.calls > 0
    assert found[name] == found["generate"]


def test_the_study_of_engines_measures_three_models_at_a_fixed_length(repo):
    config = load_config(repo / "config/engines_7b.yaml")
    assert set(config.models) == {"eventgpt", "llava", "video_llava"}
    assert all(model.preset == "7b" and model.weights == "dummy:0" for model in config.models.values())
    assert config.variants.engine == ("generate", "graph", "fused")
    assert config.variants.dtype == "bfloat16"
    assert tuple(config.timing.lengths) == (45,)
