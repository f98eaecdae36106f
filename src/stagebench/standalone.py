"""A whole study in one process, without Snakemake: the same plan, jobs and merge as the rules, one after the other."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from stagebench._ownership import owned
from stagebench.config import Config, load_config
from stagebench.errors import ConfigError

if TYPE_CHECKING:
    from stagebench.verify import VerifyReport

Progress = Callable[[str, int, int, str], None]
"""(what, done, of, a note on the pace)."""

__all__ = ["StudyResult", "config_from_flags", "run_study", "stands", "verify_study"]

log = logging.getLogger(__name__)

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "eventgpt": {"adapter": "eventgpt", "input": "events"},
    "video_llava": {"adapter": "hf", "input": "frames"},
    "llava": {"adapter": "hf", "input": "frames", "frames_as": "grid"},
}
"""Models that `stagebench run --models` knows by name; any other is taken as a Hugging Face image-text model on video frames."""


@dataclass(frozen=True)
class StudyResult:
    """What a finished study left behind."""

    results: Path
    report: Path
    extracted: int
    timed: int
    """Jobs that really ran; the others were already there."""


def config_from_flags(
    dataset_dir: Path,
    *,
    study: str = "run",
    dataset_json: str | None = None,
    models: Sequence[str] = tuple(KNOWN_MODELS),
    preset: str = "tiny",
    frames: int = 8,
    event_parts: int = 5,
    sensor: tuple[int, int] | None = None,
    max_samples: int | None = None,
    warmup: int = 2,
    repeats: int = 1,
    max_new_tokens: int = 512,
    fixed_tokens: int | None = None,
    query: str | None = None,
    questions_file: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    engine: str = "generate",
    dtype: str = "auto",
    seed: int = 0,
    source: str = "cache",
) -> Config:
    """The flags of `stagebench run` as a study's configuration.

    models: `name` (random weights of the preset) or `name=weights` (a local folder, a hub id, or dummy:<seed>).
    Raises ConfigError that names the wrong flag's key.
    """
    stanzas = dict(_stanza(text, preset) for text in models)
    if len(stanzas) != len(models):
        raise ConfigError(f"--models {' '.join(models)}: a name stands twice. Give each model once.")
    dataset = {"root": str(dataset_dir), "sensor": sensor, "query": query, "questions_file": questions_file, "max_samples": max_samples}
    if dataset_json:
        dataset["index"] = dataset_json
    return load_config(
        {
            "study": _slug(study, "run"),
            "datasets": {_slug(dataset_dir.resolve().name, "data"): dataset},
            "frames": {"count": frames, "source": source if source in ("cache", "mp4", "frames") else "cache"},
            "events": {
                "parts": event_parts,
                "size": "sensor" if sensor else "clip",
                "source": {"mp4": "npy", "frames": "png"}.get(source, source),
            },
            "models": stanzas,
            "variants": {"engine": [engine], "dtype": dtype, "temperature": temperature, "top_p": top_p},
            "timing": {
                "warmup": warmup,
                "repeats": repeats,
                "lengths": ["natural", *([fixed_tokens] if fixed_tokens else [])],
                "max_new_tokens": max_new_tokens,
                "seed": seed,
            },
        }
    )


def _slug(folder: str, otherwise: str) -> str:
    """A folder's name as that of a study or dataset, which stand in file names: what may not be there becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", folder).lstrip("_.-")[:64] or otherwise


def _stanza(text: str, preset: str) -> tuple[str, dict[str, Any]]:
    name, given, weights = text.partition("=")
    if not given and "/" in name:
        raise ConfigError(f"--models {name}: expected a name, or name=weights. Give it a name, as in llava={name}")
    weights = weights or "dummy:0"
    stanza = dict(KNOWN_MODELS.get(name, {"adapter": "hf", "input": "frames"}), weights=weights)
    if weights.startswith("dummy:"):
        stanza["preset"] = preset
    return name, stanza


def run_study(
    config: Config,
    results: Path,
    cache: Path,
    *,
    device: str | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> StudyResult:
    """Plan, verify, extract, time, merge and report. What is there already under the plan's names, and was measured as planned, is kept.

    progress: called with (what, done, of, a note on the pace) as steps end. Raises BusyError when another run works in `results`.
    """
    with owned(results):
        return _run_study(config, results, cache, device, threads, progress)


def _run_study(config: Config, results: Path, cache: Path, device: str | None, threads: int, progress: Progress | None) -> StudyResult:
    from stagebench.engines import require
    from stagebench.extract import extract_shard
    from stagebench.merge import merge
    from stagebench.plan import build_plan
    from stagebench.report import write_report
    from stagebench.session import run_job
    from stagebench.thumbnails import write_samples
    from stagebench.verify import run_verify

    tell = progress or (lambda what, done, of, note: log.info("%s %d/%d %s", what, done, of, note))
    require(*config.variants.engine)
    plan = build_plan(config, cache, earlier=results / "plan.json", threads=threads)
    plan.write(results / "plan.json")
    plan.write_basis(results)
    for proof in plan.verify_paths:  # reads clips live: a model that is not to be had is said before hours of extraction
        run_verify(plan, plan.verify_job(proof), results / proof, cache=cache, device=device)
    pace = _Pace()
    extracted = timed = clips = samples = 0
    all_clips, all_samples = sum(len(shard.clips) for shard in plan.shards), sum(len(job.block.samples) for job in plan.jobs)
    for shard in plan.shards:
        output = cache / f"{shard.name}.parquet"
        if not output.exists():
            spec = plan.specs[shard.spec_id]
            part = _Part(tell, "extract clips", clips, all_clips, pace, frames=int(spec.get("count", spec.get("parts", 0))))
            extract_shard(plan, shard, output, cache=cache, threads=threads, progress=part.clips)
            extracted += 1
        clips += len(shard.clips)
        tell("extract clips", clips, all_clips, "")
    for job in plan.jobs:
        output = results / job.path
        if not stands(output, plan.timing_fingerprint(job)):
            part = _Part(tell, "time samples", samples, all_samples, _Pace())
            run_job(plan, job, output, cache=cache, device=device, progress=part.samples, watch=part.pace.watch)
            timed += 1
        samples += len(job.block.samples)
        tell("time samples", samples, all_samples, "")
    plan.take_basis(results, plan.basis)
    merge(plan, results)
    write_samples(plan, results, cache)
    report = write_report(results, title=config.report.title)
    return StudyResult(results, report, extracted, timed)


class _Pace:
    """What a person who waits wants to know: frames a second, and the time a token of this job with its running interval."""

    def __init__(self) -> None:
        self.begun, self.frames = time.monotonic(), 0
        self.ms: list[float] = []

    def watch(self, rows: Sequence[Mapping[str, Any]]) -> None:
        found = [(r.get("decode_ms"), r.get("steps")) for r in rows if r.get("status") in ("ok", "capped")]
        self.ms += [ms / steps for ms, steps in found if ms is not None and steps]

    def of_frames(self) -> str:
        return f"{self.frames / max(1e-9, time.monotonic() - self.begun):.0f} frames/s"

    def of_tokens(self) -> str:
        """Mean over runs and 1.96 standard errors: a look at how it goes. The tables' intervals are by sample and clustered."""
        if not self.ms:
            return ""
        spread = f" \u00b1 {1.96 * stdev(self.ms) / len(self.ms) ** 0.5:.2g}" if len(self.ms) > 2 else ""
        return f"{fmean(self.ms):.3g}{spread} ms/token"


@dataclass
class _Part:
    """A shard's or a job's progress as progress of the whole."""

    tell: Progress
    what: str
    begun: int
    of: int
    pace: _Pace
    frames: int = 0

    def clips(self, done: int, _: int) -> None:
        self.pace.frames += self.frames
        self.tell(self.what, self.begun + done, self.of, self.pace.of_frames())

    def samples(self, done: int, _: int) -> None:
        self.tell(self.what, self.begun + done, self.of, self.pace.of_tokens())


def stands(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a timing file is there and says that it was measured with these settings, weights and versions."""
    from stagebench.session.output import read_metadata

    if not output.exists():
        return False
    try:
        stands: bool = read_metadata(output)["study"].get("applied") == settings
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        stands = False
    if not stands:
        log.warning("%s: measured with other settings, weights or versions than planned now; its job runs again", output)
    return stands


def verify_study(
    configfile: Path, output_dir: Path | None, cache: Path, *, only: Sequence[str] | None = None, device: str | None = None
) -> Iterator[VerifyReport]:
    """Verify each model of a study, once for each variant that changes its computation.

    Yields every report, passed or not. Raises ConfigError for a model that the study does not have.
    """
    from stagebench.errors import VerifyError
    from stagebench.plan import build_plan
    from stagebench.verify import read_report, run_verify

    config = load_config(configfile)
    unknown = sorted(set(only or ()) - set(config.models))
    if unknown:
        raise ConfigError(f"--models {unknown[0]}: the study has {', '.join(config.models)}")
    plan = build_plan(config, cache)
    results = output_dir or Path("results") / config.study
    for proof in plan.verify_paths:
        job = plan.verify_job(proof)  # reads clips live: no shard is needed
        if only and job.model not in only:
            continue
        try:
            yield run_verify(plan, job, results / proof, cache=cache, device=device)
        except VerifyError:
            yield read_report(results / proof)
