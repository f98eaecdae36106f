"""A dataset behind HTTP, from a real server on loopback: fetched by fetch/Snakefile, then planned and run like any other."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from .cases import INDEX, jobs_of
from .conftest import MODELS, REPO, Run, Study

pytest.importorskip("snakemake_storage_plugin_http", reason="pip install 'stagebench[remote]'")

FETCH = REPO / "fetch/Snakefile"


class Server(ThreadingHTTPServer):
    """Serves a folder below /shared and keeps count of what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/shared/dsec"

    def got(self) -> list[str]:
        """Paths that were downloaded since the last call, sorted."""
        got = sorted(path.removeprefix("/shared/dsec/") for verb, path in self.asked if verb == "GET")
        self.asked.clear()
        return got


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(("GET", self.path))
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(finished: tuple[Study, Run], tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """The server, and the dataset's folder behind it."""
    folder = tmp_path / "server/shared/dsec"
    shutil.copytree(finished[0].data, folder)
    for path in folder.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    server = Server(tmp_path / "server")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, folder
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def study(finished: tuple[Study, Run], tmp_path: Path) -> Study:
    """One model on video, its dataset not here yet."""
    study = Study(tmp_path / "study")
    study.folder.mkdir()
    config = finished[0].config
    one = {**config, "models": {"video_llava": MODELS["video_llava"]}, "compare": {"resamples": 200}}
    (study.folder / "config.yaml").write_text(yaml.safe_dump(one))
    return study


def fetch(study: Study, server: Server, *options: str, **more: object) -> Run:
    quick = ("--storage-http-max-requests-per-second", "1000", "--workflow-profile", "none")
    return study.run(*options, *quick, "--config", f"remote={server.address}", snakefile=FETCH, **more)


def test_it_is_fetched_run_and_after_a_change_there_only_that_is_fetched_and_run(served: tuple[Server, Path], study: Study) -> None:
    server, folder = served
    assert study.run("--dry-run", check=False).status, "no dataset, no plan"
    fetch(study, server)
    videos = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))
    assert server.got() == sorted([INDEX, *videos]), "the events are no model's input: they stay where they are"
    assert all((study.data / path).read_bytes() == (folder / path).read_bytes() for path in videos)
    first = jobs_of(study.run("--retries", "3"))
    assert first.timing == ["video_llava"] and first.others == {"verify": 1, "merge": 1, "report": 1}

    fetch(study, server)
    assert server.got() == [] and study.plan().jobs == []
    changed = folder / videos[0]
    changed.write_bytes(changed.read_bytes() + b"\0")  # and its time is now
    fetch(study, server)
    assert server.got() == [videos[0]]
    run = jobs_of(study.plan())
    assert (len(run.extract), run.timing, run.others) == (1, ["video_llava"], {"merge": 1, "report": 1})


def test_a_clip_that_is_not_there_is_named(served: tuple[Server, Path], study: Study) -> None:
    server, folder = served
    gone = min(folder.rglob("*.mp4"))
    gone.unlink()
    run = fetch(study, server, check=False)
    assert run.status and gone.name in run.text


def test_an_index_that_points_out_of_the_root_is_refused(served: tuple[Server, Path], study: Study) -> None:
    server, folder = served
    index = folder / INDEX
    entries = json.loads(index.read_text())
    entries[0]["mp4_data"] = "../../../etc/passwd"
    index.write_text(json.dumps(entries))
    run = fetch(study, server, check=False)
    assert run.status and "UnsafePathError" in run.text
    assert server.got() == [INDEX]


def test_an_address_is_asked_for_by_name(study: Study) -> None:
    run = study.run("--dry-run", snakefile=FETCH, check=False)
    assert run.status and "remote is None, expected an address for each of the datasets ['demo']" in run.text


def test_datasets_that_share_a_root_are_all_fetched(served: tuple[Server, Path], study: Study) -> None:
    """One index names the first clip, the other one the rest."""
    server, folder = served
    entries = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(entries[:1]))
    (folder / "rest.json").write_text(json.dumps(entries[1:]))
    config = yaml.safe_load((study.folder / "config.yaml").read_text())
    (name,) = config["datasets"]
    config["datasets"]["rest"] = {**config["datasets"][name], "index": "rest.json"}
    (study.folder / "config.yaml").write_text(yaml.safe_dump(config))
    quick = ("--storage-http-max-requests-per-second", "1000", "--workflow-profile", "none")
    both = {name: server.address, "rest": server.address}
    study.run(*quick, "--config", f"remote={json.dumps(both)}", snakefile=FETCH)
    videos = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))
    assert len(videos) > 1 and server.got() == sorted([INDEX, "rest.json", *videos])

    apart = {name: server.address, "rest": "http://127.0.0.1:9/elsewhere"}
    run = study.run(*quick, "--config", f"remote={json.dumps(apart)}", snakefile=FETCH, check=False)
    assert run.status and "share the folder" in run.text
