# ruff: noqa: E501 - source text is quoted as it stands
"""The validity rules of docs/methodology.md, each taken out in a copy of the tree to see its test fail: `make guards`, or
`python tests/reliability/validity_guards.py [<words>] [<part>/<parts>]`. tests/unit/test_methodology.py checks that each text is in the source."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reliability import mutations
from reliability.mutations import SRC, Guard

__all__ = ["VALIDITY"]

TIMES = "tests/unit/faults/test_faults_times.py::"
OUTPUTS = "tests/unit/faults/test_faults_outputs.py::"
MACHINE = "tests/unit/faults/test_faults_machine.py::"
SESSION = "tests/unit/test_session.py::"
MERGE = "tests/unit/test_merge.py::"
REFUSALS = "tests/unit/test_merge_refusals.py::"
AXIS = "tests/unit/test_axis.py::"

VALIDITY = [
    Guard("durations come from the monotonic clock", SRC + "stages.py", "self._total.end_ns = time.perf_counter_ns()", "self._total.end_ns = int(time.time() * 1e9)",
          "tests/unit/test_stages.py::test_the_wall_clock_does_not_matter"),
    Guard("two clocks must agree", SRC + "session/build.py", "codes.append(Code.SUSPECT_CLOCKS)", "pass",
          TIMES + "test_clocks_that_disagree_are_suspect[host jumps]"),
    Guard("gaps are not work", SRC + "session/busy.py", "busy += max(0.0, stop - max(start, last))", "busy = end - begin",
          "tests/unit/test_busy.py::test_gaps_between_kernels_are_not_work"),
    Guard("a dear harness is said", SRC + "session/judge.py", ", *validity.check_harness(measured)]", "]",
          TIMES + "test_a_dear_harness_is_said"),
    Guard("closure", SRC + "session/build.py", "codes.append(Code.SUSPECT_RESIDUAL)", "pass",
          SESSION + "test_time_between_stages_is_a_suspect_residual"),
    Guard("plain against instrumented, time", SRC + "session/judge.py", "*validity.check_plain(measured), ", "",
          OUTPUTS + "test_a_hook_that_costs_time_is_invalid"),
    Guard("a batch is one pair", SRC + "session/validity.py", '(r["job"], r["order"], r["length"], r["repeat"]): r for', '(r["job"], r["order"], r["sample"], r["repeat"]): r for',
          "tests/unit/test_session_rules.py::test_the_rows_of_a_batch_are_one_pair"),
    Guard("plain against instrumented, output", SRC + "session/judge.py", "*validity.check_outputs(measured), ", "",
          OUTPUTS + "test_a_plain_run_that_says_something_else_is_invalid[float32]"),
    Guard("plain against instrumented, below float32", SRC + "session/divergence.py", "found.gap > BEYOND * found.bound", "False",
          OUTPUTS + "test_a_plain_run_that_says_something_else_is_invalid[bfloat16]"),
    Guard("a cold first sample", SRC + "session/judge.py", "*validity.check_first(one), ", "",
          TIMES + "test_a_cold_first_sample_names_the_key"),
    Guard("only noisy samples are repeated", SRC + "session/repeats.py", "return cv(totals_ms) > repeats.target_cv and", "return",
          SESSION + "test_only_noisy_samples_are_repeated"),
    Guard("the order is random", SRC + "session/order.py", "    random.Random(seed).shuffle(there)", "    pass",
          SESSION + "test_order_is_random_seeded_and_independent_of_the_order_given"),
    Guard("drift over the order", SRC + "session/judge.py", ", *validity.check_drift(one)]", "]",
          TIMES + "test_a_machine_that_slows_down_is_a_drift"),
    Guard("throttled runs are discarded", SRC + "session/build.py", "codes.append(Code.DISCARDED_THROTTLED)", "pass",
          MACHINE + "test_throttled_runs_are_discarded_and_counted"),
    Guard("no accepted sample is INVALID", SRC + "session/judge.py", "return found + validity.mark_accepted(outcome.rows)", "return found",
          MACHINE + "test_a_machine_that_only_throttles_is_invalid_and_has_no_nan"),
    Guard("clocks that drop", SRC + "session/judge.py", "list(validity.check_clocks(measured))", "[]",
          MACHINE + "test_a_clock_that_drops_is_discarded"),
    Guard("clocks from before a kill", SRC + "session/judge.py", "validity.check_clocks(measured)", "validity.check_clocks(outcome.fresh)",
          MACHINE + "test_a_clock_that_dropped_before_a_kill_is_discarded"),
    Guard("divergences from before a kill", SRC + "session/job.py", "rows = measured_rows(measured.outcome)", "rows = measured.outcome.fresh",
          OUTPUTS + "test_a_divergence_from_before_a_kill_is_judged"),
    Guard("neighbours by pid", SRC + "session/judge.py", "pids = monitor.neighbours()", "pids = ()",
          MACHINE + "test_neighbours_are_named_by_pid"),
    Guard("neighbours that have left", SRC + "machine/monitor.py", "if now - self._looked >= _LOOK_EVERY_S:", "if False:",
          MACHINE + "test_a_neighbour_that_left_before_the_end_is_named"),
    Guard("a proof has a GPU of its own", SRC + "verify.py", "with machine.pick_device(device) as lease:", "with machine.Lease(device or 'cpu') as lease:",
          "tests/unit/test_variants.py::test_a_proof_holds_its_device_as_a_timing_job_does"),
    Guard("what is not shown is said", SRC + "session/judge.py", "unseen = monitor.unseen()", "unseen = ()",
          MACHINE + "test_what_a_gpu_does_not_show_is_said"),
    Guard("a stage's energy needs a fine counter", SRC + "machine/energy.py", "ENERGY_PERIODS = 20", "ENERGY_PERIODS = 0",
          MACHINE + "test_a_stage_has_an_energy_only_where_the_counter_can_tell_it"),
    Guard("waiting for a CPU is said", SRC + "session/build.py", "codes.append(Code.WARN_CPU_WAIT)", "pass",
          MACHINE + "test_a_neighbour_on_our_cpu_is_said"),
    Guard("own threads are no neighbours", SRC + "machine/waiting.py", "min(longest, left)", "longest",
          "tests/unit/test_waiting.py::test_our_own_threads_are_no_neighbours"),
    Guard("times that waited have no clear word", SRC + "stats/waiting.py", "return share is not None and share > DISTURBED_SHARE", "return False",
          MERGE + "test_times_that_waited_for_a_cpu_have_no_clear_word"),
    Guard("load average", SRC + "session/judge.py", "load > LOAD_SHARE * max(cores, 1)", "False",
          MACHINE + "test_a_busy_host_is_said"),
    Guard("the governor is part of the machine", SRC + "machine/fingerprint.py", '"governor": _sys("scaling_governor")', '"governor": None',
          MACHINE + "test_another_governor_is_another_machine"),
    Guard("anchors of one job", SRC + "session/judge.py", "    if drift > bound:", "    if False:",
          TIMES + "test_an_anchor_that_drifts_marks_the_job"),
    Guard("anchors of pooled jobs", SRC + "merge/gather.py", "low > 0 and high / low - 1 > bound", "False",
          REFUSALS + "test_refuses_gpu_jobs_whose_anchors_differ"),
    Guard("a resume needs the same machine", SRC + "session/job.py", '"machine": here["digest"], ', "",
          MACHINE + "test_a_resume_on_another_machine_starts_again_and_says_so"),
    Guard("studies are not pooled", SRC + "merge/gather.py", "        _refuse(file, str(known.path), difference(known.study, file.study))\n", "",
          REFUSALS + "test_refuses_differing_study_fingerprints_and_shows_the_difference"),
    Guard("machines are kept apart", SRC + "merge/gather.py", 'pl.lit(file.machine_label).alias("machine")', 'pl.lit("one").alias("machine")',
          REFUSALS + "test_keeps_machines_apart"),
    Guard("live files are those that were planned", SRC + "loading.py", "            self._check_originals()\n", "            pass\n",
          "tests/unit/test_loading.py::test_a_live_source_that_changed_since_the_planning_is_refused"),
    Guard("ids end at EOS", SRC + "session/build.py", 'return "EOS stands before the end"', "return None",
          OUTPUTS + "test_ids_past_eos_are_invalid"),
    Guard("the encoder is counted", SRC + "session/build.py", "codes.append(Code.INVALID_ENCODER_CALLS)", "pass",
          OUTPUTS + "test_an_encoder_called_again_is_invalid"),
    Guard("capped texts are a pool of their own", SRC + "merge/gather.py", '(pl.col("length") != "natural")', "pl.lit(True)",
          MERGE + "test_capped_runs_stay_out_of_natural_figures"),
    Guard("pace is a step's, not a token's", SRC + "merge/gather.py", 'pl.col("decode_ms") / pl.col("steps")', 'pl.col("decode_ms") / (pl.col("steps") + 1)',
          MERGE + "test_unequal_answers_do_not_leak_into_pace"),
    Guard("durations are paired by sequence", SRC + "merge/axis.py", "_MIN_SEQUENCES = 2", "_MIN_SEQUENCES = 99",
          AXIS + "test_durations_are_paired_by_sequence_and_have_a_slope"),
    Guard("the threshold needs the whole interval", SRC + "compare.py", 'r["low"] > 1 + threshold', 'r["ratio"] > 1 + threshold',
          "tests/unit/test_compare.py::test_exit_code_needs_the_whole_interval"),
]  # fmt: skip


def main() -> int:
    mutations.GUARDS[:] = VALIDITY
    return mutations.main()


if __name__ == "__main__":
    sys.exit(main())
