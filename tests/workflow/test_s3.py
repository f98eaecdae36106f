"""A dataset in a bucket, from an S3 server on loopback (moto's): fetched by fetch/Snakefile in an environment of its own, planned here."""

import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from .cases import INDEX
from .conftest import MODELS, REPO, Run, Study, settings

PYTHON = REPO / ".s3-venv/bin/python"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="`make test-bucket` makes the environment that fetches from S3 and serves it")


class Bucket:
    """A bucket of a server in a process of its own, and what it has been asked for."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            command = [str(PYTHON), "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        self.read = 0

    def put(self, key: str, data: bytes = b"") -> None:
        """The bucket itself has no key."""
        address = f"{self.url}/shared/{quote(key)}".rstrip("/")
        # moto does not check a signature, but takes nobody's word for what is there already
        who = "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        headers = {"Content-Type": "application/octet-stream", "Authorization": who}
        request = urllib.request.Request(address, data=data, method="PUT", headers=headers)
        urllib.request.urlopen(request, timeout=30).close()

    def wait(self) -> None:
        """Until the server answers."""
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url, timeout=30).close()
                return
            except urllib.error.URLError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def got(self) -> list[str]:
        """Keys below dsec/ that were downloaded since the last call, sorted."""
        text = self.log.read_text()
        found = re.findall(r'"[^"\n]*GET /shared/dsec/([^ ?]+) ', text[self.read :])
        self.read = len(text)
        return sorted(found)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    bucket = Bucket(tmp_path)
    try:
        bucket.wait()
        bucket.put("")
        yield bucket
    finally:
        bucket.process.terminate()
        bucket.process.wait(30)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    from stagebench.demo import write_demo

    write_demo(tmp_path / "made", clips=3, seconds=0.5, size=(64, 96))
    return tmp_path / "made"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """One model on video, its dataset not here yet."""
    study = Study(tmp_path / "study")
    study.folder.mkdir()
    one = {**settings(), "models": {"video_llava": MODELS["video_llava"]}, "compare": {"resamples": 200}, "shards": {"max_clips": 1}}
    (study.folder / "config.yaml").write_text(yaml.safe_dump(one))
    return study


def fetch(study: Study, bucket: Bucket) -> Run:
    """As docs/clusters.md has it: Snakemake of the other environment, with this checkout's package."""
    command = [
        *(str(PYTHON), "-m", "snakemake", "--snakefile", str(REPO / "fetch/Snakefile"), "--directory", str(study.folder), "--nocolor"),
        *("--cores", "2", "--workflow-profile", "none", "--configfile", str(study.folder / "config.yaml")),
        *("--storage-s3-endpoint-url", bucket.url, "--config", "remote=s3://shared/dsec"),
    ]
    keys = {"SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "any", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "any", "PYTHONPATH": str(REPO / "src")}
    path = f"{PYTHON.parent}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **keys, "PATH": path})
    return Run(done.returncode, done.stdout + done.stderr)


def shards(study: Study) -> set[str]:
    """What a dry run here would extract."""
    return {output for rule, output in study.plan().jobs if rule == "extract"}


def test_a_bucket_is_fetched_and_planned_and_after_a_change_there_only_that(made: Path, study: Study, bucket: Bucket) -> None:
    for path in sorted(p for p in made.rglob("*") if p.is_file()):
        bucket.put(f"dsec/{path.relative_to(made).as_posix()}", path.read_bytes())
    videos = sorted(path.relative_to(made).as_posix() for path in made.rglob("*.mp4"))
    run = fetch(study, bucket)
    assert not run.status, run.text[-4000:]
    assert bucket.got() == sorted([INDEX, *videos]), "the events are no model's input: they stay where they are"
    assert all((study.data / path).read_bytes() == (made / path).read_bytes() for path in videos)
    before = shards(study)
    assert len(before) == len(videos) == 3

    time.sleep(1.1)  # a bucket's times are whole seconds
    bucket.put(f"dsec/{videos[0]}", (made / videos[0]).read_bytes() + b"\0")
    run = fetch(study, bucket)
    assert not run.status, run.text[-4000:]
    assert bucket.got() == [videos[0]]
    assert len(shards(study) - before) == 1


def test_what_changed_there_is_fetched_though_the_copy_here_is_younger(made: Path, study: Study, bucket: Bucket) -> None:
    """As when it was replaced while it was copied, or when the clocks differ."""
    for path in sorted(p for p in made.rglob("*") if p.is_file()):
        bucket.put(f"dsec/{path.relative_to(made).as_posix()}", path.read_bytes())
    video = sorted(path.relative_to(made).as_posix() for path in made.rglob("*.mp4"))[0]
    run = fetch(study, bucket)
    assert not run.status, run.text[-4000:]
    bucket.got()
    time.sleep(1.1)
    bucket.put(f"dsec/{video}", (made / video).read_bytes() + b"\0")
    for path in (INDEX, video):
        os.utime(study.data / path, (time.time() + 9,) * 2)
    for expected in ([video], []):
        run = fetch(study, bucket)
        assert not run.status, run.text[-4000:]
        assert bucket.got() == expected


def test_a_key_is_taken_as_it_is_and_one_that_no_address_can_hold_is_refused(made: Path, study: Study, bucket: Bucket) -> None:
    index = (made / INDEX).read_text()
    name = re.search(r'"mp4_data": "([^"]*)"', index)[1]
    film = (made / "mp4" / name).read_bytes()
    for path in sorted(made.rglob("*.mp4")):
        bucket.put(f"dsec/{path.relative_to(made).as_posix()}", path.read_bytes())
    for odd, refused in (("a 100%25 film.mp4", False), ("film#1.mp4", True)):
        bucket.put(f"dsec/mp4/{odd}", film)
        bucket.put(f"dsec/{INDEX}", index.replace(f'"mp4_data": "{name}"', f'"mp4_data": "{odd}"').encode())
        run = fetch(study, bucket)
        assert bool(run.status) == refused, run.text[-4000:]
        assert ("cannot be asked for" in run.text) == refused
        if not refused:
            assert (study.data / "mp4" / odd).read_bytes() == film
        time.sleep(1.1)
