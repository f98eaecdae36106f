"""One results folder: one run at a time, and nothing in it that was measured under other settings, weights or versions."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from reliability.conftest import small
from stagebench._ownership import Ownership
from stagebench.errors import BusyError, MergeError
from stagebench.merge import merge
from stagebench.plan import Plan
from stagebench.session.output import read_metadata
from stagebench.standalone import run_study

COLUMNS = [
    "sample",
    "length",
    "repeat",
    "status",
    "reason",
    "new_tokens",
    "token_ids",
    "text",
    "finish_reason",
    "prompt_tokens",
    "visual_tokens",
]
COLUMNS += ["encoder_calls", "feature_hash", "dataset", "model", "variant", "clip", "sequence", "query", "kv_bytes", "weights"]
"""What a row says beside times and the job that measured it."""


@pytest.fixture(scope="module")
def refused_sockets() -> "pytest.MonkeyPatch":
    """No connection leaves this process, and no name is looked up, while the module's studies run. Local sockets of the system stay."""
    import socket

    def refuse(self: object, address: object, *rest: object) -> None:
        if isinstance(address, (str, bytes)):
            raise ConnectionRefusedError(f"no local service either: {address!r}")
        tried.append(address)
        raise OSError(f"the test refuses sockets: {address}")

    tried: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        patch.setattr(socket, "getaddrinfo", lambda *address, **more: refuse(None, address))
        patch.tried = tried  # type: ignore[attr-defined]
        yield patch


@pytest.fixture(scope="module")
def finished(clips: Path, tmp_path_factory: pytest.TempPathFactory, refused_sockets: pytest.MonkeyPatch) -> Path:
    """A whole study: planned, extracted, proven, timed, merged, reported, without a network."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_study(small(clips), folder / "results", folder / "cache", device="cpu")
    assert done.timed == 1
    return folder


def test_a_whole_study_needs_no_network(finished: Path, refused_sockets: pytest.MonkeyPatch) -> None:
    assert (finished / "results/report.html").exists()
    assert refused_sockets.tried == []  # type: ignore[attr-defined]


def test_a_checkpoint_folder_needs_no_network(tmp_path: Path, refused_sockets: pytest.MonkeyPatch) -> None:
    from stagebench.models import registry
    from stagebench.models.base import ModelSpec

    dummy = registry.create("hf")
    dummy.load(ModelSpec("dummy:1", "llava", "tiny"), "cpu")
    dummy.language_model().save_pretrained(tmp_path)
    dummy.codec.tokenizer.save_pretrained(tmp_path)
    dummy.route.image_processor.save_pretrained(tmp_path)
    real = registry.create("hf")
    real.load(ModelSpec(str(tmp_path), "llava"), "cpu")
    assert refused_sockets.tried == []  # type: ignore[attr-defined]


def test_the_refusal_is_seen(refused_sockets: pytest.MonkeyPatch) -> None:
    """The two tests above can fail: who tries the network is refused and noted."""
    import urllib.request

    tried = refused_sockets.tried  # type: ignore[attr-defined]
    before = len(tried)
    with pytest.raises(OSError, match="refuses sockets"):
        urllib.request.urlopen("http://example.org", timeout=5)
    assert len(tried) > before
    del tried[before:]


def test_stale_results_are_redone_or_refused(finished: Path, clips: Path) -> None:
    results, cache = finished / "results", finished / "cache"
    assert run_study(small(clips), results, cache, device="cpu").timed == 0, "what was measured as planned is kept"
    plan = Plan.read(results / "plan.json")
    job = next(iter(plan.jobs))
    old = (results / job.path).read_bytes()

    other = small(clips, models={"llava": {**small(clips).models["llava"].model_dump(), "weights": "dummy:1"}})
    before = plan.basis
    assert run_study(other, results, cache, device="cpu").timed == 1, "other weights: the same path, another content"
    assert [path.name for path in results.glob("basis-*")] == [Plan.read(results / "plan.json").basis] != [before]
    assert set(pl.read_parquet(results / "timings.parquet")["weights"]) == {"dummy:1"}
    assert next(iter(Plan.read(results / "plan.json").jobs)).path == job.path

    (results / job.path).write_bytes(old)
    with pytest.raises(MergeError, match=r"(?s)applied\.model\.weights.*dummy:1.*dummy:0.*run its timing job again"):
        merge(Plan.read(results / "plan.json"), results)

    # another version of the code: the same settings, measured by it
    table = pq.read_table(results / job.path, partitioning=None)
    metadata = read_metadata(results / job.path)
    metadata["study"]["applied"]["versions"]["timing"] = "0"
    encoded = {f"stagebench.{name}": json.dumps(value) for name, value in metadata.items()}
    pq.write_table(table.replace_schema_metadata(encoded), results / job.path)
    plan.write(results / "plan.json")
    with pytest.raises(MergeError, match=r'(?s)versions\.timing: "\d+" -> "0"'):
        merge(plan, results)


def test_other_shards_same_rows(clips: Path, finished: Path, tmp_path: Path) -> None:
    """Shards of one clip, jobs of two samples: rows as with one shard and one job, but for times and what names the job."""
    whole = small(clips)
    run_study(whole, tmp_path / "whole", finished / "cache", device="cpu")
    timing = {**whole.timing.model_dump(mode="json"), "max_samples": 2}
    split = small(clips, shards={"max_clips": 1}, timing=timing)
    done = run_study(split, tmp_path / "split", tmp_path / "cache", device="cpu")
    assert done.extracted >= 6 and done.timed >= 3
    one, many = (
        pl.read_parquet(tmp_path / name / "timings.parquet").select(COLUMNS).sort("sample", "length") for name in ("whole", "split")
    )
    assert one.equals(many)
    assert pl.read_parquet(tmp_path / "split/timings.parquet")["block"].n_unique() >= 3


def test_shuffled_jobs_and_rows_give_equal_bytes(tmp_path: Path) -> None:
    from factories import make_study

    def files(seed: int | None) -> dict[str, bytes]:
        folder = tmp_path / str(seed)
        merge(make_study(folder, samples=6, shuffle=seed), folder)
        names = [p for p in folder.rglob("*") if p.is_file() and ("tables" in p.parts or p.name in ("timings.parquet", "summary.json"))]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names}

    straight = files(None)
    assert len(straight) > 20
    for seed in (1, 2):
        assert files(seed) == straight


def test_a_second_run_stops_with_the_owners_name(clips: Path, tmp_path: Path) -> None:
    with Ownership(tmp_path / "results"):
        with pytest.raises(BusyError) as caught:
            run_study(small(clips), tmp_path / "results", tmp_path / "cache", device="cpu")
        said = str(caught.value)
        assert f"pid {os.getpid()} on" in said and "Wait for that run" in said and str(tmp_path / "results") in said
        assert [p.name for p in (tmp_path / "results").iterdir()] == [".owner"]
    Ownership(tmp_path / "results").release()


def test_snakemake_stops_too(clips: Path, tmp_path: Path, repo: Path) -> None:
    """Beside `stagebench run`, or another checkout with the same results folder: Snakemake's own lock sees neither."""
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small(clips).model_dump(mode="json")))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(repo / "Snakefile"), "--directory", str(tmp_path), "--nocolor"]
    command += ["--resources", "gpu=1", "--configfile", str(tmp_path / "config.yaml"), "--cores", "1"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with Ownership(tmp_path / "results/small"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and f"pid {os.getpid()} on" in said, said[-3000:]
    assert not (tmp_path / "cache/frames").exists(), "no job ran"


def test_many_at_once_one_wins(tmp_path: Path) -> None:
    won, lost = [], []
    start = threading.Barrier(8)

    def run() -> None:
        start.wait()
        try:
            won.append(Ownership(tmp_path))
        except BusyError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 7
    won[0].release()
