"""The restricted reader of event files: reads what is published, runs nothing, and stays small."""

import os
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attacks import npy_files
from attacks.npy_files import ATTACKS, CANARY, GARBLED, columns, npy, pickled
from stagebench.errors import CorruptClipError, SourceError, UnsafeFileError
from stagebench.sources import safe_npy
from stagebench.sources.safe_npy import load_array, load_events_dict


@pytest.fixture(autouse=True)
def canary():
    """No test of this module may make the canary."""
    CANARY.unlink(missing_ok=True)
    yield
    existed = CANARY.exists()
    CANARY.unlink(missing_ok=True)
    assert not existed, "code of a hostile file was run"


def write(tmp_path, data, name="clip.npy"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        value = np.asarray(value)
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert np.array_equal(found[key], value), key


VARIED = {
    "x": np.arange(300, dtype=np.uint16),
    "p": np.arange(300) % 2 == 0,
    "t": np.arange(300, dtype=">i8") * 10**9,
    "y": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "i1": np.array([-1, 1], np.int8),
    "scalar": np.int64(51_835_949_776),
    "number": 7,
    "real": 0.5,
    "yes": True,
    "empty": np.zeros(0, np.uint8),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("numpy_major", [1, 2])
def test_every_protocol_of_both_numpys(tmp_path, protocol, numpy_major):
    data = pickled(VARIED, protocol)
    if numpy_major == 1:  # the same stream with numpy 1's module paths; SHORT_BINUNICODE carries its length before the text
        for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
            old = name.replace(b"._core", b".core")
            data = data.replace(bytes([len(name)]) + name, bytes([len(old)]) + old).replace(b"c" + name, b"c" + old)
    same(load_events_dict(write(tmp_path, data)), VARIED)


def test_real_clips_equal_numpys_own_reader(real_data):
    paths = [*sorted((real_data / "real").rglob("*.npy")), real_data / "eventgpt_parity" / "events.npy"]
    assert len(paths) == 5
    for path in paths:
        same(load_events_dict(path), np.load(path, allow_pickle=True).item())


def test_npz(real_data, tmp_path):
    same(load_events_dict(real_data / "eventgpt_parity" / "events.npz"), dict(np.load(real_data / "eventgpt_parity" / "events.npz")))
    np.savez_compressed(tmp_path / "c.npz", **columns())
    same(load_events_dict(tmp_path / "c.npz"), columns())


def test_plain_arrays(tmp_path):
    for array in (np.arange(12, dtype=">u2").reshape(3, 4), np.asfortranarray(np.eye(3)), np.float32(3), np.zeros((0, 4), np.int8)):
        np.save(tmp_path / "a.npy", array)
        found = load_array(tmp_path / "a.npy")
        assert found.dtype == np.asarray(array).dtype and np.array_equal(found, array)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused(tmp_path, name):
    build, words = ATTACKS[name]
    path = write(tmp_path, build())
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeFileError) as caught:
            load_events_dict(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message
    message = message.replace(str(path), "")  # the folder carries the attack's name
    assert words in message and "Do not open it with allow_pickle" in message
    assert len(message) < 1000
    assert peak < 5 * path.stat().st_size + (1 << 20)


@pytest.mark.parametrize("name", GARBLED)
def test_garbled_file_is_an_error_of_ours(tmp_path, name):
    with pytest.raises((CorruptClipError, UnsafeFileError), match="clip.npy"):
        load_events_dict(write(tmp_path, GARBLED[name]()))


def test_memo_index_costs_nothing(tmp_path):
    """LONG_BINPUT 2**31 makes Python's own Unpickler allocate 34 GB."""
    data = pickled(columns(), 2)
    begin = data.index(b"}q")
    tracemalloc.start()
    found = load_events_dict(write(tmp_path, data[: begin + 1] + b"r\xff\xff\xff\x7f" + data[begin + 1 :]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    same(found, columns())
    assert peak < 1 << 20


def test_nothing_goes_through_pickle_or_np_load(tmp_path, monkeypatch):
    path = write(tmp_path, pickled(columns()))
    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (np, "load")):
        monkeypatch.setattr(module, name, None)
    same(load_events_dict(path), columns())


def test_arrays_cannot_be_written(tmp_path):
    found = load_events_dict(write(tmp_path, pickled(columns())))
    with pytest.raises(ValueError, match="read-only"):
        found["x"][0] = 1


def test_what_is_no_file(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        load_events_dict(tmp_path / "missing.npy")
    with pytest.raises(SourceError, match="regular file|directory"):
        load_events_dict(tmp_path)
    os.mkfifo(tmp_path / "fifo.npy")
    with pytest.raises(SourceError, match="regular file"):
        load_events_dict(tmp_path / "fifo.npy")


def test_sparse_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "sparse.npy"
    with path.open("wb") as handle:
        handle.truncate(safe_npy.MAX_FILE_BYTES + 1)
    with pytest.raises(UnsafeFileError, match="at most"):
        load_events_dict(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), protocol=st.integers(0, 5))
def test_fuzz_changed_bytes(tmp_path, data, protocol):
    """Any change of a good file gives arrays of plain numbers or an error of ours, never another exception."""
    good = bytearray(pickled(columns(5), protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if kind == "set":
            good[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            good[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        elif kind == "delete":
            del good[at : at + data.draw(st.integers(1, 9))]
        else:
            del good[at:]
        if not good:
            break
    check_fuzzed(tmp_path, bytes(good))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stream=st.lists(
        st.sampled_from([bytes([b]) for b in range(256)] + [b"cnumpy\ndtype\n", b"K\x01", b"U\x01x", b")", b"(", b"R", b"b"]), max_size=60
    )
)
def test_fuzz_random_opcodes(tmp_path, stream):
    check_fuzzed(tmp_path, npy(b"".join(stream) + b"."))
    check_fuzzed(tmp_path, npy_files.around(b"".join(stream)))


def check_fuzzed(tmp_path, data):
    path = write(tmp_path, data)
    try:
        found = load_events_dict(path)
    except SourceError:
        return
    for value in found.values():
        assert type(value) is np.ndarray and value.dtype.kind in "biuf"
