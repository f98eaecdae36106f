"""The configuration: what is refused, by which name, and that generated files are in step."""

import re
from pathlib import Path

import pytest
import yaml

from stagebench.config import canonical, load_config, reference_markdown, schema_yaml
from stagebench.errors import ConfigError


@pytest.fixture
def demo(repo: Path) -> dict:
    return yaml.safe_load((repo / "config/config.yaml").read_text())


def edit(config: dict, key: str, value: object) -> dict:
    *parents, last = key.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("frames.cuont", 8),
        ("frames.count", 0),
        ("frames.sampling", "random"),
        ("timing.warmup", "two"),
        ("timing.lengths", ["natural", -1]),
        ("shards.max_failed", 1.5),
        ("models.llava.input", "video"),
        ("variants.batch", [0]),
        ("study", "../escape"),
        ("compare.confidence", 1.0),
        ("datasets.demo.sensor", [480]),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(demo: dict, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load_config(edit(demo, key, value))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("compare.reference", "llava2", "none of the models"),
        ("models.llava.weights", "dummy:x", "whole number"),
        ("models.llava.preset", None, "dummy weights need a preset"),
        ("models.llava.weights", "/models/llava", "models.llava: a preset goes with dummy weights only"),
        ("datasets.demo.sensor", None, "events.size: sensor needs"),
        ("timing.repeats", {"min": 4, "max": 2}, "below repeats.min"),
    ],
)
def test_combinations_that_cannot_be_are_refused(demo: dict, key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(edit(demo, key, value))


def test_every_wrong_key_is_named_at_once(demo: dict) -> None:
    edit(edit(demo, "frames.cuont", 8), "timing.warmup", "two")
    with pytest.raises(ConfigError, match=r"2 wrong(.|\n)*cuont(.|\n)*warmup"):
        load_config(demo)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("timing.max_sample", "Did you mean max_samples?"),
        ("datasets.demo.rot", "Did you mean root?"),
        ("models.llava.frame_as", "Did you mean frames_as?"),
        ("warmup", "It is a key of timing"),
        ("timing.sensor", "It is a key of datasets.<name>"),
        ("frames.xyzzy", "check its spelling against docs/config.md"),
    ],
)
def test_an_unknown_key_is_told_what_may_have_been_meant(demo: dict, key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(edit(demo, key, 1))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("timing.lengths", ["natrual", 8], "timing.lengths.0: Input should be 'natural'. Or: Input should be a valid integer"),
        ("timing.lengths", "natural", "timing.lengths: Expected a list"),
        ("variants.quantization", ["int-4"], "variants.quantization.0: Input should be 'none', "),
        ("variants.engine", [], "variants.engine: Expected at least one."),
        ("frames", None, "frames: Expected keys below it"),
        ("datasets", {"my clips": {"root": "x"}}, "datasets.my clips: A name has letters"),
    ],
)
def test_a_wrong_place_is_one_line_in_words_of_the_configuration(demo: dict, key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(edit(demo, key, value))
    first, *lines = str(caught.value).splitlines()
    assert first == "config: 1 wrong:"
    assert lines[0].strip().startswith(says), lines


def test_a_file_that_is_not_there_is_no_bad_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study\.yaml: no such file"):
        load_config(tmp_path / "study.yaml")


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "\xff"])
def test_a_file_that_is_no_mapping_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="study.yaml"):
        load_config(path)


def test_a_number_of_repeats_is_a_fixed_number(demo: dict) -> None:
    repeats = load_config(edit(demo, "timing.repeats", 5)).timing.repeats
    assert (repeats.min, repeats.max, repeats.target_cv) == (5, 5, None)


def test_canonical_is_independent_of_key_order(demo: dict) -> None:
    reordered = {key: demo[key] for key in reversed(demo)}
    assert canonical(load_config(demo)) == canonical(load_config(reordered))


def test_generated_files_are_in_step(repo: Path) -> None:
    hint = "run `python -m stagebench.config`"
    assert (repo / "config/schemas/config.schema.yaml").read_text() == schema_yaml(), hint
    assert (repo / "docs/config.md").read_text() == reference_markdown(), hint


def test_every_study_in_config_is_valid(repo: Path) -> None:
    for path in sorted((repo / "config").glob("*.yaml")):
        load_config(path)
