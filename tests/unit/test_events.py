"""Event clips: every published coding, exact round trips, windows of long recordings, and what is refused."""

import importlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attacks import h5_files
from attacks.npy_files import columns, pickled
from stagebench.errors import CorruptClipError, ShortClipError, SourceError, StagebenchError
from stagebench.sources import _dsec
from stagebench.sources.events import Events, read_events, to_source_dict

FIXTURE_OK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def save(tmp_path, **changes):
    path = tmp_path / "clip.npy"
    path.write_bytes(pickled({**columns(), **changes}))
    return path


def test_real_clips_come_back_exactly(real_data):
    for path in sorted((real_data / "real").rglob("*.npy")):
        source = np.load(path, allow_pickle=True).item()
        events = read_events(path)
        assert [a.dtype for a in (events.x, events.y, events.p, events.t)] == [np.uint16, np.uint16, np.uint8, np.int64]
        assert events.t0 == int(source["t"][0]) and len(events) == len(source["t"])
        back = to_source_dict(events)
        for key, column in source.items():
            assert back[key].dtype == column.dtype and np.array_equal(back[key], column), (path, key)


@FIXTURE_OK
@given(
    p_dtype=st.sampled_from(["u1", "?", "i1", "<i2", "<i8", "i1-", "<i4-"]),
    t_dtype=st.sampled_from(["<i8", ">i8", "<u2", "<u4", "<u8", "<i4"]),
    steps=st.lists(st.integers(0, 200), min_size=1, max_size=50),
    data=st.data(),
)
def test_round_trip_of_every_coding(tmp_path, p_dtype, t_dtype, steps, data):
    n = len(steps)
    bits = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    p = (bits * 2 - 1 if p_dtype.endswith("-") else bits).astype(p_dtype.rstrip("-"))
    t = np.cumsum(steps).astype(t_dtype)
    source = {"p": p, "t": t, "x": np.arange(n, dtype=np.uint16), "y": np.zeros(n, np.uint16)}
    path = tmp_path / "clip.npy"
    path.write_bytes(pickled(source))
    events = read_events(path)
    assert np.array_equal(events.p, bits) and np.array_equal(events.t, t.astype(np.int64))
    back = to_source_dict(events)
    for key, column in source.items():
        assert back[key].dtype == column.dtype and np.array_equal(back[key], column), key


def test_wider_coordinates_are_narrowed(tmp_path):
    events = read_events(save(tmp_path, x=np.arange(100, dtype=np.int64), y=np.arange(100, dtype=">u2")))
    assert events.x.dtype == np.uint16 and np.array_equal(events.x, np.arange(100)) and np.array_equal(events.y, np.arange(100))


def test_npz(tmp_path):
    np.savez(tmp_path / "clip.npz", **columns())
    assert np.array_equal(read_events(tmp_path / "clip.npz").t, columns()["t"])


N = 100
BAD = {
    "x_negative": ({"x": np.full(N, -1, np.int16)}, "x runs from -1"),
    "x_wide": ({"x": np.full(N, 70_000, np.int32)}, "x runs from 70000"),
    "x_float": ({"x": np.zeros(N, np.float32)}, "x is float32"),
    "p_three": ({"p": np.array([-1, 0, 1] * 33 + [1], np.int8)}, "p holds values from -1 to 1"),
    "p_two": ({"p": np.full(N, 2, np.uint8)}, "p holds values from 2 to 2"),
    "p_255": ({"p": np.full(N, 255, np.uint8)}, "255"),
    "p_float": ({"p": np.ones(N)}, "p is float64"),
    "t_float": ({"t": np.linspace(0, 1, N)}, "whole microseconds"),
    "t_huge": ({"t": np.full(N, 2**63, np.uint64)}, "beyond int64"),
    "t_falls": ({"t": np.r_[np.arange(99), 5]}, "t falls from 98 to 5 at event 99"),
    "t_wraps": ({"t": (np.arange(N) * 1000).astype(np.uint16)}, "uint16 clock runs over"),
    "length": ({"x": np.zeros(N - 1, np.uint16)}, "different or wrong shape"),
    "two_dimensions": ({key: np.zeros((N, 1), np.uint16) for key in "ptxy"}, "different or wrong shape"),
    "scalar": ({"t": 5}, "different or wrong shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_columns(tmp_path, name):
    changes, words = BAD[name]
    with pytest.raises(CorruptClipError, match=words) as caught:
        read_events(save(tmp_path, **changes))
    assert "clip.npy" in str(caught.value) and words.replace("\\", "") in str(caught.value).replace(str(tmp_path), "")


def test_missing_column_names_what_is_there(tmp_path):
    path = tmp_path / "clip.npy"
    path.write_bytes(pickled({"x": np.zeros(3, np.uint16), "polarity": np.zeros(3, np.uint8)}))
    with pytest.raises(CorruptClipError, match=r"no p, t, y among \['polarity', 'x'\]"):
        read_events(path)


def test_no_events_and_unknown_suffix(tmp_path):
    with pytest.raises(ShortClipError, match="no events in the file"):
        read_events(save(tmp_path, **{key: value[:0] for key, value in columns().items()}))
    with pytest.raises(SourceError, match="not .bag"):
        read_events(tmp_path / "clip.bag")


def test_window_of_an_npy(tmp_path):
    path = save(tmp_path, t=np.arange(0, 200, 2))
    assert read_events(path, window=(10, 14)).t.tolist() == [10, 12]
    with pytest.raises(ShortClipError, match=r"window \[1000, 2000\)"):
        read_events(path, window=(1000, 2000))
    with pytest.raises(SourceError, match="t0 < t1"):
        read_events(path, window=(5, 5))


def test_events_refuse_other_columns():
    with pytest.raises(ValueError, match=r"Events\.p"):
        Events(np.zeros(2, np.uint16), np.zeros(2, np.uint16), np.zeros(2, np.int8), np.zeros(2, np.int64))


# DSEC's HDF5


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, "blosc"])
def test_dsec_whole(tmp_path, h5py, options):
    if options == "blosc":
        options = dict(pytest.importorskip("hdf5plugin").Blosc())
    t = np.sort(np.random.default_rng(0).integers(0, 90_000, 3000))
    h5_files.recording(tmp_path / "events.h5", t, **options)
    events = read_events(tmp_path / "events.h5")
    assert np.array_equal(events.t, t + 51_835_000_000) and events.t_dtype == "<i8"
    assert np.array_equal(events.x, np.arange(3000) % 640) and np.array_equal(events.p, np.arange(3000) % 2)


@FIXTURE_OK
@given(
    times=st.lists(st.integers(0, 12_000), min_size=1, max_size=60),
    begin=st.integers(-3000, 15_000),
    length=st.integers(1, 9000),
    offset=st.sampled_from([None, 0, 51_835_000_000]),
    index=st.booleans(),
)
def test_dsec_windows_are_exact(tmp_path, h5py, times, begin, length, offset, index):
    t = np.sort(np.array(times))
    h5_files.recording(tmp_path / "events.h5", t, offset=offset, index=index, chunk=7)
    base = offset or 0
    wanted = np.flatnonzero((t >= begin) & (t < begin + length))
    window = (begin + base, begin + length + base)
    if not len(wanted):
        with pytest.raises(ShortClipError):
            read_events(tmp_path / "events.h5", window=window)
        return
    events = read_events(tmp_path / "events.h5", window=window)
    assert np.array_equal(events.t, t[wanted] + base) and np.array_equal(events.x, wanted % 640)


def test_dsec_window_does_not_read_the_rest(tmp_path, h5py):
    """Chunks away from the window are overwritten: a reader that touches them fails."""
    path = tmp_path / "events.h5"
    t = np.arange(100_000) * 10
    h5_files.recording(path, t, chunk=1000, compression="gzip")
    with h5py.File(path) as file:
        chunks = [file["events/t"].id.get_chunk_info(i) for i in range(100)]
    with path.open("r+b") as handle:
        for chunk in chunks:
            if abs(chunk.chunk_offset[0] - 50_000) > 2000:
                handle.seek(chunk.byte_offset)
                handle.write(b"\xff" * chunk.size)
    begin = 51_835_000_000 + 500_003
    events = read_events(path, window=(begin, begin + 5000))
    assert np.array_equal(events.t, 51_835_000_000 + np.arange(500_010, 505_010, 10))
    with pytest.raises(CorruptClipError):
        read_events(path)


def test_dsec_without_index_searches_the_times(tmp_path, h5py, monkeypatch):
    monkeypatch.setattr(_dsec, "_CHUNK", 16)
    h5_files.recording(tmp_path / "events.h5", np.arange(5000) * 3, offset=None, index=False)
    assert read_events(tmp_path / "events.h5", window=(3000, 3010)).t.tolist() == [3000, 3003, 3006, 3009]


@pytest.mark.parametrize("name", h5_files.ATTACKS)
def test_dsec_attacks(tmp_path, h5py, name):
    build, words = h5_files.ATTACKS[name]
    build(tmp_path / "events.h5")
    with pytest.raises(SourceError) as caught:
        read_events(tmp_path / "events.h5", window=(51_835_000_000 + 10_000, 51_835_000_000 + 20_000))
    assert words in str(caught.value).replace(str(tmp_path), "") and "events.h5" in str(caught.value)


def test_dsec_missing_library_or_filter(tmp_path, h5py, monkeypatch):
    h5_files.recording(tmp_path / "events.h5", np.arange(100), compression="gzip")
    real = importlib.import_module

    def without(*names):
        def import_module(name, *rest):
            if name in names:
                raise ImportError(name)
            return real(name, *rest)

        return import_module

    monkeypatch.setattr(_dsec.importlib, "import_module", without("h5py"))
    with pytest.raises(SourceError, match=r"needs h5py.*pip install 'stagebench\[events\]'"):
        read_events(tmp_path / "events.h5")
    monkeypatch.setattr(_dsec.importlib, "import_module", without("hdf5plugin"))
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    with pytest.raises(SourceError, match=r"events/p is compressed by deflate.*pip install 'stagebench\[events\]'"):
        read_events(tmp_path / "events.h5")


@pytest.mark.parametrize(("name", "value"), [("events/t", np.int64(5)), ("ms_to_idx", np.uint64(3)), ("t_offset", np.uint64(2**63))])
def test_dsec_numbers_where_columns_stand_and_times_beyond_64_bits(tmp_path, h5py, name, value):
    path = tmp_path / "events.h5"
    h5_files.recording(path, np.arange(100) * 10)
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = value
    with pytest.raises(CorruptClipError, match="not readable as HDF5"):
        read_events(path, window=(51_835_000_010, 2**62))


def test_dsec_garbage(tmp_path, h5py):
    (tmp_path / "events.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\x00" * 500)
    with pytest.raises(StagebenchError, match="not readable as HDF5"):
        read_events(tmp_path / "events.h5")
    with pytest.raises(SourceError, match="no such file"):
        read_events(tmp_path / "none.h5")
