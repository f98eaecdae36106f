"""Hostile index files.

`PATHS` maps a name to (a path in an entry, words that the refusal must hold), `TEXTS` to (bytes of an index, words).
"""

import json
from collections.abc import Callable
from typing import Any

QUESTION = "What is there?"


def entry(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A good entry."""
    name = f"seq/{number:06d}"
    return {
        "id": f"id-{number}",
        "split": "test",
        "event_data": f"{name}.npy",
        "mp4_data": f"{name}.mp4",
        "conversations": [{"from": "human", "value": f"<event>\n{QUESTION}"}, {"from": "gpt", "value": ""}],
        **changes,
    }


def index(*entries: dict[str, Any]) -> bytes:
    return json.dumps(entries).encode()


PATHS: dict[str, tuple[Any, str]] = {
    "climbs": ("../../etc/passwd", "climbs by '..'"),
    "climbs_inside": ("seq/../../../etc/passwd", "climbs by '..'"),
    "climbs_and_returns": ("seq/../seq/000000.npy", "climbs by '..'"),
    "absolute": ("/etc/passwd", "absolute path"),
    "drive": ("C:/clips/000000.npy", "absolute path"),
    "backslash": ("seq\\..\\..\\secret.npy", "a backslash"),
    "nul": ("seq/0\x00.npy", "NUL"),
    "newline": ("seq/0\n.npy", "control character 0x0a"),
    "not_utf8": ("seq/\udcff.npy", "bytes that are not UTF-8"),
    "long": ("a/" * 2000 + "b.npy", "path of 4005 characters"),
    "root_itself": (".", "names no file"),
    "number": (7, "expected a relative path, found int"),
    "list": (["a"], "expected a relative path, found list"),
}

TEXTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "expected a JSON list"),
    "no_entries": (lambda: b"[]", "list is empty"),
    "object": (lambda: b'{"a": 1}', "expected a JSON list"),
    "nested_100000_deep": (lambda: b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "nested_in_an_entry": (lambda: b'[{"id": "a", "more": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}]", "nested too deep"),
    "entry_no_object": (lambda: b"[7]", "entry 0 is a int"),
    "cut_off": (lambda: index(entry(0), entry(1))[:-30], "entry 1"),
    "cut_after_an_entry": (lambda: index(entry(0))[:-1], "'end of file' after entry 0"),
    "more_after_the_end": (lambda: index(entry(0)) + b"[]", "after the end of the list"),
    "no_comma": (lambda: index(entry(0))[:-1] + b" " + index(entry(1))[1:], "after entry 0, expected ','"),
    "nan": (lambda: index(entry(0, score=float("nan"))), "NaN is not JSON"),
    "number_of_a_million_digits": (lambda: b'[{"id": ' + b"9" * 1_000_000 + b"}]", "is not JSON"),
    "not_utf8": (lambda: index(entry(0), entry(1)).replace(b"id-1", b"id-\xff"), "is not UTF-8"),
    "key_twice": (lambda: index(entry(0)).replace(b'"split"', b'"id": "x", "split"'), "key 'id' stands there twice"),
    "sample_twice": (
        lambda: index(entry(0), entry(1), entry(0, id="other")),
        "entry 2 (id 'other'): the same clip seq/000000 and question as entry 0 (id 'id-0')",
    ),
    "clip_with_other_files": (
        lambda: index(entry(0), entry(0, event_data="seq/000000.npz", conversations=entry(0)["conversations"][:1])),
        "has other files than in entry 0",
    ),
    "id_a_list": (lambda: index(entry(0, id=["a"])), "id is a list"),
    "split_a_number": (lambda: index(entry(0, split=3)), "split is a int"),
    "no_files": (lambda: index({"id": "a", "conversations": entry()["conversations"]}), "names no file"),
    "no_question": (lambda: index(entry(0, conversations=[{"from": "human", "value": ""}])), "no question"),
    "conversations_a_text": (lambda: index(entry(0, conversations="hello")), "no question"),
    "only_the_placeholder": (lambda: index(entry(0, conversations=[{"from": "human", "value": "<event>\n"}])), "no question"),
    "half_a_surrogate_pair": (lambda: index(entry(0, conversations=[{"from": "human", "value": "a\ud800"}])), "surrogate"),
    "window_backwards": (lambda: index(entry(0, event_window=[5, 5])), "event_window"),
    "window_of_floats": (lambda: index(entry(0, event_window=[0.5, 5])), "event_window"),
    "images_a_number": (lambda: index(entry(0, event_image=5)), "event_image is a int"),
}
