"""The results file of the scripts that stagebench replaces, written from our rows: a list of samples, times in seconds.

An entry is a sample: `id, split, query, benchmark_datetime`, and for each model a prefix (`egpt`, `videollava`, `llava`, else the
model's own name) with `<prefix>` (text), `<prefix>_time`, `<prefix>_stage1_time` (load), `_stage2_time` (preprocess and h2d),
`_stage3_time` (vision and LLM), `<prefix>_token_ids`, and the sums of the four- and five-stage scripts under
`<prefix>_4stage` and `<prefix>_5stage`.
Times are of the sample's typical run (median total), not of a first call. What the old files did not have is left out, never made up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import polars as pl

from stagebench.config import Config
from stagebench.errors import MergeError
from stagebench.files import whole_file
from stagebench.merge.comparison import GAMMAS
from stagebench.merge.gather import JobFile
from stagebench.merge.groups import CAPPED_POOL, Group
from stagebench.stages import STAGES, VIEWS
from stagebench.stats import acceptance, speculative_speedup

__all__ = ["LegacyEntries", "dated_name", "legacy_entries", "prefixes", "write_legacy"]

AT_ONCE = 20_000
"""Samples whose answers are in memory at once."""
_TEXT_KEYS = {"llava": "llava-1.5-7b-hf"}
"""The old files hold LLaVA's text under its hub name."""


def prefixes(config: Config) -> dict[str, str]:
    """Model -> the old system's prefix, each used once: the first model of a kind gets it, others keep their names."""
    taken: dict[str, str] = {}
    for name, model in config.models.items():
        kind = re.sub(r"[^a-z]", "", f"{model.architecture or ''} {name}".lower())
        known = "egpt" if model.adapter == "eventgpt" else "videollava" if "videollava" in kind else "llava" if "llava" in kind else name
        taken[name] = name if known in taken.values() else known
    return taken


def _seconds(row: Mapping[str, Any], stages: Iterable[str]) -> float | None:
    values = [row[f"{stage}_ms"] for stage in stages]
    return None if any(v is None for v in values) else round(sum(values) / 1000, 6)


def _entry(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    entry: dict[str, Any] = {prefix: row["text"], f"{prefix}_time": round(row["total_ms"] / 1000, 6)}
    if prefix in _TEXT_KEYS:
        entry[_TEXT_KEYS[prefix]] = row["text"]
    for number, stages in enumerate(VIEWS["3"].values(), start=1):
        entry[f"{prefix}_stage{number}_time"] = _seconds(row, stages)
    for view in ("4", "5"):
        steps = enumerate(VIEWS[view].values(), start=1)
        entry[f"{prefix}_{view}stage"] = {f"stage{number}_time": _seconds(row, stages) for number, stages in steps}
    entry |= {f"{prefix}_ttft": _seconds(row, STAGES[:5]), f"{prefix}_token_ids": [int(i) for i in row["token_ids"] or ()]}
    entry |= {f"{prefix}_num_tokens": row["new_tokens"], f"{prefix}_prompt_tokens": row["prompt_tokens"], f"{prefix}_status": row["status"]}
    return entry


def _chosen(groups: Sequence[Group], dataset: str, model: str) -> list[Group]:
    """The pools of the model's first variant and machine that an old file stands for: natural lengths, else the first fixed one."""
    mine = [g for g in groups if g.dataset == dataset and g.model == model and g.n]
    if not mine:
        return []
    mine = [g for g in mine if (g.machine, g.variant) == (mine[0].machine, mine[0].variant)]
    natural = [g for g in mine if g.length in ("natural", CAPPED_POOL)]
    return natural or mine[:1]


def _rows(group: Group, timings: Path, samples: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Sample -> its typical run with text and token ids, for those of `samples` that the group has."""
    extra = group.rows(timings).filter(pl.col("sample").is_in(samples))
    columns = ["sample", "repeat", "id", "clip", "query", "text", "token_ids", "input"]
    typical = group.typical.filter(pl.col("sample").is_in(samples)).drop([c for c in columns[2:] if c in group.typical.columns])
    frame = typical.lazy().join(extra.select(columns), on=["sample", "repeat"], how="left").sort("sample").collect()
    return {row["sample"]: row for row in frame.iter_rows(named=True)}


@dataclass(frozen=True)
class LegacyEntries:
    """A dataset's entries, made while they are iterated: a study may hold more answers than memory does."""

    samples: list[str]
    """Sorted."""
    make: Callable[[Sequence[str]], list[dict[str, Any]]]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, len(self.samples), AT_ONCE):
            yield from self.make(self.samples[first : first + AT_ONCE])


def legacy_entries(
    groups: Sequence[Group],
    dataset: str,
    timings: Path,
    config: Config,
    files: Sequence[JobFile],
    tokenizers: Mapping[str, str | None],
    splits: Mapping[str, str],
) -> LegacyEntries:
    """One entry a sample of `dataset`, sorted by sample key. splits: sample key -> split, where the plan knows it."""
    names = prefixes(config)
    when = measured_at(files, dataset)
    chosen = {model: _chosen(groups, dataset, model) for model in config.models}
    reference = config.compare.reference or next(iter(config.models))

    def make(samples: Sequence[str]) -> list[dict[str, Any]]:
        runs: dict[str, dict[str, dict[str, Any]]] = {}
        for model, pools in chosen.items():
            for group in pools:
                for sample, row in _rows(group, timings, samples).items():
                    runs.setdefault(sample, {}).setdefault(model, row)
        entries = []
        for sample, by_model in sorted(runs.items()):
            first = next(iter(by_model.values()))
            entry: dict[str, Any] = {"id": first["id"], "split": splits.get(sample, "unknown"), "query": first["query"], "dataset": dataset}
            entry |= {"sample": sample, "benchmark_datetime": when.replace(tzinfo=None).isoformat() if when else None}
            for model, row in by_model.items():
                entry["event_data" if row["input"] == "events" else "video_data"] = row["clip"]
                entry |= _entry(row, names[model])
            entries.append(entry | _agreement(by_model, reference, names, tokenizers))
        return entries

    return LegacyEntries(sorted({s for pools in chosen.values() for group in pools for s in group.typical["sample"]}), make)


def _agreement(
    by_model: Mapping[str, Mapping[str, Any]], reference: str, names: Mapping[str, str], tokenizers: Mapping[str, str | None]
) -> dict[str, Any]:
    """Acceptance of each model's tokens against the reference's; nothing where tokenizers are not known to be equal."""
    found: dict[str, Any] = {}
    target = by_model.get(reference)
    for model, row in by_model.items():
        one, other = tokenizers.get(model), tokenizers.get(reference)
        if target is None or model == reference or one is None or one != other:
            continue
        agreement = acceptance([row["token_ids"] or ()], [target["token_ids"] or ()], draft_tokenizer=one, target_tokenizer=one)
        if not agreement.n:
            continue
        prefix = f"{names[model]}_vs_{names[reference]}"
        found[f"{prefix}_acceptance_rate"] = round(agreement.position_share or 0.0, 6)
        found[f"{prefix}_common_prefix"] = agreement.prefix_lengths[0]
        if row["ms_per_token"] and target["ms_per_token"] and agreement.alpha is not None:
            cost = row["ms_per_token"] / target["ms_per_token"]
            for gamma in GAMMAS:
                found[f"{prefix}_speculative_speedup_computed_gamma{gamma}"] = round(speculative_speedup(agreement.alpha, gamma, cost), 6)
    return found


def measured_at(files: Sequence[JobFile], dataset: str) -> datetime | None:
    """When the last job of a dataset ended, in UTC, from the jobs' own metadata; None where none says it."""
    times = []
    for file in files:
        if file.dataset != dataset:
            continue
        for key in ("finished", "started"):
            try:
                time = datetime.fromisoformat(str(file.job[key]))
            except (KeyError, ValueError):
                continue
            times.append(time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC))
            break
    return max(times, default=None)


def dated_name(dataset: str, count: int, when: datetime | None) -> str:
    """`<dataset>_results_n{N}_{YYYYmmdd_HHMMSS}.json`, the time being the measurement's, not the merge's."""
    stamp = f"_{when:%Y%m%d_%H%M%S}" if when else ""
    return f"{dataset}_results_n{count}{stamp}.json"


def write_legacy(results: Path, entries: Mapping[str, LegacyEntries], files: Sequence[JobFile]) -> list[Path]:
    """`legacy_results.json` with all datasets' samples, and a dated copy for each dataset. Returns the paths written."""
    together = results / "legacy_results.json"
    written = [together]
    with whole_file(together, MergeError) as temporary, _JsonList(temporary) as whole:
        for dataset, samples in entries.items():
            path = results / dated_name(dataset, len(samples), measured_at(files, dataset))
            with whole_file(path, MergeError) as own, _JsonList(own) as part:
                for entry in samples:
                    text = json.dumps(entry, indent=2, ensure_ascii=False, allow_nan=False)
                    whole.add(text)
                    part.add(text)
            written.append(path)
    return written


class _JsonList:
    """A JSON list on disk, an element at a time, laid out as `json.dumps(list, indent=2)` lays it out."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._empty = True

    def add(self, text: str) -> None:
        # line breaks inside a text are escaped: each one here is the layout's
        self._file.write(("[\n  " if self._empty else ",\n  ") + text.replace("\n", "\n  "))
        self._empty = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.write("[]\n" if self._empty else "\n]\n")
