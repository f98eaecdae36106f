"""Hostile JSON and YAML wherever the program reads its own: refused by an error of ours, in bounded time and memory."""

import contextlib
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from attacks.result_files import ATTACKS, YAML_ATTACKS
from factories import make_study, study_metadata
from stagebench.cache import usage
from stagebench.compare import compare_results
from stagebench.config import load_config
from stagebench.errors import ConfigError, MergeError, ModelError, PlanError, StagebenchError, StoreError
from stagebench.merge.validity import read_verifications
from stagebench.models._weights import checkpoint_folder
from stagebench.plan import Plan
from stagebench.report import write_report
from stagebench.session.journal import Journal


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


READERS: dict[str, tuple[Callable[[Path, bytes], object], type[StagebenchError]]] = {
    "plan": (lambda folder, data: Plan.read(_write(folder / "plan.json", data)), PlanError),
    "summary, compared": (lambda folder, data: compare_results(_write(folder / "summary.json", data).parent, folder), MergeError),
    "summary, reported": (lambda folder, data: write_report(_write(folder / "summary.json", data).parent), MergeError),
    "study's registration": (lambda folder, data: usage(_write(folder / "studies/s.json", data).parent.parent), StoreError),
    "checkpoint's config": (lambda folder, data: checkpoint_folder(str(_write(folder / "config.json", data).parent)), ModelError),
    "configuration": (lambda folder, data: load_config(_write(folder / "config.yaml", data)), ConfigError),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("reader", READERS)
def test_json_attacks(tmp_path: Path, reader: str, attack: str) -> None:
    read, error = READERS[reader]
    if reader == "checkpoint's config" and attack in (
        "a list where an object should be",
        "a number",
        "a right key with something 10^5 deep",
    ):
        with contextlib.suppress(error):  # taken as no object: transformers then finds no model type
            read(tmp_path, ATTACKS[attack])
        return
    with pytest.raises(error) as caught:
        read(tmp_path, ATTACKS[attack])
    assert str(tmp_path) in str(caught.value), "the file is named"


def _sparse(path: Path) -> Path:
    """A GiB of zeros that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(1 << 30)
    return path


LARGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "summary": ("summary.json", lambda path: compare_results(path.parent, path.parent)),
    "summary, reported": ("summary.json", lambda path: write_report(path.parent)),
    "checkpoint's config": ("config.json", lambda path: checkpoint_folder(str(path.parent))),
    "configuration": ("config.yaml", load_config),
    "proof": ("verify/m.json", lambda path: read_verifications(path.parents[1], ["verify/m.json"])),
}


@pytest.mark.parametrize("reader", LARGE)
def test_a_gibibyte_is_refused_before_it_is_read(tmp_path: Path, reader: str) -> None:
    name, read = LARGE[reader]
    path = _sparse(tmp_path / name)
    tracemalloc.start()
    try:
        if reader == "proof":  # makes the study invalid, and the merge goes on
            assert "OSError" in read(path)[1][0].detail  # type: ignore[index]
        else:
            with pytest.raises(StagebenchError, match="more than the [0-9,]+ bytes") as caught:
                read(path)
            assert str(tmp_path) in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 600 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("attack", YAML_ATTACKS)
def test_yaml_attacks(tmp_path: Path, attack: str) -> None:
    path = _write(tmp_path / "config.yaml", YAML_ATTACKS[attack])
    begin = time.process_time()
    with pytest.raises(ConfigError, match=str(path)) as caught:
        load_config(path)
    assert time.process_time() - begin < 30
    assert len(str(caught.value)) < 10_000, "what was found is shown in short"


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_proof_that_cannot_be_read_makes_the_study_invalid(tmp_path: Path, attack: str) -> None:
    _write(tmp_path / "verify/m.json", ATTACKS[attack])
    reports, findings = read_verifications(tmp_path, ["verify/m.json"])
    assert not reports and [f.code for f in findings] == ["invalid_not_verified"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_journal(tmp_path: Path, attack: str) -> None:
    import zlib

    body = ATTACKS[attack].replace(b"\n", b"")
    _write(tmp_path / "j", f"{zlib.crc32(body):08x} ".encode() + body + b"\n")
    with Journal(tmp_path / "j", {"job": "j"}) as journal:
        assert not journal.groups
    assert list(tmp_path.glob("j.*.aside"))


def test_a_timing_file_with_deep_metadata(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from stagebench.merge import merge

    plan = make_study(tmp_path, samples=2, blocks=1, models={"eventgpt": {}})
    path = tmp_path / plan.jobs[0].path
    table = pq.read_table(path, partitioning=None)
    deep = {**(table.schema.metadata or {}), b"stagebench.study": ATTACKS["objects 10^5 deep"]}
    pq.write_table(table.replace_schema_metadata(deep), path)
    with pytest.raises(MergeError, match="no readable metadata"):
        merge(plan, tmp_path)
    assert study_metadata()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("key", ["temperature", "top_p"])
def test_settings_are_finite(value: float, key: str) -> None:
    """Found by fuzzing: an infinite temperature was taken, and broke the plan's JSON later."""
    stanza = {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"}
    given = {"study": "s", "datasets": {"d": {"root": "r", "sensor": [4, 6]}}, "models": {"v": stanza}, "variants": {key: value}}
    with pytest.raises(ConfigError, match=f"variants.{key}"):
        load_config(given)
