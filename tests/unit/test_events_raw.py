"""Recordings of event cameras: files written here by the published formats and read back; other decoders agree where they are installed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagebench.errors import CorruptClipError, ShortClipError, SourceError
from stagebench.sources.events import read_events

Columns = dict[str, np.ndarray]


def recording(n: int = 5000, seed: int = 0, start: int = 5_000, span: int = 400_000) -> Columns:
    rng = np.random.default_rng(seed)
    return {
        "t": np.sort(rng.integers(start, start + span, n)),
        "x": rng.integers(0, 640, n).astype(np.uint16),
        "y": rng.integers(0, 480, n).astype(np.uint16),
        "p": rng.integers(0, 2, n).astype(np.uint8),
    }


def dat(
    columns: Columns, header: str = "% Data file containing CD events\n% Version 2\n% Width 640\n% Height 480\n", kind: int = 12
) -> bytes:
    words = np.empty(len(columns["t"]), [("t", "<u4"), ("d", "<u4")])
    words["t"] = columns["t"]
    words["d"] = columns["x"].astype(np.uint32) | columns["y"].astype(np.uint32) << 14 | columns["p"].astype(np.uint32) << 28
    return header.encode() + bytes([kind, 8]) + words.tobytes()


EVT2 = b"% date 2020-09-14 14:18:29\n% evt 2.0\n% integrator_name Prophesee\n"
EVT3 = b"% date 2020-09-14 14:18:29\n% format EVT3;height=480;width=640\n% end\n"


def evt2(columns: Columns) -> bytes:
    words = [0xA << 28]  # a trigger before the first time
    high = -1
    for t, x, y, p in zip(*(columns[key].tolist() for key in "txyp"), strict=True):
        if t >> 6 != high:
            high = t >> 6
            words.append(8 << 28 | high & 0xFFF_FFFF)
        words.append(p << 28 | (t & 63) << 22 | x << 11 | y)
    return EVT2 + struct.pack(f"<{len(words)}I", *words)


def evt3(columns: Columns, vectors: bool = True) -> bytes:
    """Runs of events of one time, row and polarity at rising x become vectors, as a sensor sends them."""
    words: list[int] = []
    high = low = row = None
    events = list(zip(*(columns[key].tolist() for key in "txyp"), strict=True))
    i = 0
    while i < len(events):
        t, x, y, p = events[i]
        if t >> 12 != high:
            high, low = t >> 12, -1  # sensors send the low part after each new high one
            words.append(8 << 12 | high & 0xFFF)
        if t & 0xFFF != low:
            low = t & 0xFFF
            words.append(6 << 12 | low)
        if y != row:
            row = y
            words.append(y)
        run = i + 1
        while run < len(events) and (events[run][0], events[run][2], events[run][3]) == (t, y, p) and events[run][1] > events[run - 1][1]:
            run += 1
        if vectors and run - i > 1:
            words.append(3 << 12 | p << 11 | x)
            base, held = x, {e[1] for e in events[i:run]}
            while base <= max(held):
                width = 12 if (base - x) % 20 == 0 else 8
                mask = sum(1 << k for k in range(width) if base + k in held)
                words.append((4 if width == 12 else 5) << 12 | mask)
                base += width
            i = run
        else:
            words.append(2 << 12 | p << 11 | x)
            i += 1
    return EVT3 + struct.pack(f"<{len(words)}H", *words)


def check(path: Path, columns: Columns) -> None:
    events = read_events(path)
    for name in "txyp":
        assert np.array_equal(getattr(events, name), columns[name]), name


@pytest.mark.parametrize(("suffix", "write"), [("dat", dat), ("raw", evt2), ("raw", evt3)])
def test_what_is_written_by_the_format_is_read_back(tmp_path: Path, suffix: str, write: Callable[[Columns], bytes]) -> None:
    columns = recording()
    path = tmp_path / f"clip.{suffix}"
    path.write_bytes(write(columns))
    check(path, columns)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.sampled_from([1, 40, 5000, 3_000_000]))
def test_any_recording(tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, span: int) -> None:
    columns = recording(n, seed, span=span)
    order = np.lexsort((columns["x"], columns["p"], columns["y"], columns["t"]))
    columns = {name: column[order] for name, column in columns.items()}
    folder = tmp_path_factory.mktemp("raw")
    for name, data in {
        "a.dat": dat(columns),
        "b.raw": evt2(columns),
        "c.raw": evt3(columns),
        "d.raw": evt3(columns, vectors=False),
    }.items():
        (folder / name).write_bytes(data)
        got = read_events(folder / name)
        # one pixel twice at one time cannot be told apart inside a vector: sets are compared there
        if name == "c.raw":
            assert sorted(zip(got.t, got.y, got.p, got.x, strict=True)) == sorted(
                zip(columns["t"], columns["y"], columns["p"], columns["x"], strict=True)
            )
        else:
            check(folder / name, columns)


def test_vectors_by_hand(tmp_path: Path) -> None:
    """VECT_12 then VECT_8 on one base; a pixel a bit, lowest first; then a plain event."""
    words = [0x8001, 0x6002, 0x0007, 0x3864, 0x4801, 0x5081, 0x2005]
    path = tmp_path / "v.raw"
    path.write_bytes(EVT3 + struct.pack("<7H", *words))
    time = (1 << 12) + 2
    check(path, {"t": np.full(5, time), "x": np.array([100, 111, 112, 119, 5]), "y": np.full(5, 7), "p": np.array([1, 1, 1, 1, 0])})


def test_a_high_part_of_time_that_is_sent_again_keeps_the_low_one(tmp_path: Path) -> None:
    """Sensors repeat it, and send the low part where it changes."""
    high, low, row, event = 0x8001, 0x6000 | 100, 3, 0x2005
    words = [low, high, row, event, low, event, high, event, high, low + 1, event, high + 1, event]
    path = tmp_path / "clip.raw"
    path.write_bytes(EVT3 + struct.pack(f"<{len(words)}H", *words))
    assert read_events(path).t.tolist() == [4096, 4196, 4196, 4197, 8192]


def test_turns_of_the_clock_are_counted(tmp_path: Path) -> None:
    """24 bits of EVT 3.0 turn over every 16.8 s, 34 bits of EVT 2.0 every 4 h 46 min."""
    short = {"t": np.array([2**24 - 5, 2**24 + 7]), **{k: np.zeros(2, int) for k in "xyp"}}
    (tmp_path / "c.raw").write_bytes(evt3(short))
    check(tmp_path / "c.raw", short)
    long = {**short, "t": np.array([2**34 - 5, 2**34 + 70])}
    (tmp_path / "b.raw").write_bytes(evt2(long))
    check(tmp_path / "b.raw", long)


@pytest.mark.parametrize(("suffix", "write"), [("dat", dat), ("raw", evt3)])
def test_windows_are_exact(tmp_path: Path, suffix: str, write: Callable[[Columns], bytes]) -> None:
    columns = recording()
    path = tmp_path / f"clip.{suffix}"
    path.write_bytes(write(columns))
    t0, t1 = int(columns["t"][1000]), int(columns["t"][3000])
    events = read_events(path, window=(t0, t1))
    inside = (columns["t"] >= t0) & (columns["t"] < t1)
    assert np.array_equal(events.t, columns["t"][inside])
    assert np.array_equal(events.x, columns["x"][inside])
    with pytest.raises(ShortClipError, match="window"):
        read_events(path, window=(10**12, 10**12 + 1))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.dat", b"", "header"),
        ("a.dat", b"\x93NUMPY" + b"\0" * 80, "header"),
        ("a.dat", dat(recording(9))[:-3], "cut"),
        ("a.dat", dat(recording(9), header="% Version 1\n"), "version 1"),
        ("a.dat", dat(recording(9), kind=14), "CD events"),
        ("a.dat", b"% Version 2\n\x0c", "CD events"),
        ("a.raw", b"% evt 2.1\n" + b"\0" * 8, "EVT 2.0 or EVT 3.0"),
        ("a.raw", b"% date 2020\n" + b"\0" * 8, "not named"),
        ("a.raw", b"% evt 3.0\n% endianness big\n" + b"\0" * 8, "endianness big"),
        ("a.raw", EVT2 + b"\0\0\0", "cut"),
        ("a.raw", evt3(recording(50))[:-1], "cut"),
    ],
)
def test_damaged_and_foreign_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorruptClipError, match=message):
        read_events(tmp_path / name)


def test_a_window_of_a_recording_whose_clock_has_turned_is_refused(tmp_path: Path) -> None:
    """Searched by time, it would give nothing, or another part."""
    columns = recording(20_000)
    columns["t"] = np.linspace(2**32 - 400_000, 2**32 + 5_000, 20_000).astype(np.int64) % 2**32
    (tmp_path / "long.dat").write_bytes(dat(columns))
    with pytest.raises(CorruptClipError, match=r"long\.dat: t falls from 429\d+ to \d+ between events 19\d+ and \d+"):
        read_events(tmp_path / "long.dat", window=(2**32 - 3_000, 2**32))


@pytest.mark.parametrize("data", [EVT2, EVT3, EVT3 + struct.pack("<3H", 0x2005, 0x4FFF, 0x0007), EVT2 + struct.pack("<I", 5)])
def test_words_before_any_time_are_no_events(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.raw").write_bytes(data)
    with pytest.raises(ShortClipError):
        read_events(tmp_path / "a.raw")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400).map(lambda b: b[: len(b) // 4 * 4]), st.sampled_from([EVT2, EVT3, b"% Version 2\n\x0c\x08"]))
def test_noise_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes, header: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / ("a.dat" if b"Version" in header else "a.raw")
    path.write_bytes(header + noise)
    try:
        events = read_events(path)
    except SourceError:
        return
    assert len(events) > 0


@pytest.mark.parametrize("encoding", ["dat", "evt2"])
def test_expelliarmus_reads_the_same(tmp_path: Path, encoding: str) -> None:
    """Its EVT 3.0 is left out: it counts a fall of the low time bits as a turn although the high bits have moved, and so doubles them."""
    library = pytest.importorskip("expelliarmus", reason="expelliarmus is not installed (benchmarks/requirements-peers.txt)")
    columns = recording()
    path = tmp_path / ("a.dat" if encoding == "dat" else "a.raw")
    path.write_bytes({"dat": dat, "evt2": evt2}[encoding](columns))
    theirs = library.Wizard(encoding=encoding).read(path)
    ours = read_events(path)
    for name in "txyp":
        assert np.array_equal(getattr(ours, name), theirs[name]), name


@pytest.mark.parametrize("write", [evt2, evt3])
def test_evlib_reads_the_same(tmp_path: Path, write: Callable[[Columns], bytes]) -> None:
    """As sets: evlib sorts by time, and not stably."""
    library = pytest.importorskip("evlib", reason="evlib is not installed (benchmarks/requirements-peers.txt)")
    path = tmp_path / "a.raw"
    path.write_bytes(write(recording()))
    frame = library.load_events(str(path)).collect()
    theirs = [frame["t"].dt.total_microseconds(), frame["x"], frame["y"], frame["polarity"] > 0]
    ours = read_events(path)
    assert sorted(zip(*(column.to_list() for column in theirs), strict=True)) == sorted(
        zip(ours.t.tolist(), ours.x.tolist(), ours.y.tolist(), (ours.p > 0).tolist(), strict=True)
    )


def test_aedat4(tmp_path: Path) -> None:
    pytest.importorskip("aedat", reason="aedat is not installed: pip install 'stagebench[events-raw]'")
    dv = pytest.importorskip("dv_processing", reason="dv-processing, which writes AEDAT4, is not installed")
    columns = recording(start=1_600_000_000_000_000)
    path = tmp_path / "a.aedat4"
    writer = dv.io.MonoCameraWriter(str(path), dv.io.MonoCameraWriter.EventOnlyConfig("camera", (640, 480)))
    store = dv.EventStore()
    for t, x, y, p in zip(*(columns[key].tolist() for key in "txyp"), strict=True):
        store.push_back(t, x, y, bool(p))
    writer.writeEvents(store)
    del writer
    check(path, columns)
    t0, t1 = int(columns["t"][1000]), int(columns["t"][3000])
    assert np.array_equal(read_events(path, window=(t0, t1)).t, columns["t"][(columns["t"] >= t0) & (columns["t"] < t1)])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptClipError, match="AEDAT4"):
        read_events(path)


def test_aedat4_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "aedat", None)
    (tmp_path / "a.aedat4").write_bytes(b"#!AER-DAT4.0\r\n")
    with pytest.raises(SourceError, match=r"stagebench\[events-raw\]"):
        read_events(tmp_path / "a.aedat4")
