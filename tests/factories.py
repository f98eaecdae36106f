"""Synthetic studies for tests: a plan and timing files that fit rows.SCHEMA, without a model and without a clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.config import Config, load_config
from stagebench.rows import SCHEMA
from stagebench.stages import STAGES, TTFT_STAGES
from stagebench.tables import read_table

BASE_MS = {"load": 2.0, "preprocess": 10.0, "h2d": 0.5, "encode": 8.0, "prefill": 30.0}
PACE_MS = 20.0

Edit = Callable[[dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class FakeVariant:
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FakeBlock:
    name: str
    samples: tuple[str, ...]


@dataclass(frozen=True)
class FakeJob:
    dataset: str
    model: str
    variant: FakeVariant
    block: FakeBlock

    @property
    def path(self) -> str:
        return f"timings/{self.dataset}/{self.model}/{self.variant.name}/{self.block.name}.parquet"


@dataclass
class FakePlan:
    config: Config
    jobs: list[FakeJob]

    def timing_fingerprint(self, job: FakeJob) -> Mapping[str, Any]:
        return {}

    @property
    def verify_paths(self) -> list[str]:
        return [f"verify/{model}.json" for model in dict.fromkeys(job.model for job in self.jobs)]


def config(**changes: Any) -> Config:
    """A two-model study's configuration; keyword arguments replace whole sections."""
    base: dict[str, Any] = {
        "study": "fake",
        "datasets": {"set": {"root": "nowhere", "sensor": [480, 640]}},
        "models": {
            "eventgpt": {"adapter": "eventgpt", "input": "events", "weights": "dummy:0", "preset": "tiny"},
            "video_llava": {"adapter": "hf", "input": "frames", "weights": "dummy:0", "preset": "tiny"},
        },
        "compare": {"reference": "video_llava", "resamples": 400},
    }
    return load_config({**base, **changes})


def sample_keys(count: int, sequences: int) -> list[str]:
    return [f"seq_{i % sequences:02d}/{i // sequences:06d}#0000000{i % 10}" for i in range(count)]


def make_rows(
    *,
    dataset: str = "set",
    model: str = "eventgpt",
    variant: str = "generate-00000000",
    samples: Sequence[str] = (),
    repeats: int = 3,
    lengths: Sequence[str] = ("natural", "16"),
    factor: float = 1.0,
    pace: float = PACE_MS,
    tokens: int = 40,
    noise: float = 0.01,
    seed: int = 0,
    cuda: bool = False,
    block: str = "root-aaaaaaaa",
    settings: Mapping[str, Any] | None = None,
    edit: Edit | None = None,
) -> list[dict[str, Any]]:
    """Rows of one job. Stages take `BASE_MS * factor`, decode `pace` ms a step, `noise` is log-normal; `edit` changes or drops a row."""
    rng = np.random.default_rng([seed, *model.encode(), *dataset.encode(), *block.encode()])
    setting = {
        "engine": "generate",
        "quantization": "none",
        "batch": 1,
        "frames": 8,
        "source": "cache",
        "dtype": "float32",
        "attention": "sdpa",
    }
    setting |= settings or {}
    rows = []
    order = 0
    for sample in samples:
        clip, _, digest = sample.partition("#")
        natural = max(2, int(rng.normal(tokens, tokens / 8)))
        for length in lengths:
            count = natural if length == "natural" else int(length)
            ids = [int(i) for i in np.random.default_rng([count, *sample.encode()]).integers(3, 90, count - 1)] + [2]
            for repeat in range(repeats):
                times = {stage: ms * factor * float(np.exp(rng.normal(0, noise))) for stage, ms in BASE_MS.items()}
                times["decode"] = (count - 1) * pace * float(np.exp(rng.normal(0, noise)))
                total = sum(times.values()) + 0.05
                row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
                row |= {"study": "fake", "dataset": dataset, "model": model, "variant": variant, "input": "frames", "preset": "tiny"}
                row |= setting
                row |= {"weights": "dummy:0", "sample": sample, "clip": clip, "sequence": clip.rpartition("/")[0]}
                row |= {"query": "What is there?", "id": f"uuid-{digest}-{clip[-2:]}", "block": block, "repeat": repeat, "order": order}
                row |= {"length": length, "status": "ok", "finish_reason": "eos" if length == "natural" else "length"}
                row |= {f"{stage}_ms": ms for stage, ms in times.items()}
                row |= {"total_ms": total, "residual_ms": 0.05, "ttft_ms": sum(times[s] for s in TTFT_STAGES)}
                if cuda:
                    row |= {f"{stage}_gpu_ms": ms * 0.5 for stage, ms in times.items()} | {"total_gpu_ms": total * 0.5}
                    row |= {f"{stage}_peak_bytes": 1_000_000 * (i + 1) for i, stage in enumerate(STAGES)}
                row |= {"prompt_tokens": 642, "visual_tokens": 582, "new_tokens": count, "steps": count - 1, "token_ids": ids}
                row |= {"token_ms": [times["decode"] * (i + 1) / (count - 1) for i in range(count - 1)] if count > 1 else []}
                row |= {"text": f"a road, said {model}", "encoder_calls": 1, "feature_hash": "00", "kv_bytes": 1000 * count}
                row |= {"weights_bytes": 10_000, "harness_ms": 0.01, "job": f"{model}-{block}", "codes": []}
                order += 1
                edited = edit(row) if edit else row
                if edited is not None:
                    rows.append(edited)
    return rows


def job_metadata(**changes: Any) -> dict[str, Any]:
    return {
        "job": "j",
        "started": "2026-01-24T10:00:00+00:00",
        "finished": "2026-01-24T10:05:00+00:00",
        "shards": ["frames/x/root-aa"],
        "first_call": {"total_ms": 900.0, "stages_ms": {stage: 3 * ms for stage, ms in BASE_MS.items()}, "peak_bytes": {}},
        "warmup": [{"sample": "seq_00/000000#00000000", "total_ms": 450.0}] * 2,
        "anchors": {"before": {"gemv": 1.0}, "after": {"gemv": 1.01}},
        "harness_ms": 0.01,
        "device_busy": {
            "stage_ms": {stage: BASE_MS[stage] / 2 for stage in ("h2d", "encode", "prefill")},
            "decode_ms_per_token": PACE_MS / 2,
        },
        "cost": {"wall_s": 200.0, "samples_s": 190.0, "share": 0.95},
        "device": "cpu",
        "findings": [],
        "resumed": 0,
        **changes,
    }


def study_metadata(**changes: Any) -> dict[str, Any]:
    return {"applied": {}, "dtype": "float32", "model": {"revision": "dummy:0/tiny", "tokenizer": "t0"}, **changes}


def write_rows(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    job: Mapping[str, Any] | None = None,
    study: Mapping[str, Any] | None = None,
    machine: Mapping[str, Any] | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "stagebench.job": json.dumps(job_metadata() if job is None else job),
        "stagebench.study": json.dumps(study_metadata() if study is None else study),
        "stagebench.machine": json.dumps({"cpu": {"name": "Fake CPU"}, "torch": "2.13.0"} if machine is None else machine),
    }
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA).replace_schema_metadata(metadata)
    pq.write_table(table, path)


def make_study(
    results: Path,
    *,
    plan_config: Config | None = None,
    samples: int = 12,
    sequences: int = 4,
    blocks: int = 2,
    models: Mapping[str, Mapping[str, Any]] | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    verified: bool = True,
    shuffle: int | None = None,
    job: Mapping[str, Any] | None = None,
    machine: Mapping[str, Any] | None = None,
    **rows: Any,
) -> FakePlan:
    """A whole study on disk below `results`: timing files, verify reports, and the plan that names them.

    models: name -> keyword arguments of make_rows. variants: name -> settings, the same for all models. shuffle: a seed that shuffles the
    rows of each file and the plan's jobs.
    """
    plan_config = plan_config or config()
    models = models if models is not None else {"eventgpt": {}, "video_llava": {"factor": 2.0, "pace": 25.0, "tokens": 60}}
    variants = variants if variants is not None else {"generate-00000000": {}}
    keys = sample_keys(samples, sequences)
    jobs = []
    for model, arguments in models.items():
        for variant, settings in variants.items():
            for b in range(blocks):
                block = FakeBlock(f"{b:b}-{'ab'[b % 2] * 8}", tuple(keys[b::blocks]))
                fake = FakeJob("set", model, FakeVariant(variant, settings), block)
                made = {"model": model, "variant": variant, "samples": block.samples, "block": block.name, "settings": settings}
                made_rows = make_rows(**{**made, **rows, **arguments})
                if shuffle is not None:
                    np.random.default_rng(shuffle).shuffle(made_rows)  # type: ignore[arg-type]
                write_rows(results / fake.path, made_rows, job=job, machine=machine)
                jobs.append(fake)
        if verified:
            report = {"model": model, "passed": True, "checks": [{"name": "logits", "passed": True, "detail": "max difference 0"}]}
            (results / "verify").mkdir(parents=True, exist_ok=True)
            (results / "verify" / f"{model}.json").write_text(json.dumps(report))
    if shuffle is not None:
        np.random.default_rng(shuffle).shuffle(jobs)  # type: ignore[arg-type]
    return FakePlan(plan_config, jobs)


def rewrite(results: Path, plan: FakePlan, number: int, *, job: Any = None, study: Any = None, machine: Any = None) -> Path:
    """Write one job's file again, with other metadata."""
    path = results / plan.jobs[number].path
    write_rows(path, pq.read_table(path, partitioning=None).to_pylist(), job=job, study=study, machine=machine)
    return path


def table(results: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a merged study's table."""
    return read_table(results / "tables" / f"{name}.parquet").frame.to_dicts()


def stage(results: Path, model: str, length: str) -> dict[str, Any]:
    """A model's row of the table of stages."""
    return next(r for r in table(results, "stages") if r["model"] == model and r["length"] == length)
