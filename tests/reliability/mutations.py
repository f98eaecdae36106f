# ruff: noqa: E501 - source text is quoted as it stands
"""Take each guard out, in a copy of the tree, and see its test fail: `make guards`, or `python tests/reliability/mutations.py [<words>] [<part>/<parts>]`.

A guard is a piece of source (file, text) and what stands there when it is gone. A test that still passes then guards nothing; nor does
one that fails with the guard in its place, which is looked at first.
docs/reliability.md shows the outcome. test_guards.py checks that each text is still in the source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["GUARDS", "Guard"]

REPO = Path(__file__).resolve().parents[2]
SRC = "src/stagebench/"


class Guard(NamedTuple):
    what: str
    file: str
    text: str
    gone: str
    test: str


GUARDS = [
    Guard("shard is written under a temporary name", SRC + "store/_writer.py",
          'self._temp = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")', "self._temp = self.path",
          "tests/reliability/test_kills.py::test_extraction_killed_at_20_random_moments"),
    Guard("litter of killed writers is swept", SRC + "store/_writer.py", "            self._sweep()\n", "",
          "tests/reliability/test_kills.py::test_extraction_killed_at_20_random_moments"),
    Guard("what a killed Snakemake left is made again", "profiles/default/profile.yaml", "rerun-incomplete: true", "rerun-incomplete: false",
          "tests/reliability/test_kills.py::test_snakemake_killed_and_interrupted"),
    Guard("finished samples are journaled", SRC + "session/core.py", "journal.append(group.key, rows)", "pass",
          "tests/unit/test_session.py::test_resume_measures_the_rest_only"),
    Guard("a resumed job says so", SRC + "session/judge.py", "    Code.RESUMED,\n", "",
          "tests/unit/test_session_job.py::test_a_killed_job_goes_on_and_says_so"),
    Guard("torn journal lines are cut off", SRC + "session/journal.py", "os.ftruncate(self._fd, whole)", "pass",
          "tests/unit/test_journal.py::test_cut_anywhere_only_the_torn_line_is_lost"),
    Guard("full disk in a shard", SRC + "store/_writer.py", "error.errno in (errno.ENOSPC, errno.EDQUOT)", "False",
          "tests/reliability/test_disk.py::test_each_writer[shard]"),
    Guard("full disk in a journal", SRC + "session/journal.py", "            os.ftruncate(self._fd, start)\n", "",
          "tests/reliability/test_disk.py::test_a_full_disk_keeps_whole_journal_lines"),
    Guard("full disk in a timing file", SRC + "files.py", "except OSError as reason", "except ZeroDivisionError as reason",
          "tests/reliability/test_disk.py::test_each_writer[rows]"),
    Guard("full disk in a merge", SRC + "files.py", "except OSError as reason", "except ZeroDivisionError as reason",
          "tests/reliability/test_disk.py::test_each_writer[merged]"),
    Guard("full disk in a plan", SRC + "files.py", "except OSError as reason", "except ZeroDivisionError as reason",
          "tests/reliability/test_disk.py::test_a_plan"),
    Guard("the shard's footer is sealed", SRC + "store/_seal.py", "if _seal(tail, found) != tail[found : found + 64]:", "if False:",
          "tests/unit/test_store_damage.py::test_every_one_of_400_flipped_bits_is_found"),
    Guard("page checksums of pixels are checked", SRC + "store/_reader.py",
          "_seal.check_payloads(self._fd, [c for c in chunks if c.bulk and c.row in wanted], self.clips, self.path, threads)", "pass",
          "tests/unit/test_store_damage.py::test_every_one_of_400_flipped_bits_is_found"),
    Guard("a shard's columns are of the format's types", SRC + "store/_contents.py", "if not found.equals(expected):", "if False:",
          "tests/unit/test_store_damage.py::test_wrong_shape_or_type_is_refused_expected_against_found"),
    Guard("a clip's page holds what its row says", SRC + "store/_contents.py",
          "if len(pages) != 1 or pages[0].num_values != 1 or not pages[0].plain or any(found != expected for found in sizes):", "if False:",
          "tests/unit/test_store_damage.py::test_wrong_shape_or_type_is_refused_expected_against_found"),
    Guard("pyarrow is not asked about single columns", SRC + "store/_contents.py", "    metadata = parquet.metadata\n",
          "    metadata = parquet.metadata\n"
          "    [metadata.row_group(r).column(c) for r in range(metadata.num_row_groups) for c in range(3)]\n",
          "tests/reliability/test_forged.py::test_forged_footers_are_refused_and_end_no_process"),
    Guard("a footer's columns lie inside the file", SRC + "store/_footer.py", "if not 4 <= begin <= begin + size <= body:", "if False:",
          "tests/reliability/test_forged.py::test_forged_footers_are_refused_and_end_no_process"),
    Guard("a footer names no other file", SRC + "store/_footer.py", ", refused=(1, 8, 9))", ")",
          "tests/reliability/test_forged.py::test_forged_footers_are_refused_and_end_no_process"),
    Guard("a footer is nested no deeper than Parquet's", SRC + "store/_compact.py", "if depth > _MAX_DEPTH:", "if False:",
          "tests/reliability/test_forged.py::test_forged_footers_are_refused_and_end_no_process"),
    Guard("row groups are the schema's columns", SRC + "store/_contents.py",
          "if [(c.row, c.name) for c in columns] != [(row, name) for row in range(len(digests)) for name in expected.names]:", "if False:",
          "tests/reliability/test_forged.py::test_forged_footers_are_refused_and_end_no_process"),
    Guard("a shard has a row for each clip", SRC + "store/_contents.py", "if len(table) != len(digests):", "if False:",
          "tests/reliability/test_forged.py::test_a_shard_of_fewer_rows_than_it_names"),
    Guard("a row claims frames that fit", SRC + "store/_contents.py", "if not 0 <= count <= _MAX_FRAMES:", "if False:",
          "tests/reliability/test_forged.py::test_a_row_that_claims_more_frames_than_fit_in_memory"),
    Guard("a shard's text is text", SRC + "store/_contents.py", "except (OSError, pa.ArrowException, UnicodeDecodeError) as error:",
          "except (OSError, pa.ArrowException) as error:", "tests/reliability/test_forged.py::test_a_text_of_a_shard_that_is_no_text"),
    Guard("timing rows are checked whole", SRC + "merge/gather.py", "        table.validate(full=True)  # polars takes offsets and UTF-8 on trust\n", "",
          "tests/reliability/test_forged.py::test_rows_with_text_that_is_no_text"),
    Guard("timing rows are taken under our schema", SRC + "merge/gather.py", "        table = pa.Table.from_arrays(table.columns, schema=SCHEMA)\n", "",
          "tests/reliability/test_forged.py::test_rows_with_metadata_that_is_no_text"),
    Guard("merged rows of strangers are checked whole", SRC + "compare.py", "        table.validate(full=True)  # polars takes offsets and UTF-8 on trust\n", "",
          "tests/reliability/test_forged.py::test_a_strangers_merged_rows"),
    Guard("merged rows of strangers are taken under our schema", SRC + "compare.py", "table = table.select(known.names).cast(known)", "table = table.select(known.names)",
          "tests/reliability/test_forged.py::test_a_strangers_merged_rows"),
    Guard("damaged frames are refused", SRC + "sources/_pixels.py", "if frame.is_corrupt:", "if False:",
          "tests/unit/test_video_refused.py"),
    Guard("caps on what a video decodes to", SRC + "sources/_request.py",
          "if frames * width * height > self.limits.clip_pixels:", "if False:",
          "tests/unit/test_video_refused.py::test_limits_are_kept_before_a_frame_is_decoded"),
    Guard("cap on a frame's size", SRC + "sources/_request.py", "if width * height > self.limits.frame_pixels:", "if False:",
          "tests/unit/test_video_refused.py::test_limits_are_kept_before_a_frame_is_decoded"),
    Guard("rotation is applied", SRC + "sources/_pixels.py",
          "turns = [graph.add(name, args or None) for name, args in _ORIENTATIONS[properties.orientation]]", "turns: list[FilterContext] = []",
          "tests/unit/test_video.py::test_rotation_policies"),
    Guard("rotation is refused where it is to be", SRC + "sources/_pixels.py", 'if self._request.rotation == "refuse":', "if False:",
          "tests/unit/test_video.py::test_rotation_policies"),
    Guard("odd angles are refused", SRC + "sources/_pixels.py", "if not right_angle:", "if False:",
          "tests/unit/test_video_refused.py::test_bad_files_are_refused_with_the_reason"),
    Guard("a change of size is refused", SRC + "sources/_pixels.py", "elif size != self._size:", "elif False:",
          "tests/unit/test_video_refused.py::test_bad_files_are_refused_with_the_reason"),
    Guard("too many failed clips fail the shard", SRC + "extract.py", "if len(failed) > allowed:", "if False:",
          "tests/unit/test_extract.py::test_too_many_failures_fail_the_job_and_leave_nothing"),
    Guard("a declared length is held against the file's size", SRC + "sources/safe_npy.py", "if expected != held:", "if False:",
          "tests/unit/test_safe_npy.py::test_attack_is_refused"),
    Guard("numpy arrays of objects are refused", SRC + "sources/safe_npy.py", "if not _PLAIN.fullmatch(descr):", "if False:",
          "tests/unit/test_safe_npy.py::test_attack_is_refused"),
    Guard("cap on the index", SRC + "dataset/index.py", "if info.st_size > limit:", "if False:",
          "tests/unit/test_dataset.py::test_index_too_large_is_not_read"),
    Guard("deep nesting in the index", SRC + "dataset/index.py", "except RecursionError:", "except ZeroDivisionError:",
          "tests/unit/test_dataset.py::test_text_attacks"),
    Guard("`..` in the index", SRC + "dataset/guard.py", 'if ".." in parts:', "if False:", "tests/unit/test_dataset.py::test_path_attacks"),
    Guard("links out of the root", SRC + "dataset/guard.py", 'if real != base and not real.startswith(base.rstrip("/") + "/"):', "if False:",
          "tests/unit/test_dataset.py::test_link_out_of_the_root"),
    Guard("duplicate keys in the index", SRC + "dataset/index.py", "if len(result) != len(pairs):", "if False:",
          "tests/unit/test_dataset.py::test_text_attacks"),
    Guard("deep JSON in a plan", SRC + "plan/file.py", "    except (ValueError, RecursionError) as error:\n        raise PlanError(f\"{path}: not JSON",
          "    except ValueError as error:\n        raise PlanError(f\"{path}: not JSON",
          "tests/reliability/test_hostile_files.py::test_json_attacks"),
    Guard("deep JSON in a checkpoint", SRC + "models/_text.py", "except (OSError, ValueError, RecursionError) as error:",
          "except (OSError, ValueError) as error:", "tests/reliability/test_hostile_files.py::test_json_attacks"),
    Guard("deep JSON in a timing file", SRC + "merge/gather.py", "except (KeyError, ValueError, RecursionError) as error:",
          "except (KeyError, ValueError) as error:", "tests/reliability/test_hostile_files.py::test_a_timing_file_with_deep_metadata"),
    Guard("files have a size bound", SRC + "files.py", "if len(data) > limit:", "if False:",
          "tests/reliability/test_hostile_files.py::test_a_gibibyte_is_refused_before_it_is_read"),
    Guard("no more than the bound is read", SRC + "files.py", "data = file.read(limit + 1)", "data = file.read()",
          "tests/reliability/test_hostile_files.py::test_a_gibibyte_is_refused_before_it_is_read"),
    Guard("what PyYAML fails at is an error of ours", SRC + "config.py", "        except Exception as error:  # PyYAML", "        except (OSError, yaml.YAMLError) as error:  # PyYAML",
          "tests/reliability/test_hostile_files.py::test_yaml_attacks"),
    Guard("what was found is shown in short", SRC + "_config_words.py", "reprlib.repr(found)", "repr(found)[:10**9]",
          "tests/reliability/test_hostile_files.py::test_yaml_attacks"),
    Guard("settings are finite", SRC + "config.py", "allow_inf_nan=False", "allow_inf_nan=True",
          "tests/reliability/test_hostile_files.py::test_settings_are_finite"),
    Guard("auto_map is refused", SRC + "models/_weights.py", 'if "auto_map" in read_json(path):', "if False:",
          "tests/unit/test_models_weights.py::test_auto_map_is_refused"),
    Guard("trust_remote_code stays off", SRC + "models/_weights.py", "trust_remote_code=False", "trust_remote_code=True",
          "tests/reliability/test_code_execution.py::test_switches_that_allow_code"),
    Guard("a missing or misshapen weight is refused", SRC + "models/_weights.py",
          'for key in ("missing_keys", "mismatched_keys")}', "for key in ()}", "tests/unit/test_models_weights.py::test_a_missing_weight_is_refused"),
    Guard("out of memory is a row", SRC + "session/run.py", "        status, reason = Status.OOM, _one_line(error)\n    except Exception",
          "        raise\n    except Exception", "tests/unit/test_session.py::test_oom_is_a_row_and_the_job_goes_on"),
    Guard("NaN logits are a status", SRC + "session/run.py", "status, reason = Status.NAN,", "reason =",
          "tests/unit/test_session.py::test_nan_logits_are_a_status_and_json_safe"),
    Guard("a lost device ends the job, the sample is tried twice", SRC + "session/run.py", "elif _device_lost(error):", "elif False:",
          "tests/unit/test_session.py::test_a_lost_device_ends_the_job_twice_then_the_sample_is_a_row"),
    Guard("the results folder is locked", SRC + "_ownership.py", "fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
          "tests/reliability/test_results_folder.py::test_many_at_once_one_wins"),
    Guard("`stagebench run` takes the lock", SRC + "standalone.py", "with owned(results):", "if True:",
          "tests/reliability/test_results_folder.py::test_a_second_run_stops_with_the_owners_name"),
    Guard("Snakemake takes the lock", "rules/plan.smk", "workflow.results_owner = Ownership(PLAN_FILE.parent)", "pass",
          "tests/reliability/test_results_folder.py::test_snakemake_stops_too"),
    Guard("a job's journal is locked", SRC + "session/journal.py", "fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
          "tests/unit/test_journal.py::test_a_second_process_is_refused_with_the_owners_pid"),
    Guard("durations come from the monotonic clock", SRC + "stages.py", "self._total.begin_ns = time.perf_counter_ns()",
          "self._total.begin_ns = time.time_ns()", "tests/reliability/test_code_execution.py::test_durations_come_from_no_wall_clock"),
    Guard("stale rows are refused by the merge", SRC + "merge/gather.py", "    _check_planned(plan, opened)\n", "",
          "tests/reliability/test_results_folder.py::test_stale_results_are_redone_or_refused"),
    Guard("results without records are merged again", "rules/merge.smk", 'basis=f"<results>/{PLAN.basis}"', "basis=[]",
          "tests/workflow/test_reruns.py::test_results_without_records_are_merged_again_for_another_plan_and_refused"),
    Guard("failed jobs are not taken for done", "rules/merge.smk", 'basis=f"<results>/{PLAN.basis}"', "basis=[]",
          "tests/workflow/test_reruns.py::test_jobs_that_all_failed_run_again"),
    Guard("a failed merge is tried again whatever is asked for", SRC + "plan/study.py", 'there and (results / "summary.json").exists()',
          "there", "tests/workflow/test_reruns.py::test_a_report_alone_is_asked_for_again_after_a_merge_that_failed"),
    Guard("another checkout's merge is seen", SRC + "plan/study.py", '"written": secrets.token_hex(8)', '"written": ""',
          "tests/workflow/test_reruns.py::test_what_another_checkout_merged_otherwise_is_merged_again"),
    Guard("a merge is of one plan", "scripts/merge.py", "plan.take_basis(results, Path(snakemake.input.basis).name)", "pass",
          "tests/workflow/test_reruns.py::test_a_plan_that_was_looked_at_during_a_merge_is_not_taken_for_merged"),
    Guard("a job is done by the plan that it was made with", SRC + "scripting.py", "if asked != planned:", "if False:",
          "tests/workflow/test_reruns.py::test_a_job_is_not_done_by_another_plan_than_it_was_made_with"),
    Guard("a lost picture is told", SRC + "sources/_fast.py", "raise request.corrupt(str(lost)) from lost", "raise NotProven(str(lost)) from lost",
          "tests/unit/test_video.py::test_a_clip_with_a_missing_picture_is_refused"),
    Guard("stale rows are measured again", SRC + "standalone.py", "if not stands(output, plan.timing_fingerprint(job)):",
          "if not output.exists():", "tests/reliability/test_results_folder.py::test_stale_results_are_redone_or_refused"),
    Guard("each sample once", SRC + "merge/gather.py", "if frame.select(key).is_duplicated().any():", "if False:",
          "tests/unit/test_merge_refusals.py::test_refuses_a_file_that_is_not_what_the_plan_says"),
    Guard("no sample lost", SRC + "merge/gather.py", "if have != want:", "if False:",
          "tests/unit/test_merge_refusals.py::test_refuses_a_file_that_is_not_what_the_plan_says"),
    Guard("merged rows are sorted", SRC + "merge/gather.py", "frame = frame.sort(*key).select(", "frame = frame.select(",
          "tests/reliability/test_results_folder.py::test_shuffled_jobs_and_rows_give_equal_bytes"),
    Guard("a local folder never goes to the hub", SRC + "models/_weights.py", "if not folder.is_dir():\n        folder = _from_hub(weights)",
          "if True:\n        folder = __import__('pathlib').Path(__import__('huggingface_hub').snapshot_download('a/b')) or folder",
          "tests/reliability/test_results_folder.py::test_a_checkpoint_folder_needs_no_network"),
    Guard("the report escapes what data says", SRC + "report/page.py", "autoescape=True", "autoescape=False",
          "tests/unit/test_report.py::test_what_data_says_is_shown_and_not_run"),
]  # fmt: skip


def copy(folder: Path) -> Path:
    """The tree without what is built or measured."""
    ignored = shutil.ignore_patterns(
        ".venv", ".git", "results", "cache", "resources", ".snakemake", "__pycache__", "findings", ".*_cache", ".hypothesis"
    )
    return Path(shutil.copytree(REPO, folder / "tree", ignore=ignored, symlinks=True))


def run(tree: Path, test: str) -> bool:
    """Whether the test passes in that tree; False where it fails or is skipped."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{test}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0 and " passed" in done.stdout  # skipped is not passed


def main() -> int:
    words = [word for word in sys.argv[1:] if "/" not in word]
    part, parts = next((map(int, word.split("/")) for word in sys.argv[1:] if "/" in word), (1, 1))
    chosen = [g for g in GUARDS if not words or any(word in g.what or word in g.test for word in words)][part - 1 :: parts]
    useless = 0
    whole_passes: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = copy(Path(folder))
        for guard in chosen:
            if guard.test not in whole_passes:
                whole_passes[guard.test] = run(tree, guard.test)
            path = tree / guard.file
            whole = path.read_text(encoding="utf-8")
            begin = time.monotonic()
            path.write_text(whole.replace(guard.text, guard.gone), encoding="utf-8")
            passed = run(tree, guard.test)
            path.write_text(whole, encoding="utf-8")
            useless += passed or not whole_passes[guard.test]
            outcome = "STILL PASSES" if passed else "fails" if whole_passes[guard.test] else "FAILS ANYWAY"
            sys.stdout.write(f"{outcome}\t{guard.what}\t{guard.test}\t{time.monotonic() - begin:.0f} s\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - useless} of {len(chosen)} guards: the test fails when the guard is gone\n")
    return int(useless > 0)


if __name__ == "__main__":
    sys.exit(main())
