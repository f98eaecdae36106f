"""Which jobs run when files change their times, their names or their folder, and when weights are files."""

import json
import os
from pathlib import Path

from stagebench.plan import trie

from .conftest import Run, Study
from .test_reruns import INDEX, SUMMED, clip_keys, extracted, others, read_plan, timed


def test_a_touched_video(study: Study) -> None:
    os.utime(next(study.data.rglob("*.mp4")))
    assert study.plan().jobs == []


def test_a_renamed_clip(study: Study) -> None:
    """It is another clip: it goes from its leaf and comes to another. Its pixels are taken from no name."""
    keys = clip_keys(study)
    old, new = keys[0], f"{keys[0]}9"
    for folder, suffix in (("mp4", ".mp4"), ("event_npy", ".npy")):
        (study.data / folder / f"{old}{suffix}").rename(study.data / folder / f"{new}{suffix}")
    index = study.data / INDEX
    index.write_text(index.read_text().replace(old, new))
    before = {(bucket, tuple(leaf.clips)) for bucket, leaf in read_plan(study).datasets["demo"].leaves.items()}
    places = trie.sort_keys([new, *keys[1:]])
    cut = trie.cut(places, [1] * len(places), 2)
    come = {(trie.bucket_name(bits), tuple(sorted(key for _, key in places[a:b]))) for bits, a, b in cut} - before
    run = study.plan()
    assert extracted(run) == sorted((kind, bucket) for bucket, _ in come for kind in ("events", "frames"))
    assert timed(run) == ["eventgpt", "llava", "video_llava"]
    assert others(run) == SUMMED


def test_weights_from_a_folder(study: Study) -> None:
    """Their content is what counts: of the folder's name only that it is another model's in the config."""
    folder = study.folder / "weights"
    _write_weights(folder, b"one")
    study.configure(lambda c: c["models"]["llava"].update(weights=str(folder), preset=None))
    first = study.plan()
    assert _is_one_models(first)
    os.utime(folder / "model.safetensors")
    assert study.plan().jobs == first.jobs


def _write_weights(folder: Path, content: bytes) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (folder / "model.safetensors").write_bytes(content)


def _is_one_models(run: Run) -> bool:
    return (extracted(run), timed(run), others(run)) == ([], ["llava"], {**SUMMED, "verify": 1})
