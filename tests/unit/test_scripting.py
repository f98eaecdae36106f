"""scripting: the end of a run that failed names what failed and why, from Snakemake's log and the jobs' own."""

from pathlib import Path

import pytest

from stagebench.scripting import failures, job

RUN = """\
[Sat Nov 21 00:16:53 2026]
Error in rule verify:
    message: None
    jobid: 15
    output: results/s/verify/llava.json
    log: logs/verify.log (check log file(s) for error details)
Logfile logs/verify.log:
Error in rule timing:
    message: None
    jobid: 8
    input: a.parquet, b.parquet
    output: results/s/timings/x.parquet, results/s/other
    log: logs/timing.log (check log file(s) for error details)
Finished jobid: 3 (Rule: extract)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "run.log").write_text(RUN)
    (tmp_path / "logs/verify.log").write_text("10:00 INFO x: loaded\nModelError: weights 'x': no such folder.\nGive a local one.\n")
    (tmp_path / "logs/timing.log").write_text("10:00 INFO x: loaded on cuda:0 in 3 s\n")
    return tmp_path


def test_each_job_stands_with_its_cause(folder: Path) -> None:
    lines = failures([folder / "run.log"], folder).splitlines()
    assert lines[0] == "stagebench: 2 jobs failed, and what needs them did not run."
    assert lines[1:4] == [
        "  ModelError: weights 'x': no such folder.",
        "  Give a local one.",
        "      verify results/s/verify/llava.json (log: logs/verify.log)",
    ]
    assert "killed" in lines[4] and "loaded on cuda:0 in 3 s" in lines[4], "a log that ends amid its work has no message"
    assert lines[5] == "      timing results/s/timings/x.parquet (log: logs/timing.log)"
    assert "run the same command again" in lines[-1]


def test_one_cause_of_many_jobs_is_said_once(folder: Path) -> None:
    (folder / "logs/timing.log").write_text((folder / "logs/verify.log").read_text())
    text = failures([folder / "run.log"], folder)
    assert text.count("ModelError") == 1 and text.count("(log: ") == 2


def test_what_succeeded_in_the_end_is_not_named(folder: Path) -> None:
    (folder / "run.log").write_text(RUN + "Finished jobid: 15 (Rule: verify)\n")
    text = failures([folder / "run.log"], folder)
    assert "1 job failed" in text and "llava.json" not in text
    (folder / "run.log").write_text(RUN + "Finished jobid: 15 (Rule: verify)\nFinished jobid: 8 (Rule: timing)\n")
    assert failures([folder / "run.log"], folder) == ""


def test_a_log_that_is_not_there_is_said_so(folder: Path) -> None:
    (folder / "logs/timing.log").unlink()
    assert "not there" in failures([folder / "run.log"], folder)
    assert failures([folder / "none.log"], folder) == ""


def test_the_cause_of_an_unexpected_error_is_its_last_line(folder: Path) -> None:
    with pytest.raises(RuntimeError), job(str(folder / "logs/timing.log")):
        raise RuntimeError("CUDA error: an illegal memory access")
    text = failures([folder / "run.log"], folder)
    assert "  RuntimeError: CUDA error: an illegal memory access\n" in text and "Traceback" not in text
