"""What a person runs without Snakemake: `stagebench run | demo | verify | compare | dataset | cache | demo-data | doctor`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from stagebench import __version__
from stagebench import _cli_flags as _flags
from stagebench.errors import StagebenchError

__all__ = ["app", "main"]

app = typer.Typer(name="stagebench", no_args_is_help=True, add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False)
cache_app = typer.Typer(no_args_is_help=True, help="The frame and event store: size per spec, checks, clean-up.")
app.add_typer(cache_app, name="cache")
dataset_app = typer.Typer(no_args_is_help=True, help="Build a dataset from DSEC recordings or from videos.")
app.add_typer(dataset_app, name="dataset")

VERBOSE = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")]
CACHE_DIR = Annotated[Path, typer.Option(help="Folder of the frame and event store.")]


def main() -> None:
    """Entry point. A StagebenchError ends with its message and exit code 1, never with a traceback."""
    try:
        app()
    except StagebenchError as error:
        from stagebench.console import errors

        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False)
        sys.exit(1)


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False) -> None:
    """Stage-by-stage latency of vision-language models, in numbers that can be published."""
    if version:
        typer.echo(f"stagebench {__version__}")
        raise typer.Exit


@app.command()
def run(
    dataset_dir: Annotated[Path, typer.Option(help="Dataset folder with the index JSON.")],
    dataset_json: Annotated[str | None, typer.Option(help="Index, relative to the folder.")] = None,
    models: Annotated[
        str, typer.Option(help="Comma-separated: name, or name=weights (folder, hub id, dummy:<seed>).")
    ] = "eventgpt,video_llava,llava",
    preset: Annotated[str, typer.Option(help="Shape of dummy weights: tiny or 7b.")] = "tiny",
    max_samples: Annotated[int | None, typer.Option(min=1, help="Take the first n samples.")] = None,
    show_samples: Annotated[int, typer.Option(min=0, help="Print the answers of the first n samples.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a free GPU if there is one.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Samples run before measuring.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each sample.")] = 1,
    frames: Annotated[int, typer.Option(min=1, help="Video frames a clip.")] = 8,
    event_frames: Annotated[int, typer.Option(min=1, help="Event frames a clip.")] = 5,
    sensor: Annotated[str | None, typer.Option(help="Event sensor as HEIGHTxWIDTH; default: each clip's extent.")] = None,
    source: Annotated[str, typer.Option(help="What load reads: cache, mp4 (events: npy) or frames (events: png).")] = "cache",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Cap of the natural length.")] = 512,
    fixed_tokens: Annotated[int | None, typer.Option(min=1, help="Also time exactly this many tokens.")] = None,
    query: Annotated[str | None, typer.Option(help="One query for all samples.")] = None,
    questions_file: Annotated[str | None, typer.Option(help="Queries asked of every clip: a JSON list, or one a line.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    engine: Annotated[str, typer.Option(help="How tokens are produced.")] = "generate",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of sample order and sampling.")] = 0,
    output_dir: Annotated[Path, typer.Option(help="Where results go.")] = Path("results/run"),
    cache_dir: CACHE_DIR = Path("cache"),
    verbose: VERBOSE = False,
) -> None:
    """Time models on a dataset in one process.

    Example: stagebench run --dataset-dir resources/demo --sensor 480x640 --max-samples 4 --fixed-tokens 16
    """
    from stagebench.console import console, print_results, print_samples, setup_logging, steps
    from stagebench.standalone import config_from_flags, run_study

    setup_logging(verbose)
    device = _flags.device(device)
    config = config_from_flags(
        dataset_dir,
        study=output_dir.resolve().name,
        dataset_json=dataset_json,
        models=_flags.names(models),
        preset=preset,
        frames=frames,
        event_parts=event_frames,
        sensor=_flags.sensor(sensor),
        max_samples=max_samples,
        warmup=warmup,
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        fixed_tokens=fixed_tokens,
        query=query,
        questions_file=questions_file,
        temperature=temperature,
        top_p=top_p,
        engine=engine,
        dtype=dtype,
        seed=seed,
        source=source,
    )
    with steps() as tell:
        done = run_study(config, output_dir, cache_dir, device=device, threads=os.cpu_count() or 1, progress=tell)
    print_results(output_dir)
    if show_samples:
        print_samples(output_dir / "timings.parquet", show_samples)
    console.print(f"\nextracted shards: {done.extracted}, timing jobs run: {done.timed}. Report: {done.report}")


@app.command()
def demo(
    cores: Annotated[int, typer.Option(min=1, help="Cores for Snakemake.")] = os.cpu_count() or 1,
    configfile: Annotated[Path, typer.Option(help="The study.")] = Path("config/config.yaml"),
) -> None:
    """Run the pipeline on the synthetic demo dataset through Snakemake, then print the comparison.

    Example: stagebench demo --cores 8
    """
    from stagebench.config import load_config
    from stagebench.console import console, print_results

    results = Path("results") / load_config(configfile).study
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--resources", "gpu=1", "--configfile", str(configfile)]
    pending = subprocess.run([*command, "--dry-run", "--quiet"], capture_output=True, text=True, check=False)
    if pending.returncode:
        console.print(pending.stdout + pending.stderr, markup=False)
        raise typer.Exit(1)
    nothing_to_do = "Nothing to be done" in pending.stdout + pending.stderr
    if nothing_to_do:
        console.print("Nothing to do: no job ran, every result is up to date.")
    elif subprocess.run(command, check=False).returncode:
        raise typer.Exit(1)
    print_results(results)
    console.print(f"\nReport: {(results / 'report.html').resolve()}")


@app.command()
def verify(
    configfile: Annotated[Path, typer.Option(help="The study.")] = Path("config/config.yaml"),
    models: Annotated[str | None, typer.Option(help="Comma-separated names; default: all.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where <model>.json goes; default: results/<study>/verify.")] = None,
    cache_dir: CACHE_DIR = Path("cache"),
    verbose: VERBOSE = False,
) -> None:
    """Prove that each model's decoupled stages compute what the model computes; exit code 1 otherwise.

    Example: stagebench verify --configfile config/config.yaml --models eventgpt
    """
    from stagebench.console import console, setup_logging
    from stagebench.standalone import verify_study

    setup_logging(verbose)
    failed = False
    only = _flags.names(models) if models else None
    for report in verify_study(configfile, output_dir, cache_dir, only=only, device=_flags.device(device)):
        console.print(f"{report.model} ({report.weights}, {report.dtype}, {report.device}): {'passed' if report.passed else 'FAILED'}")
        for check in report.checks:
            console.print(f"  {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}", markup=False)
        failed |= not report.passed
    raise typer.Exit(int(failed))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Results folder before.")],
    b: Annotated[Path, typer.Argument(help="Results folder after.")],
    threshold: Annotated[
        float, typer.Option(min=0, help="Exit with 1 when a total is SLOWER, its whole interval by more than this share.")
    ] = 0.05,
) -> None:
    """Two results side by side, with the difference of their fingerprints; exit code 1 on SLOWER, 2 where they cannot be compared.

    Example: stagebench compare results/before results/after --threshold 0.05
    """
    from stagebench.compare import compare_results
    from stagebench.console import console, errors
    from stagebench.errors import MergeError

    try:
        outcome = compare_results(a, b, threshold=threshold)
    except MergeError as error:  # 1 is what a slower result says
        errors.print(f"MergeError: {error}", markup=False)
        raise typer.Exit(2) from None
    console.print(outcome.text, markup=False)
    raise typer.Exit(outcome.exit_code)


@app.command("demo-data")
def demo_data(
    root: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("resources/demo"),
    clips: Annotated[int, typer.Option(min=1, help="Clips.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
) -> None:
    """Write the synthetic driving dataset: rendered MP4s and simulated events.

    Example: stagebench demo-data /tmp/demo --clips 12
    """
    from stagebench.demo import write_demo

    write_demo(root, clips=clips, seed=seed)
    typer.echo(f"{root}: {clips} clips")


@app.command()
def doctor(cache_dir: CACHE_DIR = Path("cache")) -> None:
    """Say what works on this machine and what to do about what does not; exit code 1 if the demo cannot run.

    Example: stagebench doctor --cache-dir /scratch/cache
    """
    from stagebench.console import console
    from stagebench.doctor import examine

    findings = examine(cache_dir)
    for finding in findings:
        mark = "ok     " if finding.works else "FAIL   " if finding.needed else "missing"
        console.print(f"{mark} {finding.name}: {finding.detail}", markup=False)
        if not finding.works and finding.remedy:
            console.print(f"        {finding.remedy}", markup=False)
    stopped = [f.name for f in findings if f.needed and not f.works]
    console.print(f"The demo cannot run here: see {', '.join(stopped)}." if stopped else "The demo can run here: make demo")
    raise typer.Exit(int(bool(stopped)))


@dataset_app.command("from-dsec")
def dataset_from_dsec(
    source: Annotated[Path, typer.Argument(help="Folder with DSEC's sequences, as published.")],
    target: Annotated[Path, typer.Argument(help="Folder in which dsec_<duration> is written.")],
    durations: Annotated[str, typer.Option(help="Comma-separated lengths of a clip: 200ms to 20s and beyond.")] = "1s",
    overlap: Annotated[float, typer.Option(help="Share of a clip that the next one has too.")] = 0.5,
    sequences: Annotated[str | None, typer.Option(help="Comma-separated names; default: all.")] = None,
    fps: Annotated[float | None, typer.Option(min=1, help="Frame rate of the MP4s; default: the recording's own.")] = None,
    rectify: Annotated[bool, typer.Option("--rectify", help="Move events by rectify_map.h5.")] = False,
    query: Annotated[str | None, typer.Option(help="The question of every clip.")] = None,
    max_clips: Annotated[int | None, typer.Option(min=1, help="At most so many clips a sequence.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Cut DSEC's recordings into clips of events and MP4. Call again to go on.

    Example: stagebench dataset from-dsec dsec data --durations 200ms,1s,5s --workers 8
    """
    from stagebench.building import from_dsec, parse_duration
    from stagebench.console import console, setup_logging, steps

    setup_logging(False)
    lengths = [parse_duration(text) for text in durations.split(",")]
    with steps() as tell:
        counts = from_dsec(
            source,
            target,
            lengths,
            overlap=overlap,
            sequences=_flags.names(sequences) if sequences else None,
            fps=fps,
            rectify=rectify,
            query=query,
            max_clips=max_clips,
            workers=workers,
            progress=tell,
        )
    for root, clips in counts.items():
        console.print(f"{root}: {clips} clips. stagebench run --dataset-dir {root} --sensor 480x640", markup=False)


@dataset_app.command("from-video")
def dataset_from_video(
    source: Annotated[Path, typer.Argument(help="Folder of videos, searched to its depths.")],
    target: Annotated[Path, typer.Argument(help="Dataset to write.")],
    duration: Annotated[str, typer.Option(help="Length of a clip, as in 500ms or 2s.")] = "1s",
    overlap: Annotated[float, typer.Option(help="Share of a clip that the next one has too.")] = 0.0,
    height: Annotated[int, typer.Option(min=32, help="Rows of the simulated camera; taller videos are scaled down.")] = 480,
    threshold: Annotated[float, typer.Option(help="Change of log intensity that makes an event.")] = 0.28,
    seed: Annotated[int, typer.Option(help="Seed of the camera's noise.")] = 0,
    query: Annotated[str | None, typer.Option(help="The question of every clip.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Cut videos into clips and simulate an event camera on them. Call again to go on.

    Example: stagebench dataset from-video videos data/simulated --duration 1s
    """
    from functools import partial

    from stagebench.building import from_video, parse_duration
    from stagebench.console import console, setup_logging, steps

    setup_logging(False)
    with steps() as tell:
        clips = from_video(
            source,
            target,
            parse_duration(duration),
            overlap=overlap,
            height=height,
            threshold=threshold,
            seed=seed,
            query=query,
            workers=workers,
            progress=partial(tell, "videos"),
        )
    console.print(f"{target}: {clips} clips. stagebench run --dataset-dir {target}", markup=False)


@cache_app.command("ls")
def cache_ls(cache_dir: CACHE_DIR = Path("cache")) -> None:
    """Shards and bytes per kind and spec, and how many of them a study still names.

    Example: stagebench cache ls --cache-dir cache
    """
    from stagebench.cache import usage
    from stagebench.console import console

    specs = usage(cache_dir)
    for spec in specs:
        console.print(
            f"{spec.kind}/{spec.spec_id}: {spec.shards} shards, {spec.bytes / 1e6:.1f} MB, {spec.named} named by a study", markup=False
        )
    shards, unnamed = sum(s.shards for s in specs), sum(s.shards - s.named for s in specs)
    free = f"; {unnamed} that no study names go with `stagebench cache prune`" if unnamed else ""
    console.print(f"{cache_dir}: {shards} shards, {sum(s.bytes for s in specs) / 1e6:.1f} MB{free}", markup=False)


@cache_app.command("prune")
def cache_prune(
    cache_dir: CACHE_DIR = Path("cache"),
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would go.")] = False,
) -> None:
    """Remove shards that no registered study's plan names.

    Example: stagebench cache prune --dry-run
    """
    from stagebench.cache import prune
    from stagebench.console import console

    removed = prune(cache_dir, dry_run=dry_run)
    for path, size in removed:
        console.print(f"{path}: {size / 1e6:.1f} MB", markup=False)
    verb = "would be removed" if dry_run else "removed"
    console.print(f"{len(removed)} shards {verb}, {sum(size for _, size in removed) / 1e6:.1f} MB")


@cache_app.command("verify")
def cache_verify(cache_dir: CACHE_DIR = Path("cache"), verbose: VERBOSE = False) -> None:
    """Check every shard's bytes and name those that changed since they were written; exit code 1 if any did.

    Example: stagebench cache verify
    """
    from functools import partial

    from stagebench.cache import check
    from stagebench.console import console, steps

    bad = good = 0
    with steps() as tell:
        for path, problem in check(cache_dir, partial(tell, "check shards")):
            bad, good = bad + (problem is not None), good + (problem is None)
            if problem is not None:  # begins with the path
                console.print(f"FAIL {problem}", markup=False)
            elif verbose:
                console.print(f"ok   {path}", markup=False)
    console.print(f"{good} shards are as they were written, {bad} are not")
    raise typer.Exit(int(bad > 0))


if __name__ == "__main__":
    main()
