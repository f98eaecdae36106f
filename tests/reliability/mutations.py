# ruff: noqa: E501 - source text is quoted as it stands
"""Take each guard out, in a copy of the tree, and see its test fail: `make guards`, or `python tests/reliability/mutations.py [<words>] [<part>/<parts>]`.

A guard is a piece of source (file, text) and what stands there when it is gone. A test that still passes then guards nothing.
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
    Guard("finished samples are journaled", SRC + "session/core.py", "journal.append(group.key, rows)", "pass",
          "tests/unit/test_session.py::test_resume_measures_the_rest_only"),
    Guard("a resumed job says so", SRC + "session/job.py", "    Code.RESUMED,\n", "",
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
          "tests/unit/test_store.py::test_every_one_of_400_flipped_bits_is_found"),
    Guard("page checksums of pixels are checked", SRC + "store/_reader.py",
          "_seal.check_payloads(self._fd, [c for c in chunks if c.bulk and c.row in wanted], self.clips, self.path, threads)", "pass",
          "tests/unit/test_store.py::test_every_one_of_400_flipped_bits_is_found"),
    Guard("damaged frames are refused", SRC + "sources/_pixels.py", "if frame.is_corrupt:", "if False:",
          "tests/unit/test_video_refused.py"),
    Guard("caps on what a video decodes to", SRC + "sources/_request.py",
          "if frames * width * height > self.limits.clip_pixels:", "if False:",
          "tests/unit/test_video_refused.py::test_limits_are_kept_before_a_frame_is_decoded"),
    Guard("cap on a frame's size", SRC + "sources/_request.py", "if width * height > self.limits.frame_pixels:", "if False:",
          "tests/unit/test_video_refused.py::test_limits_are_kept_before_a_frame_is_decoded"),
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
    Guard("`..` in the index", SRC + "dataset/dataset.py", 'if ".." in parts:', "if False:", "tests/unit/test_dataset.py::test_path_attacks"),
    Guard("links out of the root", SRC + "dataset/dataset.py", 'if real != base and not real.startswith(base.rstrip("/") + "/"):', "if False:",
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
    Guard("settings are finite", SRC + "config.py", "allow_inf_nan=False", "allow_inf_nan=True",
          "tests/reliability/test_hostile_files.py::test_settings_are_finite"),
    Guard("auto_map is refused", SRC + "models/_weights.py", 'if "auto_map" in read_json(path):', "if False:",
          "tests/unit/test_models_weights.py::test_auto_map_is_refused"),
    Guard("trust_remote_code stays off", SRC + "models/_weights.py", "trust_remote_code=False", "trust_remote_code=True",
          "tests/reliability/test_code_execution.py::test_switches_that_allow_code"),
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
    Guard("stale rows are refused by the merge", SRC + "merge/gather.py", "_planned(plan, job, _open(job, results)) for job", "_open(job, results) for job",
          "tests/reliability/test_results_folder.py::test_stale_results_are_redone_or_refused"),
    Guard("stale rows are measured again", SRC + "standalone.py", "if not _stands(output, plan.timing_fingerprint(job)):",
          "if not output.exists():", "tests/reliability/test_results_folder.py::test_stale_results_are_redone_or_refused"),
    Guard("each sample once", SRC + "merge/gather.py", "if frame.select(key).is_duplicated().any():", "if False:",
          "tests/unit/test_merge.py::test_refuses_a_file_that_is_not_what_the_plan_says"),
    Guard("no sample lost", SRC + "merge/gather.py", "if have != want:", "if False:",
          "tests/unit/test_merge.py::test_refuses_a_file_that_is_not_what_the_plan_says"),
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
    """Whether the test passes in that tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{test}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main() -> int:
    words = [word for word in sys.argv[1:] if "/" not in word]
    part, parts = next((map(int, word.split("/")) for word in sys.argv[1:] if "/" in word), (1, 1))
    chosen = [g for g in GUARDS if not words or any(word in g.what or word in g.test for word in words)][part - 1 :: parts]
    useless = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy(Path(folder))
        for guard in chosen:
            path = tree / guard.file
            whole = path.read_text(encoding="utf-8")
            begin = time.monotonic()
            path.write_text(whole.replace(guard.text, guard.gone), encoding="utf-8")
            passed = run(tree, guard.test)
            path.write_text(whole, encoding="utf-8")
            useless += passed
            sys.stdout.write(f"{'STILL PASSES' if passed else 'fails'}\t{guard.what}\t{guard.test}\t{time.monotonic() - begin:.0f} s\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - useless} of {len(chosen)} guards: the test fails when the guard is gone\n")
    return int(useless > 0)


if __name__ == "__main__":
    sys.exit(main())
