"""The study's configuration: one frozen, typed object, and the only place that knows its keys.

`config/schemas/config.schema.yaml` is generated from these classes (`python -m stagebench.config`) and kept in step by a test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stagebench._config_words import explain
from stagebench.errors import ConfigError
from stagebench.files import bounded_text

__all__ = ["Config", "ModelConfig", "canonical", "load_config", "reference_markdown", "schema_yaml"]

Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Length = Literal["natural"] | Positive

MAX_CONFIG_BYTES = 256 << 10
"""PyYAML's time grows with the square of some inputs: it takes seconds for these bytes, minutes for a megabyte."""

FRAME_SOURCES = ("cache", "mp4", "frames")
EVENT_SOURCES = ("cache", "npy", "png")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DatasetConfig(_Section):
    root: str = Field(description="Folder that holds the index and the clips. Relative to the working directory.")
    index: str = Field("EventGPT_Instruction_Subset.json", description="Index JSON, relative to root.")
    sensor: tuple[Positive, Positive] | None = Field(
        None, description="Event sensor's (height, width) in pixels; null takes each clip's own extent."
    )
    query: str | None = Field(None, description="One query for every sample, in place of each sample's own human turn.")
    questions_file: str | None = Field(None, description="JSON list or text file (one a line) of queries asked of every clip.")
    max_samples: Positive | None = Field(None, description="Take the first n samples by key; null takes all.")


class FramesConfig(_Section):
    source: Literal["cache", "mp4", "frames"] = Field(
        "cache", description="Where the timed load reads: the shard, the MP4 itself, or a folder of images."
    )
    count: Positive = Field(8, description="Frames taken of each clip.")
    sampling: Literal["linspace", "stride"] = Field(
        "linspace", description="linspace: floor(i(T-1)/(N-1)), first and last included. stride: floor(iT/N)."
    )
    short_clips: Literal["error", "repeat"] = Field(
        "error", description="A clip with fewer frames than count fails (error) or repeats frames."
    )
    rotation: Literal["apply", "refuse", "ignore"] = Field(
        "apply", description="Rotation metadata: applied as players do, refused, or ignored."
    )


class EventsConfig(_Section):
    source: Literal["cache", "npy", "png"] = Field(
        "cache", description="Where the timed load reads: the shard, the event file (read and render), or PNG event images."
    )
    representation: Literal["frames", "voxel", "clip"] = Field(
        "frames",
        description="What an event shard holds: rendered event frames, voxel grids, or the packed events themselves (then load renders).",
    )
    parts: Positive = Field(5, description="Event frames (or voxel bins) a clip.")
    split: Literal["count", "time"] = Field("count", description="Parts of equal event count or equal time.")
    policy: Literal["original", "negative_on_top"] = Field(
        "original", description="original: last event at a pixel wins. negative_on_top: p==0 wins."
    )
    size: Literal["sensor", "clip", "part"] = Field(
        "sensor", description="Frame size: the sensor's, the clip's extent, or each part's own (as the original code)."
    )


class CacheConfig(_Section):
    codec: Literal["none", "lz4", "zstd"] = Field("none", description="Compression of frame shards; none reads fastest.")
    resize: Positive | None = Field(
        None, description="Store frames with this shortest edge in pixels (bicubic); null keeps the clip's size."
    )
    scratch: str | None = Field(None, description="Node-local folder that shards are copied to before a timing job reads them.")


class ShardsConfig(_Section):
    max_clips: Positive = Field(64, description="A leaf of the plan's trie splits above this many clips.")
    max_failed: Share = Field(0.05, description="Share of a shard's clips that may fail before its job fails.")


class DraftConfig(_Section):
    weights: str = Field(description='A local folder, a hub id, or "dummy:<seed>" for random weights.')
    preset: Slug | None = Field(None, description="Shape of dummy weights: tiny, or the published shape (7b).")
    adapter: Slug | None = Field(None, description="Registered adapter; null takes the model's own.")
    architecture: Slug | None = Field(None, description="Preset family for dummy weights; null takes the model's own.")


class ModelConfig(_Section):
    adapter: Slug = Field(description="Registered adapter: eventgpt, hf.")
    architecture: Slug | None = Field(
        None, description="Preset family for dummy weights (llava, video_llava, qwen2_5_vl, ...); null takes the model's own name."
    )
    input: Literal["events", "frames"] = Field(description="What the model sees: event frames or video frames.")
    frames_as: Literal["grid", "images", "first", "video"] | None = Field(
        None, description="How an image model takes several frames; null is the architecture's default."
    )
    weights: str = Field(description='A local folder, a hub id, or "dummy:<seed>" for random weights.')
    preset: Slug | None = Field(None, description="Shape of dummy weights: tiny, or the published shape (7b).")
    prompt: str | None = Field(None, description="Prompt template with {query} and, where it helps, {n}; null is the architecture's own.")
    draft: DraftConfig | None = Field(
        None,
        description="Engine speculative: the smaller model that guesses, {weights, preset, ...}. Its tokenizer must be equal.",
    )

    @model_validator(mode="after")
    def _preset_goes_with_dummy(self) -> ModelConfig:
        if self.weights.startswith("dummy:"):
            if not self.weights[6:].isdigit():
                raise ValueError(f'weights {self.weights!r}: expected "dummy:<seed>" with a whole number')
            if self.preset is None:
                raise ValueError("dummy weights need a preset: tiny or 7b")
        elif self.preset is not None:
            raise ValueError("a preset goes with dummy weights only: remove it, or set weights: dummy:0")
        return self


class VariantsConfig(_Section):
    """Axes of settings; their product is measured. A setting given once applies to all."""

    engine: tuple[Slug, ...] = Field(("generate",), min_length=1, description="How tokens are produced.")
    quantization: tuple[Literal["none", "int8", "int4", "nf4"], ...] = Field(
        ("none",), min_length=1, description="Weight-only quantisation of the language model."
    )
    batch: tuple[Positive, ...] = Field((1,), min_length=1, description="Samples a forward pass, left-padded.")
    attention: tuple[Literal["sdpa", "eager", "flash_attention_2"], ...] = Field(
        ("sdpa",), min_length=1, description="Attention implementation."
    )
    frames: tuple[Positive, ...] = Field(
        (), description="Frame counts (or event parts) to compare; empty takes frames.count and events.parts."
    )
    source: tuple[Literal["cache", "mp4", "frames", "npy", "png"], ...] = Field(
        (), description="Load sources to compare; each model takes those of its input. Empty: as set above."
    )
    keep_visual: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1.0,), min_length=1, description="Shares of the visual tokens that go on to the language model: those that CLS attends to most."
    )
    preprocess: tuple[Literal["pil", "device"], ...] = Field(
        ("pil",), min_length=1, description="Where frames are resized and normalised: by PIL on the CPU, or by torch on the model's device."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: bfloat16 on CUDA, float32 on CPU.")
    temperature: Annotated[float, Field(ge=0)] = Field(0, description="0 decodes greedily.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1, description="Nucleus sampling; 1 is off.")

    @field_validator("engine", "quantization", "batch", "attention", "frames", "source", "keep_visual", "preprocess", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return value if isinstance(value, (list, tuple)) else (value,)


class RepeatsConfig(_Section):
    min: Positive = Field(3, description="Runs of every sample.")
    max: Positive = Field(3, description="Runs of a sample that stays noisy.")
    target_cv: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Stop once a sample's coefficient of variation of total_ms is at or below this."
    )
    timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="No further repeats are begun after this many seconds of measuring."
    )

    @model_validator(mode="after")
    def _ordered(self) -> RepeatsConfig:
        if self.max < self.min:
            raise ValueError(f"repeats.max {self.max} is below repeats.min {self.min}")
        return self


class TimingConfig(_Section):
    max_samples: Positive = Field(256, description="Samples a timing job at most: one model load.")
    warmup: Annotated[int, Field(ge=0)] = Field(2, description="Samples run before measuring, excluded and recorded.")
    repeats: RepeatsConfig = Field(RepeatsConfig(), description="Runs of each sample: a number, or {min, max, target_cv, timeout_s}.")
    lengths: tuple[Length, ...] = Field(
        ("natural",), min_length=1, description="natural: stop at EOS, capped. A number: exactly that many tokens."
    )
    max_new_tokens: Positive = Field(512, description="Cap of the natural length.")
    seed: int = Field(0, description="Seed of sample order and of sampling.")
    exclusive: bool = Field(True, description="Nothing else runs beside a measurement.")
    reuse: bool = Field(True, description="Rows of unchanged samples are taken over from earlier jobs of the same fingerprint.")
    prefetch: bool = Field(
        False,
        description="Load and preprocess the next sample while the device works on this one: for throughput, never for latency. Rows then "
        "carry source +prefetch, and plain_share must be 0.",
    )
    plain_share: Share = Field(0.1, description="Share of samples also run without instrumentation, to show that it costs nothing.")
    sample_timeout_s: Annotated[float, Field(gt=0)] = Field(600, description="A sample running longer than this gets status timeout.")

    @field_validator("repeats", mode="before")
    @classmethod
    def _number_of_repeats(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _prefetch_is_for_throughput(self) -> TimingConfig:
        if self.prefetch and self.plain_share > 0:
            raise ValueError(
                "prefetch overlaps samples, so no run stands alone for its plain twin to be compared with. Set plain_share: 0 for a "
                "throughput study, or prefetch: false for latencies"
            )
        return self


class CompareConfig(_Section):
    reference: Slug | None = Field(None, description="The model others are compared with; null takes the first.")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="Level of bootstrap intervals.")
    resamples: Annotated[int, Field(ge=200)] = Field(10_000, description="Bootstrap resamples.")
    same_within: Share = Field(0.02, description="Ratios inside 1 +- this count as SAME when the whole interval lies there.")


class ReportConfig(_Section):
    title: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Heading of report.html; null takes the study's name."
    )


class Config(_Section):
    study: Slug = Field(description="Name of the study; results go to results/<study>.")
    datasets: dict[Slug, DatasetConfig] = Field(min_length=1)
    frames: FramesConfig = FramesConfig()
    events: EventsConfig = EventsConfig()
    cache: CacheConfig = CacheConfig()
    shards: ShardsConfig = ShardsConfig()
    models: dict[Slug, ModelConfig] = Field(min_length=1)
    variants: VariantsConfig = VariantsConfig()
    timing: TimingConfig = TimingConfig()
    compare: CompareConfig = CompareConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        reference = self.compare.reference
        if reference is not None and reference not in self.models:
            raise ValueError(f"compare.reference {reference!r} is none of the models {sorted(self.models)}")
        if self.events.size == "sensor" and any(m.input == "events" for m in self.models.values()):
            bare = sorted(name for name, d in self.datasets.items() if d.sensor is None)
            if bare:
                raise ValueError(f"events.size: sensor needs datasets.{bare[0]}.sensor: [height, width], or set events.size: clip")
        if "speculative" in self.variants.engine:
            without = [name for name, m in self.models.items() if m.draft is None]
            if without:
                raise ValueError(f"variants.engine: speculative needs models.{without[0]}.draft: {{weights: ..., preset: ...}}")
        for source in self.variants.source:
            kinds = {"events"} if source in ("npy", "png") else {"frames"} if source in ("mp4", "frames") else {"events", "frames"}
            if not any(m.input in kinds for m in self.models.values()):
                raise ValueError(f"variants.source {source!r}: no model takes {sorted(kinds)[0]}")
        return self


def load_config(source: str | Path | Mapping[str, Any]) -> Config:
    """Validate a YAML file or a mapping (Snakemake's `config`).

    Raises ConfigError that names every wrong key, what was found there, and what is expected.
    """
    where = "config"
    if isinstance(source, (str, Path)):
        where = str(source)
        try:
            source = yaml.safe_load(bounded_text(Path(source), MAX_CONFIG_BYTES))
        except FileNotFoundError:
            raise ConfigError(f"{where}: no such file. Paths are relative to the folder in which you start.") from None
        except Exception as error:  # PyYAML lets out what its constructors meet: ValueError for 2001-99-99, IndexError for !!int ''
            raise ConfigError(f"{where}: cannot be read as YAML: {type(error).__name__}: {error}") from error
    if not isinstance(source, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys, found {type(source).__name__}")
    try:
        return Config.model_validate(dict(source))
    except ValidationError as error:
        lines = explain(Config, error.errors())
        raise ConfigError(f"{where}: {len(lines)} wrong:\n" + "\n".join(f"  {line}" for line in lines)) from None


def canonical(value: Any) -> str:
    """One JSON string for equal settings: sorted keys, no spaces. What Snakemake compares and digests are taken over."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def schema_yaml() -> str:
    """The JSON Schema of the configuration, as YAML, for editors and for docs."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return "# Generated by `python -m stagebench.config`; do not edit.\n" + yaml.safe_dump(schema, sort_keys=False, width=140)


def reference_markdown() -> str:
    """docs/config.md: every key with its type, default and meaning, from the classes above."""
    lines = [
        "# Configuration reference",
        "",
        "Generated by `python -m stagebench.config`; do not edit.",
        "One YAML file is one study. An unknown key or a wrong type is refused by name.",
    ]
    sections: list[tuple[str, type[_Section]]] = [
        ("(top level)", Config),
        ("datasets.&lt;name&gt;", DatasetConfig),
        ("frames", FramesConfig),
        ("events", EventsConfig),
        ("cache", CacheConfig),
        ("shards", ShardsConfig),
        ("models.&lt;name&gt;", ModelConfig),
        ("models.&lt;name&gt;.draft", DraftConfig),
        ("variants", VariantsConfig),
        ("timing", TimingConfig),
        ("timing.repeats", RepeatsConfig),
        ("compare", CompareConfig),
        ("report", ReportConfig),
    ]
    for title, section in sections:
        lines += ["", f"## {title}", "", "| key | default | meaning |", "|---|---|---|"]
        for name, info in section.model_fields.items():
            if section is Config and name != "study":
                continue
            default = "required" if info.is_required() else f"`{json.dumps(_plain(info.default))}`"
            lines.append(f"| `{name}` | {default} | {info.description or ''}{_choices(section, name)} |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _choices(section: type[_Section], name: str) -> str:
    found = re.findall(r'"enum": \[([^\]]*)\]', json.dumps(section.model_json_schema()["properties"][name]))
    return f" One of: {', '.join(json.loads('[' + found[0] + ']'))}." if found else ""


if __name__ == "__main__":
    Path("config/schemas/config.schema.yaml").write_text(schema_yaml(), encoding="utf-8")
    Path("docs/config.md").write_text(reference_markdown(), encoding="utf-8")
