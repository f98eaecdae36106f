"""Faults put into a real timing job on the demo dataset, and how the job says so. docs/methodology.md names these tests."""

import itertools
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pynvml
import pytest
import torch

from stagebench import engines, machine, stages
from stagebench.config import load_config
from stagebench.demo import write_demo
from stagebench.extract import extract_shard
from stagebench.machine import monitor as sensors
from stagebench.models.hooks import EncoderCounter
from stagebench.plan import Plan, build_plan
from stagebench.rows import Code
from stagebench.session import job as job_module
from stagebench.session import run_job
from stagebench.session.output import read_metadata
from stagebench.stages import StageClock

torch.set_num_threads(1)
CLIPS = 9
RUNS = CLIPS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    write_demo(root / "demo", clips=CLIPS, seconds=0.2, size=(64, 96))
    for name, timing in {
        "one": {"lengths": [4], "warmup": 1, "repeats": 1, "plain_share": 0},
        "plain": {"lengths": [4], "warmup": 1, "repeats": 1, "plain_share": 1},
        "natural": {"lengths": ["natural"], "max_new_tokens": 6, "warmup": 0, "repeats": 1, "plain_share": 0},
    }.items():
        config = load_config(
            {
                "study": "faults",
                "datasets": {"demo": {"root": str(root / "demo"), "sensor": [64, 96]}},
                "models": {"llava": {"adapter": "hf", "input": "frames", "frames_as": "grid", "weights": "dummy:0", "preset": "tiny"}},
                "frames": {"count": 4},
                "timing": timing,
            }
        )
        plan = build_plan(config, root / "cache")
        for shard in plan.shards:
            path = shard.path(root / "cache")
            if not path.exists():
                extract_shard(plan, shard, path, cache=root / "cache")
        plan.write(root / f"{name}.json")
    return root


class Timed:
    """A job's report, its rows and its metadata."""

    def __init__(self, root: Path, output: Path, kind: str = "one", **arguments: Any) -> None:
        plan = Plan.read(root / f"{kind}.json")
        self.report = run_job(plan, next(iter(plan.jobs)), output, cache=root / "cache", device="cpu", threads=1, **arguments)
        self.rows = pl.read_parquet(output).sort("order").to_dicts()
        self.job = read_metadata(output)["job"]

    def text(self, code: Code) -> str:
        return "\n".join(f.text for f in self.report.findings if f.code is code)

    def marked(self, code: Code) -> list[bool]:
        return [code.value in row["codes"] for row in self.rows]


@pytest.fixture
def timed(root: Path, tmp_path: Path) -> Any:
    return lambda kind="one", **arguments: Timed(root, tmp_path / "a.parquet", kind, **arguments)


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace methods of the model that jobs load: `adapted(encode=lambda adapter, inputs: ...)`."""
    load = job_module.load_adapter

    def change(**methods: Any) -> None:
        def changed(*arguments: Any, **keywords: Any) -> Any:
            adapter = load(*arguments, **keywords)
            for name, method in methods.items():
                own = getattr(adapter, name)
                setattr(adapter, name, lambda *a, _method=method, _own=own: _method(_own, *a))
            return adapter

        monkeypatch.setattr(job_module, "load_adapter", changed)

    return change


class Nvml:
    """A scripted GPU under a job that runs on the CPU. Readings come two a run: before and after it."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, **changes: Any) -> None:
        self.reads = 0
        self.pids: tuple[int, ...] = ()
        self.throttled: Any = lambda run: 0
        self.mhz: Any = lambda run: 1980
        self.__dict__.update(changes)

    @property
    def run(self) -> int:
        return (self.reads - 1) // 2

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self.reads += 1
        return int(self.throttled(self.run))

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return int(self.mhz(self.run))

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 40

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 200_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        """200 W, in steps of 1 ms."""
        return int(time.perf_counter() * 1e3) * 200

    def nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> Any:
        return SimpleNamespace(violationTime=0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(**changes: Any) -> Nvml:
        nvml = Nvml(**changes)
        monkeypatch.setattr(sensors, "open_handle", lambda device: (nvml, "handle"))
        return nvml

    return install


def test_a_sound_job_has_no_finding_of_its_own(timed: Any) -> None:
    """What the other tests see is their fault's doing. Neighbours and noise of the test machine apart."""
    result = timed("plain")
    theirs = {Code.WARN_NEIGHBOURS, Code.WARN_LOAD_AVERAGE, Code.WARN_ANCHOR_DRIFT, Code.WARN_DRIFT, Code.WARN_FIRST_SLOW}
    assert not {f.code for f in result.report.findings} - theirs
    assert len(result.rows) == RUNS and not any(result.marked(Code.SUSPECT_CLOCKS))


class Cuda:
    """As much of torch.cuda as the clock calls; its events keep time by a clock of their own, `rate` times as fast."""

    def __init__(self, rate: float = 1.0) -> None:
        self.now = time.perf_counter  # the true one, whatever becomes of the host's
        self.memory = SimpleNamespace(memory_stats_as_nested_dict=lambda index: {"allocated_bytes": {"all": {"peak": 1}}})
        cuda = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing
                self.at = 0.0

            def record(self) -> None:
                self.at = cuda.now()

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3 * rate

        self.Event = Event

    def current_device(self) -> int:
        return 0

    def synchronize(self, index: int) -> None: ...

    def reset_peak_memory_stats(self, index: int) -> None: ...


@pytest.mark.parametrize("fault", ["none", "device runs fast", "host jumps"])
def test_clocks_that_disagree_are_suspect(timed: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(stages, "_cuda_api", lambda: Cuda(2.0 if fault == "device runs fast" else 1.0))
    monkeypatch.setattr(stages, "_SPARE", {})
    init = StageClock.__init__
    monkeypatch.setattr(StageClock, "__init__", lambda self, device="cpu", **k: init(self, "cuda:0", **k))
    if fault == "host jumps":  # by 80 ms in one sample's decode stage: every reading after it is later, so no stage misses it
        tick, jumped = time.perf_counter_ns, []
        monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter_ns=lambda: tick() + 80_000_000 * len(jumped)))
        switch = StageClock.switch

        def jumping(self: StageClock, name: str) -> None:
            switch(self, name)
            if next(count) == 37:  # the null workload's runs, the first call and the warm-up went before
                jumped.append(1)

        count = itertools.count()
        monkeypatch.setattr(StageClock, "switch", jumping)
    result = timed()
    marked = result.marked(Code.SUSPECT_CLOCKS)
    # 5 ms: a busy test machine can stand between the readings of the two clocks, by less
    faulty = [abs(row["total_ms"] - row["total_gpu_ms"]) > 5 for row in result.rows]
    assert sum(faulty) == {"none": 0, "device runs fast": RUNS, "host jumps": 1}[fault]
    for row, bad, said in zip(result.rows, faulty, marked, strict=True):
        if bad:
            assert said and "by the host's clock" in row["reason"] and Code.SUSPECT_CLOCKS.discards


def test_events_are_made_once(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first record of an event creates it on the device: later samples take the events of earlier ones."""
    made = []

    class Counting(Cuda):
        def __init__(self) -> None:
            super().__init__()
            event = self.Event
            self.Event = lambda *, enable_timing: made.append(1) or event(enable_timing=enable_timing)  # type: ignore[misc,assignment]

    cuda = Counting()
    monkeypatch.setattr(stages, "_cuda_api", lambda: cuda)
    monkeypatch.setattr(stages, "_SPARE", {})
    for _ in range(3):
        clock = StageClock("cuda:0")
        with clock.total():
            for stage in stages.STAGES:
                clock.begin(stage)
                if stage == "decode":
                    clock.token()
                clock.end()
        times = clock.times()
        assert clock.times() is times and set(times.gpu_ms) == set(stages.STAGES) and len(times.token_ms) == 1
    assert len(made) == 2 * len(stages.STAGES) + 2 + 1


def test_a_dear_harness_is_said(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = EncoderCounter.enter

    def enter(self: EncoderCounter, stage: str) -> None:
        time.sleep(0.01)
        slow(self, stage)

    monkeypatch.setattr(EncoderCounter, "enter", enter)
    result = timed()
    assert result.job["harness_ms"]["total"] > 20 and all(row["harness_ms"] > 20 for row in result.rows)
    assert "the harness costs" in result.text(Code.WARN_HARNESS)


def test_a_hook_that_costs_time_is_invalid(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = EncoderCounter._called

    def slow(self: EncoderCounter, *_: Any) -> None:
        time.sleep(0.05)
        called(self)

    monkeypatch.setattr(EncoderCounter, "_called", slow)
    result = timed("plain")
    assert "instrumentation moves totals by +" in result.text(Code.INVALID_PLAIN_DIFFERS)
    assert all(result.marked(Code.INVALID_PLAIN_DIFFERS)) and not result.report.valid


class Forked:
    """One token of each plain run is another one."""

    name = "forked"

    def __init__(self) -> None:
        self.inner = engines_create("generate")

    def prepare(self, *arguments: Any) -> Any:
        return self.inner.prepare(*arguments)

    def run(self, merge: Any, decoding: Any, clock: StageClock) -> Any:
        tokens = self.inner.run(merge, decoding, clock)
        other = tuple((*ids[:-1], 7 if ids[-1] != 7 else 8) for ids in tokens.ids)
        return tokens if clock.sync else replace(tokens, ids=other)


engines_create = engines.create


def forked(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """In bfloat16 nine pairs are too few for statistics: the model's own logits tell."""
    if dtype == "bfloat16":
        load = job_module.load_adapter

        def half(config: Any, job: Any, **keywords: Any) -> Any:
            settings = {**job.variant.settings, "dtype": "bfloat16"}
            return load(config, replace(job, variant=replace(job.variant, settings=settings)), **keywords)

        monkeypatch.setattr(job_module, "load_adapter", half)
        monkeypatch.setattr(job_module.validity, "_fisher", lambda *_: 1.0)
    monkeypatch.setattr(job_module.engines, "create", lambda name: Forked())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plain_run_that_says_something_else_is_invalid(timed: Any, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    forked(monkeypatch, dtype)
    result = timed("plain")
    assert result.rows[0]["dtype"] == dtype
    said = result.text(Code.INVALID_PLAIN_DIFFERS)
    assert ("rounding does not explain it" in said) if dtype == "bfloat16" else ("tokens differ in" in said)


class Killed(BaseException):
    pass


def killed_after(samples: int) -> Any:
    def die(done: int, total: int) -> None:
        if done == samples:
            raise Killed

    return die


def test_a_divergence_from_before_a_kill_is_judged(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that parted lies in the journal: the process that writes the file measures nothing."""
    forked(monkeypatch, "bfloat16")
    with pytest.raises(Killed):
        timed("plain", progress=killed_after(RUNS))
    result = timed("plain")
    assert result.report.resumed == RUNS
    assert "rounding does not explain it" in result.text(Code.INVALID_PLAIN_DIFFERS) and all(result.marked(Code.INVALID_PLAIN_DIFFERS))


def test_a_divergence_that_cannot_be_judged_is_said(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward that judges runs out of memory after all is measured: no row is lost, and the first call already says so."""
    forked(monkeypatch, "bfloat16")

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sys.modules["stagebench.session.divergence"], "first_divergence", full)
    result = timed("plain")
    said = result.text(Code.WARN_UNJUDGED)
    assert len(result.rows) == RUNS and "tokens of 8 samples differ" in said and "OutOfMemoryError: CUDA out of memory" in said
    assert not result.text(Code.INVALID_PLAIN_DIFFERS)


def test_an_encoder_called_again_is_invalid(timed: Any, adapted: Any) -> None:
    adapted(encode=lambda encode, inputs: (encode(inputs), encode(inputs))[1])
    result = timed()
    assert all(result.marked(Code.INVALID_ENCODER_CALLS)) and all(row["encoder_calls"] == 2 for row in result.rows)
    assert result.text(Code.INVALID_NO_ACCEPTED)


def test_a_cold_first_sample_names_the_key(timed: Any, adapted: Any) -> None:
    calls = itertools.count()

    def encode(own: Any, inputs: Any) -> Any:
        if next(calls) == 2:  # the first call and one warm-up run went before
            time.sleep(0.4)
        return own(inputs)

    adapted(encode=encode)
    result = timed()
    assert "Raise timing.warmup" in result.text(Code.WARN_FIRST_SLOW)
    assert result.marked(Code.WARN_FIRST_SLOW) == [True] + [False] * (RUNS - 1)


def test_a_machine_that_slows_down_is_a_drift(timed: Any, adapted: Any) -> None:
    calls = itertools.count()

    def encode(own: Any, inputs: Any) -> Any:
        time.sleep(0.02 * next(calls))
        return own(inputs)

    adapted(encode=encode)
    result = timed()
    assert "encode + prefill changes by +" in result.text(Code.WARN_DRIFT) and all(result.marked(Code.WARN_DRIFT))


def test_throttled_runs_are_discarded_and_counted(timed: Any, gpu: Any) -> None:
    gpu(throttled=lambda run: 0x40 if run in (2, 5) else 0)
    result = timed()
    assert [n for n, bad in enumerate(result.marked(Code.DISCARDED_THROTTLED)) if bad] == [2, 5]
    assert "hardware thermal slowdown" in result.rows[2]["reason"]


def test_a_machine_that_only_throttles_is_invalid_and_has_no_nan(timed: Any, gpu: Any) -> None:
    gpu(throttled=lambda run: 0x08)
    result = timed()
    assert all(result.marked(Code.DISCARDED_THROTTLED)) and "none of 9 rows is usable" in result.text(Code.INVALID_NO_ACCEPTED)
    assert not result.report.valid and all(row["total_ms"] == row["total_ms"] for row in result.rows)


def test_a_clock_that_drops_is_discarded(timed: Any, gpu: Any) -> None:
    gpu(mhz=lambda run: 1200 if run == 4 else 1980)
    result = timed()
    assert [n for n, bad in enumerate(result.marked(Code.DISCARDED_CLOCK)) if bad] == [4]


def test_a_clock_that_dropped_before_a_kill_is_discarded(timed: Any, gpu: Any) -> None:
    nvml = gpu(mhz=lambda run: 1200 if run == 2 else 1980)
    with pytest.raises(Killed):
        timed(progress=killed_after(5))
    nvml.mhz = lambda run: 1980
    result = timed()
    assert result.report.resumed == 5
    assert [n for n, bad in enumerate(result.marked(Code.DISCARDED_CLOCK)) if bad] == [2]
    assert result.text(Code.DISCARDED_CLOCK)


def test_a_cold_first_sample_from_before_a_kill_is_said(timed: Any, adapted: Any) -> None:
    calls = itertools.count()

    def encode(own: Any, inputs: Any) -> Any:
        if next(calls) == 2:  # the first call and one warm-up run went before
            time.sleep(0.4)
        return own(inputs)

    adapted(encode=encode)
    with pytest.raises(Killed):
        timed(progress=killed_after(RUNS))
    result = timed()
    assert result.report.resumed == RUNS and result.marked(Code.WARN_FIRST_SLOW) == [True] + [False] * (RUNS - 1)


def test_neighbours_are_named_by_pid(timed: Any, gpu: Any) -> None:
    gpu(pids=(machine.host("cpu")["pid"], 4242))
    result = timed()
    assert "pids 4242" in result.text(Code.WARN_NEIGHBOURS) and all(result.marked(Code.WARN_NEIGHBOURS))


def test_what_a_gpu_does_not_show_is_said(timed: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that hides processes, a driver without throttle reasons: no warning must not mean that nothing was there."""
    gpu(throttled=lambda run: 1 / 0)
    unseen = sensors.Monitor.unseen

    def on_a_gpu(self: Any) -> Any:
        self.device = "cuda:0"
        return unseen(self)

    monkeypatch.setattr(sensors.Monitor, "unseen", on_a_gpu)
    assert "does not show throttle reasons, other processes" in timed().text(Code.WARN_UNSEEN)


def test_a_stage_has_an_energy_only_where_the_counter_can_tell_it(timed: Any, gpu: Any, adapted: Any) -> None:
    """Counter steps of 1 ms: encode lasts 100 of them, h2d none. A coarser counter tells neither."""

    def encode(own: Any, inputs: Any) -> Any:
        time.sleep(0.1)
        return own(inputs)

    adapted(encode=encode)
    nvml = gpu()
    result = timed()
    assert result.job["energy_counter"]["period_ms"] == pytest.approx(1, rel=0.5)
    for row in result.rows:
        assert row["encode_energy_j"] == pytest.approx(200 * row["encode_ms"] * 1e-3, rel=0.1)
        assert row["h2d_energy_j"] is None and row["load_energy_j"] is None
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: int(time.perf_counter() * 1e3 / 40) * 40 * 200  # type: ignore[method-assign]
    coarse = timed()
    assert coarse.job["energy_counter"]["period_ms"] == pytest.approx(40, rel=0.3)
    assert all(row["encode_energy_j"] is None for row in coarse.rows)


def test_the_queries_are_those_of_the_real_library() -> None:
    asked = ("CurrentClocksEventReasons", "CurrentClocksThrottleReasons", "ComputeRunningProcesses", "TotalEnergyConsumption")
    asked += ("ViolationStatus", "ClockInfo", "Temperature", "PowerUsage", "HandleByUUID", "PowerManagementLimit")
    assert [name for name in asked if not hasattr(pynvml, f"nvmlDeviceGet{name}")] == []


def test_a_busy_host_is_said(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (64.0, 64.0, 64.0))
    assert "load average 64.0" in timed().text(Code.WARN_LOAD_AVERAGE)


def test_a_neighbour_on_our_cpu_is_said(timed: Any) -> None:
    """Two processes that never rest share one core with the job: it has a third of the time."""
    if machine.read_waits() is None:
        pytest.skip("this kernel has no schedstat")
    mine = os.sched_getaffinity(0)
    core = min(mine)
    burn = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(2)]
    try:
        os.sched_setaffinity(0, {core})
        found = timed()
    finally:
        os.sched_setaffinity(0, mine)
        for other in others:
            other.kill()
            other.wait()
    assert any(found.marked(Code.WARN_CPU_WAIT))
    assert sum(row["cpu_wait_ms"] for row in found.rows) > 0.3 * sum(row["total_ms"] for row in found.rows)


def test_another_governor_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"scaling_governor": "performance"}
    monkeypatch.setattr(sys.modules["stagebench.machine.fingerprint"], "_sys", sets.get)
    fast = machine.fingerprint("cpu")
    sets["scaling_governor"] = "powersave"
    slow = machine.fingerprint("cpu")
    assert fast["digest"] != slow["digest"] and machine.differences(fast, slow) == ["cpu.governor: 'performance', 'powersave'"]


def test_an_anchor_that_drifts_marks_the_job(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = itertools.count()
    monkeypatch.setattr(machine, "anchor", lambda device: {"matmul_ms": 1.0 + 0.2 * next(slower)})
    result = timed()
    assert "anchor workloads moved by 20.0%" in result.text(Code.WARN_ANCHOR_DRIFT) and all(result.marked(Code.WARN_ANCHOR_DRIFT))


def test_a_resume_on_another_machine_starts_again_and_says_so(
    timed: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        timed(progress=killed_after(3))
    own = machine.fingerprint
    monkeypatch.setattr(machine, "fingerprint", lambda *a: own(*a) | {"digest": "another", "cpu": {"model": "another"}})
    with caplog.at_level(logging.WARNING):
        result = timed()
    assert result.report.resumed == 0 and len(result.rows) == RUNS and not any(result.marked(Code.RESUMED))
    assert "machine changed" in caplog.text and "starts again from its first sample" in caplog.text
    assert list(tmp_path.glob("*.aside"))


def test_ids_past_eos_are_invalid(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    create = engines.create

    class Late:
        name = "late"

        def __init__(self) -> None:
            self.inner = create("generate")

        def prepare(self, *arguments: Any) -> Any:
            return self.inner.prepare(*arguments)

        def run(self, merge: Any, decoding: Any, clock: StageClock) -> Any:
            tokens = self.inner.run(merge, decoding, clock)
            eos = decoding.eos_token_ids[0]
            return replace(tokens, ids=tuple((eos, *ids[1:]) for ids in tokens.ids))

    monkeypatch.setattr(job_module.engines, "create", lambda name: Late())
    result = timed("natural")
    assert all(result.marked(Code.INVALID_TOKEN_COUNT)) and "EOS stands before the end" in result.rows[0]["reason"]
