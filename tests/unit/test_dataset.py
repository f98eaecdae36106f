"""The index: keys, queries, and the guard on every path."""

import json
import os
from hashlib import blake2b

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attacks.index_files import PATHS, QUESTION, TEXTS, entry, index
from stagebench.config import DatasetConfig
from stagebench.dataset import index as _index
from stagebench.dataset import load_dataset, resolve
from stagebench.errors import ConfigError, DatasetError, UnsafePathError

NAME = "EventGPT_Instruction_Subset.json"


def load(root, data, **options):
    (root / NAME).write_bytes(data)
    return load_dataset("set", DatasetConfig(root=str(root), **options))


def key(clip, query=QUESTION):
    return f"{clip}#{blake2b(query.encode(), digest_size=4).hexdigest()}"


def test_real_index(real_data):
    dataset = load_dataset("real", DatasetConfig(root=str(real_data / "real")))
    assert len(dataset.samples) == len(dataset.clips) == 4
    clip = dataset.clips["interlaken_00_d/000069"]
    assert clip.sequence == "interlaken_00_d" and clip.window is None
    assert clip.files == {
        "events": "event_npy/interlaken_00_d/000069.npy",
        "mp4": "mp4/interlaken_00_d/000069.mp4",
        "frames": "video/interlaken_00_d/000069",
    }
    sample = dataset.samples[1]
    assert sample.query == "What are the key elements in this scene?" and sample.id == "real_000001" and sample.split == "test"
    assert sample.key == key("interlaken_00_d/000069", sample.query) and sample.sequence == "interlaken_00_d"
    assert resolve(dataset.root, clip.files["mp4"]).is_file()


@pytest.mark.parametrize(
    ("files", "clip", "kinds"),
    [
        (
            {"event_data": "s/1.npy", "mp4_data": "s/1.mp4", "video_data": "s/1"},
            "s/1",
            {"events": "event_npy/s/1.npy", "mp4": "mp4/s/1.mp4", "frames": "video/s/1"},
        ),
        ({"event_data": "s/1.npy"}, "s/1", {"events": "event_npy/s/1.npy"}),
        ({"mp4_data": "s/1.mp4"}, "s/1", {"mp4": "mp4/s/1.mp4"}),
        ({"video_data": "s/1/"}, "s/1", {"frames": "video/s/1"}),
        ({"video_data": "s/1.5"}, "s/1.5", {"frames": "video/s/1.5"}),
        ({"video_data": "s/1.mp4"}, "s/1", {"mp4": "mp4/s/1.mp4"}),
        ({"event_data": "s/1.npy", "mp4_data": ""}, "s/1", {"events": "event_npy/s/1.npy"}),
        ({"event_data": "s/1.npy", "mp4_data": None}, "s/1", {"events": "event_npy/s/1.npy"}),
        ({"event_data": "a/b/1.npy", "mp4_data": "v/2.mp4"}, "a/b/1+v/2", {"events": "event_npy/a/b/1.npy", "mp4": "mp4/v/2.mp4"}),
        ({"event_data": "./s//1.npz"}, "s/1", {"events": "event_npy/s/1.npz"}),
        ({"event_data": "Fahrt ü/1.npy"}, "Fahrt ü/1", {"events": "event_npy/Fahrt ü/1.npy"}),
        ({"event_data": "1.npy"}, "1", {"events": "event_npy/1.npy"}),
        ({"event_data": "s/.npy"}, "s/.npy", {"events": "event_npy/s/.npy"}),
        ({"event_data": "s/events.h5", "event_window": [5, 9]}, "s/events@5-9", {"events": "event_h5/s/events.h5"}),
        (
            {"event_image": ["s/1_10.png", "s/1_2.png", "s/1_0.png"]},
            "s/1",
            {"images": ("event_image/s/1_0.png", "event_image/s/1_2.png", "event_image/s/1_10.png")},
        ),
        ({"event_data": "s/1.npy", "event_image": "s/1"}, "s/1", {"events": "event_npy/s/1.npy", "images": "event_image/s/1"}),
    ],
)
def test_files_and_keys(tmp_path, files, clip, kinds):
    dataset = load(tmp_path, json.dumps([{"id": 1, "conversations": entry()["conversations"], **files}]).encode())
    assert {k: dict(c.files) for k, c in dataset.clips.items()} == {clip: kinds}
    assert dataset.samples[0].key == key(clip) and dataset.samples[0].id == "1"
    assert dataset.samples[0].sequence == clip.partition("+")[0].rpartition("/")[0]
    assert dataset.clips[clip].window == (tuple(files["event_window"]) if "event_window" in files else None)


@pytest.mark.parametrize(
    ("value", "query"),
    [
        ("<event>\nWhat?", "What?"),
        ("What?\n<event>", "What?"),
        ("<event>What?", "What?"),
        ("What <b>is</b> it?\nSay.", "What <b>is</b> it?\nSay."),
        ("  What?  ", "What?"),
    ],
)
def test_query_is_the_first_human_turn(tmp_path, value, query):
    turns = [{"from": "gpt", "value": "no"}, {"from": "human", "value": value}, {"from": "human", "value": "later"}]
    assert load(tmp_path, index(entry(0, conversations=turns))).samples[0].query == query


def test_fresh_ids_and_another_order_change_no_key(tmp_path):
    first = load(tmp_path, index(entry(0), entry(1), entry(2)))
    again = load(tmp_path, index(entry(2, id="x"), entry(0, id="x"), entry(1, id="x")))
    assert [s.key for s in first.samples] == [s.key for s in again.samples] == sorted(s.key for s in first.samples)
    assert first.clips == again.clips


def test_several_questions_share_a_clip(tmp_path):
    second = [{"from": "human", "value": "And now?"}]
    dataset = load(tmp_path, index(entry(0), entry(0, conversations=second)))
    assert len(dataset.clips) == 1 and {s.query for s in dataset.samples} == {QUESTION, "And now?"}
    one = load(tmp_path, index(entry(0), entry(0, conversations=second)), query="Only this?")
    assert [s.key for s in one.samples] == [key("seq/000000", "Only this?")]


def test_config_query_needs_no_conversation(tmp_path):
    bare = {"event_data": "s/1.npy"}
    assert load(tmp_path, index(bare), query="What?").samples[0].query == "What?"
    with pytest.raises(DatasetError, match=r"entry 0 \(id '0'\): no question.*datasets.set.query"):
        load(tmp_path, index(bare))
    with pytest.raises(ConfigError, match="query is empty"):
        load(tmp_path, index(bare), query=" ")


@pytest.mark.parametrize(
    ("name", "text"),
    [("q.txt", "One?\n\n Two? \n"), ("q.json", '["One?", "Two?"]'), ("q.json", '[{"question": "One?"}, {"question": "Two?"}]')],
)
def test_questions_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    dataset = load(tmp_path, index(entry(0), entry(1)), questions_file=str(tmp_path / name))
    assert sorted((s.clip, s.query) for s in dataset.samples) == [(f"seq/00000{i}", q) for i in (0, 1) for q in ("One?", "Two?")]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("q.txt", b"A?\nB?\nA?\n", "question 3 repeats question 1"),
        ("q.txt", b"\n\n", "holds no question"),
        ("q.txt", b"\xff", "not UTF-8"),
        ("q.json", b"{}", "a JSON dict"),
        ("q.json", b"[1]", "question 1 is '1'"),
        ("q.json", b"[" * 100_000, "not JSON"),
    ],
)
def test_wrong_questions_file(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DatasetError, match=words):
        load(tmp_path, index(entry(0)), questions_file=str(tmp_path / name))


def test_query_and_questions_file_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="Keep one"):
        load(tmp_path, index(entry(0)), query="A?", questions_file="q.txt")


def test_max_samples_takes_the_first_by_key(tmp_path):
    dataset = load(tmp_path, index(*(entry(n) for n in (3, 1, 2, 0))), max_samples=2)
    assert [s.clip for s in dataset.samples] == ["seq/000000", "seq/000001"] == sorted(dataset.clips)


@pytest.mark.parametrize("field", ["event_data", "mp4_data", "video_data", "event_image"])
@pytest.mark.parametrize("name", PATHS)
def test_path_attacks(tmp_path, field, name):
    path, words = PATHS[name]
    if field == "event_image":
        path, words = [path], words
    data = json.dumps([entry(0), entry(1, **{field: path})]).encode()
    with pytest.raises(DatasetError) as caught:
        load(tmp_path, data)
    assert words in str(caught.value).replace(str(tmp_path), "") and "entry 1 (id 'id-1')" in str(caught.value)
    if not isinstance(PATHS[name][0], str) or name == "root_itself":
        return
    assert isinstance(caught.value, UnsafePathError)
    with pytest.raises(UnsafePathError):
        resolve(tmp_path, PATHS[name][0])


@pytest.mark.parametrize("name", TEXTS)
def test_text_attacks(tmp_path, name):
    build, words = TEXTS[name]
    with pytest.raises(DatasetError) as caught:
        load(tmp_path, build())
    assert words in str(caught.value).replace(str(tmp_path), "") and NAME in str(caught.value) and len(str(caught.value)) < 1000


def test_index_too_large_is_not_read(tmp_path):
    with (tmp_path / NAME).open("wb") as handle:
        handle.truncate(_index.MAX_INDEX_BYTES + 1)
    with pytest.raises(DatasetError, match="at most 536,870,912 are read"):
        load_dataset("set", DatasetConfig(root=str(tmp_path)))


def test_index_that_is_no_file(tmp_path):
    with pytest.raises(DatasetError, match="No such file"):
        load_dataset("set", DatasetConfig(root=str(tmp_path)))
    with pytest.raises(DatasetError, match="no folder at"):
        load_dataset("set", DatasetConfig(root=str(tmp_path / "none")))
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(DatasetError, match="not a regular file"):
        load_dataset("set", DatasetConfig(root=str(tmp_path)))
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(DatasetError, match="not a regular file"):
        load_dataset("set", DatasetConfig(root=str(tmp_path)))


def test_byte_order_mark_is_taken(tmp_path):
    assert len(load(tmp_path, b"\xef\xbb\xbf" + index(entry(0))).samples) == 1


@pytest.fixture
def tree(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "event_npy" / "seq", root / "mp4" / "seq", outside / "seq"):
        folder.mkdir(parents=True)
    (outside / "seq" / "000000.npy").write_bytes(b"secret")
    (root / "event_npy" / "seq" / "000000.npy").write_bytes(b"clip")
    return root, outside


@pytest.mark.parametrize("what", ["file", "folder", "kind", "relative", "chain"])
def test_link_out_of_the_root(tree, what):
    root, outside = tree
    seq = root / "event_npy" / "seq"
    if what in ("file", "relative", "chain"):
        (seq / "000000.npy").unlink()
        target = {"file": outside / "seq" / "000000.npy", "relative": "../../../outside/seq/000000.npy", "chain": root / "hop"}[what]
        if what == "chain":
            (root / "hop").symlink_to(outside / "seq" / "000000.npy")
        (seq / "000000.npy").symlink_to(target)
    else:
        (seq / "000000.npy").unlink()
        seq.rmdir()
        if what == "folder":
            seq.symlink_to(outside / "seq")
        else:
            seq.parent.rmdir()
            seq.parent.symlink_to(outside)
    with pytest.raises(UnsafePathError, match=r"clip seq/000000: .*outside the dataset's root"):
        load(root, index(entry(0)))
    with pytest.raises(UnsafePathError, match="outside the dataset's root"):
        resolve(root, "event_npy/seq/000000.npy")


def test_frame_folder_and_index_linked_out(tree):
    root, outside = tree
    (root / "video" / "seq").mkdir(parents=True)
    (root / "video" / "seq" / "000000").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="outside the dataset's root"):
        load(root, index(entry(0, video_data="seq/000000")))
    (root / NAME).unlink()
    (outside / "index.json").write_bytes(index(entry(0)))
    (root / NAME).symlink_to(outside / "index.json")
    with pytest.raises(UnsafePathError, match="outside the dataset's root"):
        load_dataset("set", DatasetConfig(root=str(root)))


def test_links_inside_and_a_linked_root_are_fine(tree, tmp_path):
    root, _ = tree
    (root / "event_npy" / "seq" / "000001.npy").symlink_to("000000.npy")
    (tmp_path / "alias").symlink_to(root)
    (root / NAME).write_bytes(index(entry(0), entry(1)))
    dataset = load_dataset("set", DatasetConfig(root=str(tmp_path / "alias")))
    assert resolve(dataset.root, dataset.clips["seq/000001"].files["events"]).read_bytes() == b"clip"


def test_folder_with_the_roots_name_as_prefix_is_outside(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root-other").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "root-other")
    with pytest.raises(UnsafePathError):
        resolve(tmp_path / "root", "link")


def test_files_need_not_be_there_yet(tmp_path):
    assert len(load(tmp_path, index(entry(0), entry(1))).clips) == 2


def test_no_system_call_a_file(tmp_path, monkeypatch):
    """Planning a million clips must not stat two million files: links are found by listing folders."""
    entries = [entry(n) for n in range(300)]
    for folder in ("event_npy", "mp4"):
        (tmp_path / folder / "seq").mkdir(parents=True)
        for n in range(300):
            (tmp_path / folder / "seq" / f"{n:06d}.npy").touch()
    calls = []
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: calls.append(path) or real(path))
    load(tmp_path, index(*entries))
    assert len(calls) < 10


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_index(tmp_path, data):
    """Any change of a good index gives a dataset below the root or an error of ours."""
    text = bytearray(index(entry(0), entry(1)))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"../", b"/", b'"', b"[", b"{", b"\\u0000", b"\\ud800", b"null", b"1e999"]))
        )
        if not text:
            break
    try:
        dataset = load(tmp_path, bytes(text))
    except DatasetError:
        return
    for clip in dataset.clips.values():
        for value in clip.files.values():
            for path in value if isinstance(value, tuple) else (value,):
                assert resolve(tmp_path, path).is_relative_to(tmp_path)
