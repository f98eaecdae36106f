"""thumbnails: a few samples' pictures, from the shards."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from factories import make_study
from pictures import write_pictures
from stagebench.merge import merge
from stagebench.report import write_report
from stagebench.thumbnails import _choose, _small, _spread


def timings(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    table = [{"dataset": "d", "sequence": s, "sample": k, "status": status} for s, k, status in rows]
    pq.write_table(pa.Table.from_pylist(table), path / "timings.parquet")
    return path / "timings.parquet"


def test_sequences_take_turns_and_failures_are_not_shown(tmp_path: Path) -> None:
    rows = [(f"s{i}", f"s{i}/{j:06d}#00", "error" if (i, j) == (0, 0) else "ok") for i in range(3) for j in range(3)]
    chosen = _choose(timings(tmp_path, rows))["d"]
    assert chosen == ["s0/000001#00", "s1/000000#00", "s2/000000#00", "s0/000002#00"]


@pytest.mark.parametrize(("count", "places"), [(1, [0]), (3, [0, 1, 2]), (8, [0, 2, 5, 7])])
def test_places(count: int, places: list[int]) -> None:
    assert list(_spread(count)) == places


@pytest.mark.parametrize(("kind", "form"), [("frames", "JPEG"), ("events", "PNG")])
def test_pictures_are_small_and_look_alike(kind: str, form: str) -> None:
    pixels = np.zeros((480, 640, 3), np.uint8)
    pixels[:, 320:] = (255, 0, 0)
    small = _small(pixels, kind)
    image = Image.open(io.BytesIO(small["image"]))
    assert (image.format, image.size) == (form, (168, 126))
    assert len(small["image"]) < 8000
    shown = np.asarray(image.convert("RGB")).astype(int)
    assert shown[:, :80].max() < 30 and shown[:, 90:, 0].min() > 220


def test_the_report_shows_them_and_a_damaged_file_costs_only_them(tmp_path: Path) -> None:
    merge(make_study(tmp_path), tmp_path)
    path = write_pictures(tmp_path)
    page = write_report(tmp_path).read_text()
    assert page.count("<img ") == 8
    assert page.count('alt="event frame 2 of 2"') == 2
    assert "seq_00/000000#00000000" in page
    path.write_bytes(b"PAR1 no more")
    page = write_report(tmp_path).read_text()
    assert "<img " not in page
    assert "a road, said eventgpt" in page
