"""The rules of a timing job by themselves: order, repeats, validity over rows, reuse, output."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagebench.config import RepeatsConfig
from stagebench.errors import TimingError
from stagebench.models.base import Decoding
from stagebench.rows import SCHEMA, Code
from stagebench.session import validity
from stagebench.session.build import Limits, token_faults
from stagebench.session.null import harness_ms
from stagebench.session.order import Task, groups, is_plain, sampling_seed
from stagebench.session.output import read_metadata, write_rows
from stagebench.session.repeats import go_on, unmet
from stagebench.session.reuse import earlier_rows

DECODING = Decoding(max_new_tokens=5, eos_token_ids=(2,))


def task(n, **changes):
    return Task(f"s{n}", f"c{n}", "seq", f"id{n}", "q", f"d{n}", **changes)


def row(order, **values):
    base = dict.fromkeys(SCHEMA.names) | {"sample": f"s{order}", "order": order, "repeat": 0, "length": "8", "status": "ok", "codes": []}
    times = {"encode_ms": 10.0, "prefill_ms": 30.0, "decode_ms": 70.0, "total_ms": 120.0, "new_tokens": 8, "steps": 7}
    return base | times | {"clip": f"c{order}", "clip_digest": f"d{order}", "query": "q", "codes": []} | values


def noisy(n, seed=0, scale=0.01):
    return 1 + np.random.default_rng(seed).normal(0, scale, n)


class TestOrder:
    @given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 5))
    def test_every_sample_once_and_every_batch_full(self, count, batch, seed):
        found = groups([task(n) for n in range(count)], seed=seed, batch=batch)
        assert sorted(t.sample for g in found for t in g.tasks) == sorted(f"s{n}" for n in range(count))
        assert all(len(g.all) == batch for g in found)
        assert [g.order for g in found] == list(range(len(found)))

    def test_skipped_samples_do_not_move_the_others(self):
        there = [task(n) for n in range(10)]
        with_skipped = [*there, task(99, skip="no pixels")]
        assert groups(there, seed=3, batch=1) == groups(with_skipped, seed=3, batch=1)

    @given(st.floats(0.01, 1), st.integers(1, 300))
    def test_the_plain_share_is_met(self, share, count):
        chosen = [n for n in range(count) if is_plain(n, share)]
        assert chosen[0] == 0 and abs(len(chosen) - share * count) <= 1.01

    def test_no_share_means_none(self):
        assert not any(is_plain(n, 0) for n in range(100))

    def test_samples_draw_differently_and_repeatably(self):
        assert sampling_seed(0, "a") == sampling_seed(0, "a") != sampling_seed(0, "b")
        assert sampling_seed(1, "a") != sampling_seed(0, "a")


class TestRepeats:
    FIXED = RepeatsConfig(min=3, max=3)
    ADAPTIVE = RepeatsConfig(min=3, max=20, target_cv=0.01, timeout_s=10)

    def test_a_fixed_number_is_kept(self):
        assert [go_on([1.0] * n, 0, self.FIXED) for n in range(5)] == [True, True, True, False, False]
        assert unmet([1.0, 5.0, 9.0], 0, self.FIXED) is None

    def test_steady_samples_stop_at_the_minimum(self):
        assert not go_on([10.0, 10.001, 10.0], 0, self.ADAPTIVE)
        assert unmet([10.0, 10.001, 10.0], 0, self.ADAPTIVE) is None

    def test_noisy_samples_go_on_to_the_maximum_and_say_so(self):
        values = [1.0, 30.0, 2.0, 60.0, 3.0, 150.0]
        assert go_on(values, 0, self.ADAPTIVE)
        capped = self.ADAPTIVE.model_copy(update={"max": 6})
        assert not go_on(values, 0, capped)
        assert "maximum of 6 runs" in unmet(values, 0, capped)

    def test_time_runs_out(self):
        assert not go_on([10.0, 20.0, 5.0], 11, self.ADAPTIVE)
        assert "timeout of 10 s" in unmet([10.0, 20.0, 5.0], 11, self.ADAPTIVE)

    def test_noise_that_has_settled_ends_it(self):
        values = [10.0, 12.0] * 9
        assert not go_on(values, 0, self.ADAPTIVE)
        assert "stabilised" in unmet(values, 0, self.ADAPTIVE)


class TestTokens:
    @pytest.mark.parametrize(
        ("ids", "finish", "length", "fault"),
        [
            ((5, 6, 2), "eos", "natural", None),
            ((5, 6, 7, 8, 9), "length", "natural", None),
            ((5, 6, 7, 8, 9), "length", "5", None),
            ((5, 2, 7), "length", "natural", "before the end"),
            ((5, 6, 7), "length", "natural", "without EOS"),
            ((5, 6, 7, 8), "length", "5", "4 tokens, 5 asked for"),
            ((5, 6, 7), "eos", "natural", "no EOS"),
            ((5, 6, 2), "length", "natural", "an EOS"),
            ((), "length", "natural", "0 tokens"),
            ((5,) * 6, "length", "natural", "6 tokens"),
        ],
    )
    def test_rules(self, ids, finish, length, fault):
        found = token_faults(ids, finish, length, DECODING)
        assert found is None if fault is None else fault in found


class TestJobChecks:
    def test_slow_instrumentation_is_invalid(self):
        """20 ms of 120 that only the instrumented run takes."""
        rows = [row(n, total_ms=140 * f, plain_total_ms=120 * g) for n, (f, g) in enumerate(zip(noisy(12), noisy(12, 1), strict=True))]
        assert [f.code for f in validity.check_plain(rows)] == [Code.INVALID_PLAIN_DIFFERS]

    def test_noise_alone_is_not(self):
        for seed in range(50):
            pairs = zip(noisy(12, seed, 0.05), noisy(12, seed + 1000, 0.05), strict=True)
            assert not validity.check_plain([row(n, total_ms=120 * f, plain_total_ms=120 * g) for n, (f, g) in enumerate(pairs)])

    def outputs(self, changed, dtype="bfloat16", samples=3, repeats=4):
        """Rows whose instrumented outputs vary by chance, and whose plain ones do too or, `changed`, always differ."""
        rng = np.random.default_rng(0)

        def draw():
            return [1, int(rng.random() < 0.3)]

        for sample in range(samples):
            for repeat in range(repeats):
                ids = draw()
                yield row(
                    sample, repeat=repeat, dtype=dtype, token_ids=ids, plain_token_ids=[9, 9] if changed else draw(),
                    feature_hash="f", plain_feature_hash="f",
                )  # fmt: skip

    def test_tokens_that_vary_from_run_to_run_are_no_fault_of_instrumentation(self):
        assert validity.check_outputs(list(self.outputs(changed=False))) == []

    def test_tokens_that_always_change_with_instrumentation_are(self):
        found = validity.check_outputs(list(self.outputs(changed=True)))
        assert found[0].code is Code.INVALID_PLAIN_DIFFERS and "48 of 48" in found[0].text

    def test_in_float32_one_other_token_is_enough(self):
        rows = [row(0, dtype="float32", token_ids=[1, 2], plain_token_ids=[1, 3], feature_hash="f", plain_feature_hash="f")]
        assert "tokens" in validity.check_outputs(rows)[0].text
        assert validity.check_outputs([rows[0] | {"plain_token_ids": [1, 2]}]) == []

    def test_features_that_repeat_must_repeat_without_instrumentation(self):
        rows = [row(0, dtype="bfloat16", repeat=n, feature_hash="f", plain_feature_hash="g") for n in range(2)]
        assert "features" in validity.check_outputs(rows)[0].text

    def test_a_slow_first_sample_names_the_key(self):
        rows = [row(n, encode_ms=10 * f) for n, f in enumerate(noisy(10))]
        assert validity.check_first(rows) == []
        rows[0]["encode_ms"] = 60.0
        found = validity.check_first(rows)
        assert found[0].code is Code.WARN_FIRST_SLOW and "timing.warmup" in found[0].text
        assert rows[0]["codes"] == ["warn_first_slow"] and rows[1]["codes"] == []

    def test_drift_over_the_order(self):
        rows = [row(n, decode_ms=70 * f * (1 + 0.01 * n)) for n, f in enumerate(noisy(30))]
        found = validity.check_drift(rows)
        assert found[0].code is Code.WARN_DRIFT and "ms per token" in found[0].text

    def test_answers_that_grow_longer_are_no_drift(self):
        rows = [row(n, new_tokens=8 + n, steps=7 + n, decode_ms=10.0 * (7 + n) * f) for n, f in enumerate(noisy(30))]
        assert validity.check_drift(rows) == []

    def test_answers_that_fill_a_batch_unequally_are_no_drift(self):
        """Each batch takes 40 steps of one pace; only the rows' own answers grow."""
        rows = [row(n, new_tokens=8 + n, steps=40, decode_ms=400.0 * f) for n, f in enumerate(noisy(30))]
        assert validity.check_drift(rows) == []
        rows[0] |= {"new_tokens": 2}
        assert validity.check_first(rows) == []

    def test_drift_is_rarely_seen_in_noise(self):
        seen = sum(
            bool(validity.check_drift([row(n, encode_ms=10 * f) for n, f in enumerate(noisy(20, seed, 0.1))])) for seed in range(200)
        )
        assert seen <= 2

    def test_low_clocks_are_discarded(self):
        rows = [row(n, sm_clock_mhz=1980.0) for n in range(6)]
        assert validity.check_clocks(rows) == []
        rows[4]["sm_clock_mhz"] = 1200.0
        assert validity.check_clocks(rows)[0].code is Code.DISCARDED_CLOCK
        assert rows[4]["codes"] == ["discarded_clock"] and "1200 MHz" in rows[4]["reason"]
        assert not validity.accepted(rows[4]) and validity.accepted(rows[0])

    def test_no_accepted_row_is_invalid_with_the_first_reason(self):
        bad = [row(n, status="error", reason="CorruptClipError: bad bytes") for n in range(3)]
        found = validity.mark_accepted(bad)
        assert found[0].code is Code.INVALID_NO_ACCEPTED and "bad bytes" in found[0].text
        throttled = [row(n, codes=["discarded_throttled"]) for n in range(3)]
        assert validity.mark_accepted(throttled)[0].code is Code.INVALID_NO_ACCEPTED
        assert validity.mark_accepted([*bad, row(9)]) == []


class TestReuse:
    STUDY, MACHINE = {"study": "s"}, {"cpu": "c"}

    def write(self, tmp_path, rows, name="old.parquet", **metadata):
        write_rows(tmp_path / name, rows, {"job": {}, "study": self.STUDY, "machine": self.MACHINE} | metadata)

    def find(self, tmp_path, tasks=None, lengths=("8",)):
        tasks = tasks or [task(n) for n in range(3)]
        return earlier_rows(tmp_path / "new.parquet", tasks, lengths, study=self.STUDY, machine=self.MACHINE, block="new")

    def test_unchanged_samples_are_taken_over_and_say_from_which_job(self, tmp_path):
        self.write(tmp_path, [row(0, job="old@1", block="old"), row(1, job="old@1")])
        found = self.find(tmp_path)
        assert set(found) == {"s0", "s1"}
        assert found["s0"][0]["job"] == "old@1" and found["s0"][0]["block"] == "new" and "reused" in found["s0"][0]["codes"]

    @pytest.mark.parametrize(
        "change",
        [{"clip_digest": "other"}, {"query": "another?"}, {"status": "error"}, {"codes": ["discarded_throttled"]}, {"length": "9"}],
    )
    def test_what_changed_or_failed_is_measured_again(self, tmp_path, change):
        self.write(tmp_path, [row(0, **change), row(1)])
        assert set(self.find(tmp_path)) == {"s1"}

    def test_every_length_must_be_there(self, tmp_path):
        self.write(tmp_path, [row(0)])
        assert self.find(tmp_path, lengths=("natural", "8")) == {}

    @pytest.mark.parametrize("part", ["study", "machine"])
    def test_another_fingerprint_is_never_taken(self, tmp_path, part):
        self.write(tmp_path, [row(0)], **{part: {"another": 1}})
        assert self.find(tmp_path) == {}

    def test_a_broken_file_is_passed_over(self, tmp_path):
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
        self.write(tmp_path, [row(0)])
        assert set(self.find(tmp_path)) == {"s0"}

    def test_samples_without_a_digest_or_without_pixels_are_not_looked_for(self, tmp_path):
        self.write(tmp_path, [row(0), row(1)])
        assert self.find(tmp_path, [replace(task(0), clip_digest=None), task(1, skip="no pixels")]) == {}


class TestOutput:
    META = {"job": {"a": 1}, "study": {}, "machine": {}}  # noqa: RUF012

    def test_round_trip(self, tmp_path):
        path = tmp_path / "deep" / "a.parquet"
        write_rows(path, [row(0, token_ids=[1, 2], token_ms=[0.5])], self.META)
        table = pq.read_table(path, page_checksum_verification=True)
        assert table.schema.equals(SCHEMA, check_metadata=False)
        assert table.column("token_ids").to_pylist() == [[1, 2]]
        assert read_metadata(path) == self.META
        assert [p.name for p in path.parent.iterdir()] == ["a.parquet"]

    def test_a_full_disk_leaves_nothing_under_the_name(self, tmp_path, monkeypatch):
        def full(fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("stagebench.files.os.fsync", full)
        with pytest.raises(TimingError, match=r"No space left.*journal"):
            write_rows(tmp_path / "a.parquet", [row(0)], self.META)
        assert list(tmp_path.iterdir()) == []


def test_the_limit_counts_the_context_at_its_mean():
    limits = Limits(step_bytes=900, bandwidth=1000.0)
    # 10 positions of 10 bytes at the end, 8 of them the prompt: 9 at the mean
    assert limits.limit_ms(kv_bytes=100, prompt_length=8, steps=2) == pytest.approx((900 + 90) / 1000 * 1e3)


def test_the_harness_costs_little():
    """Target: under 20 us a stage. Least of three, for the test machine is shared."""
    cost = min((harness_ms("cpu", runs=15) for _ in range(3)), key=lambda c: c["total"])
    assert all(cost[stage] < 0.1 for stage in cost if stage != "total") and cost["total"] < 0.3


def test_the_rows_of_a_batch_are_one_pair():
    """One run that was 3 % slower by chance: eight rows of it show no more than one."""
    rows = [row(0, sample=f"s{n}", total_ms=824.0, plain_total_ms=800.0) for n in range(8)]
    assert not validity.check_plain(rows)
    slow = [row(order, sample=f"s{order}/{n}", total_ms=824.0, plain_total_ms=800.0) for order in range(3) for n in range(8)]
    assert "in 3 pairs" in validity.check_plain(slow)[0].text
