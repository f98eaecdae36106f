"""Groups against groups: paired ratios, where a ratio comes from, agreement of outputs, settings of one model, load by source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from stagebench.config import Config
from stagebench.merge.conditions import longest_wait
from stagebench.merge.groups import METRICS, SETTINGS, Group, batches_of
from stagebench.stages import STAGES
from stagebench.stats import PARTS, Verdict, acceptance, decompose, disturbed, paired_ratio, quantile, speculative_speedup

__all__ = [
    "GAMMAS",
    "NO_PAIRS",
    "Pair",
    "acceptance_rows",
    "comparison_rows",
    "decomposition_rows",
    "load_rows",
    "model_pairs",
    "optimisation_rows",
    "paired",
    "ratio_row",
    "word",
]

GAMMAS = (1, 3, 5, 8)
"""Drafts a round of speculative decoding for which a speed-up is computed."""

_ALIKE = ("engine", "quantization", "batch", "attention", "keep_visual", "preprocess", "dtype")
"""Settings that two models must share to be compared. frames and source differ by kind of input and are compared where they are an axis."""

_COUNT_WORDS = {"FASTER": "FEWER", "SLOWER": "MORE"}
"""A model that says less is not a faster model."""

_LIVE = "live"


@dataclass(frozen=True)
class Pair:
    """A group, the group that it is compared with, and their common samples in the same order."""

    group: Group
    reference: Group
    left: pl.DataFrame
    right: pl.DataFrame

    @property
    def n(self) -> int:
        return len(self.left)

    @property
    def sequences(self) -> list[str]:
        return [str(s) for s in self.left["sequence"].fill_null("")]


NO_PAIRS = "no pairs"
"""In place of a verdict word where no sample counts on both sides."""


def paired(group: Group, reference: Group) -> Pair:
    """Typical runs of the samples that both groups have."""
    common = group.typical.select("sample").join(reference.typical.select("sample"), on="sample", how="inner")
    left, right = (side.typical.join(common, on="sample", how="semi").sort("sample") for side in (group, reference))
    return Pair(group, reference, left, right)


def model_pairs(found: Sequence[Group], config: Config) -> Iterator[Pair]:
    """Each model's groups against the reference model's of the same machine, dataset, length and settings, in the order of `found`."""
    reference = config.compare.reference or next(iter(config.models))
    index: dict[tuple[Any, ...], Group] = {}
    for group in found:
        if group.model == reference:
            index.setdefault(_match(group, config), group)
    for group in found:
        other = index.get(_match(group, config))
        if group.model != reference and other is not None:
            yield paired(group, other)


def _match(group: Group, config: Config) -> tuple[Any, ...]:
    frames = group.settings["frames"] if config.variants.frames else None
    source = _kind(group.settings["source"]) if config.variants.source else None
    return (group.machine, group.dataset, group.length, *(group.settings[name] for name in _ALIKE), frames, source)


def _kind(source: str) -> str:
    """The kind of a source: cache, or live where it is read from the clip's own files; with the suffix of how it was read (`+prefetch`)."""
    name, plus, how = source.partition("+")
    return (name if name == "cache" else _LIVE) + plus + how


def ratio_row(pair: Pair, metric: str, config: Config) -> dict[str, Any]:
    """Both medians over the pairs, and the ratio with its interval and word. Pairs in which a side is null or 0 are left out of n."""
    left, right = (side[metric].cast(pl.Float64).fill_null(float("nan")).to_numpy() for side in (pair.left, pair.right))
    keep = np.isfinite(left) & np.isfinite(right) & (left > 0) & (right > 0)
    row: dict[str, Any] = {"metric": metric.removesuffix("_ms"), "n": int(keep.sum())}
    none = {"median": None, "reference_median": None, "ratio": None, "low": None, "high": None, "speedup": None}
    if not keep.any():
        return row | none | {"clusters": 0, "method": "none", "verdict": NO_PAIRS, "cpu_wait_share": None}
    c = config.compare
    clusters = [s for s, k in zip(pair.sequences, keep, strict=True) if k]
    settings: dict[str, Any] = {"confidence": c.confidence, "resamples": c.resamples, "same_within": c.same_within}
    ratio = paired_ratio(left[keep], right[keep], clusters, batches=_batches(pair, metric, keep), **settings)
    row |= {"median": float(np.median(left[keep])), "reference_median": float(np.median(right[keep]))}
    row |= {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "speedup": 1 / ratio.ratio}
    share = longest_wait(pair.left, pair.right)
    said = word(ratio.verdict, metric, share)
    return row | {"clusters": ratio.clusters, "method": ratio.method, "verdict": said, "cpu_wait_share": share}


def word(found: Verdict, metric: str, share: float | None) -> str:
    """What a table says of a ratio's verdict: of a number of tokens, MORE or FEWER; of times that waited for a CPU, AMBIGUOUS.

    share: `longest_wait` of both sides.
    """
    if metric == "new_tokens":
        return _COUNT_WORDS.get(found.value, found.value)
    return Verdict.AMBIGUOUS.value if disturbed(share) else found.value


def _batches(pair: Pair, metric: str, keep: npt.NDArray[np.bool_]) -> list[list[str]]:
    """What the pairs were measured in together, on either side. How much is said is each sample's own, whatever batch it is in."""
    found = batches_of(pair.left, pair.right) if metric != "new_tokens" else []
    return [[name for name, k in zip(names, keep, strict=True) if k] for names in found]


def _identity(pair: Pair) -> dict[str, Any]:
    group, reference = pair.group, pair.reference
    return {
        "machine": group.machine,
        "dataset": group.dataset,
        "length": group.length,
        "model": group.model,
        "variant": group.variant,
        "reference": reference.model,
        "reference_variant": reference.variant,
        "failed": group.failed + reference.failed,
        "discarded": group.discarded + reference.discarded,
        "capped": group.capped + reference.capped,
    }


def comparison_rows(pairs: Sequence[Pair], config: Config) -> list[dict[str, Any]]:
    """A row for each pair of groups and metric; the total comes first. Groups without a pair of samples have that row only."""
    return [_identity(pair) | ratio_row(pair, metric, config) for pair in pairs for metric in (METRICS if pair.n else METRICS[:1])]


def decomposition_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """A row for each pair and part, and one for the whole, which is exactly their sum (ms) and product (factor)."""
    columns = (*(f"{s}_ms" for s in STAGES), "total_ms", "new_tokens")
    rows = []
    for pair in pairs:
        # in a batch the longest answer sets the steps: each row's tokens are as many as its batch decoded
        batches = [side.with_columns((pl.col("steps") + 1).alias("new_tokens")) for side in (pair.left, pair.right)]
        sides = [side.select(pl.col(columns).cast(pl.Float64).fill_null(0.0)) for side in batches]
        if not pair.n or any((side["total_ms"] <= 0).any() for side in sides):
            continue
        split = decompose(*({name: side[name].to_numpy() for name in columns} for side in sides))
        factors = split.factors()
        for part in PARTS:
            share = split.log[part] / split.total_log if split.total_log else None
            row = {"part": part, "n": split.n, "ms": split.ms[part], "factor": factors[part], "log_ratio": split.log[part], "share": share}
            rows.append(_identity(pair) | row)
        whole = {
            "part": "total",
            "n": split.n,
            "ms": split.total_ms,
            "factor": float(np.exp(split.total_log)),
            "log_ratio": split.total_log,
        }
        rows.append(_identity(pair) | whole | {"share": 1.0 if split.total_log else None})
    return rows


def acceptance_rows(pairs: Sequence[Pair], timings: Path, tokenizers: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Agreement of two models' token ids over their pairs: the group as draft, the reference as target.

    A row a pair and number of drafts, for the speed-up is computed for each. tokenizers: model -> digest of its tokenizer, None where its
    jobs do not say. Where digests are unknown or differ, the pair's one row says so and holds no figure.
    """
    rows = []
    for pair in pairs:
        row = _identity(pair) | {"n": pair.n, "gamma": None, "note": None}
        draft, target = tokenizers.get(pair.group.model), tokenizers.get(pair.reference.model)
        if draft is None or target is None:
            rows.append(row | {"note": "refused: tokenizer digest not recorded"})
        elif draft != target:
            rows.append(row | {"note": "refused: tokenizers differ, so equal ids are not equal text"})
        else:
            found = acceptance(
                _ids(pair.group, pair.left, timings),
                _ids(pair.reference, pair.right, timings),
                draft_tokenizer=draft,
                target_tokenizer=target,
            )
            row |= {"n": found.n, "position_share": found.position_share, "prefix_mean_tokens": found.prefix_mean, "alpha": found.alpha}
            row["sample_share"] = float(np.mean(found.per_sample)) if found.per_sample else None
            pace = [side["ms_per_token"].drop_nulls().median() for side in (pair.left, pair.right)]
            cost = float(pace[0]) / float(pace[1]) if all(isinstance(p, float) and p > 0 for p in pace) else None  # type: ignore[arg-type]
            for gamma in GAMMAS:
                computed = None if cost is None or found.alpha is None else speculative_speedup(found.alpha, gamma, cost)
                rows.append(row | {"gamma": gamma, "cost": cost, "speculative_speedup_computed": computed})
    return rows


def _ids(group: Group, typical: pl.DataFrame, timings: Path) -> list[list[int]]:
    """Token ids of typical runs, in their order."""
    ids_of = group.rows(timings).select("sample", "repeat", "token_ids")
    found = typical.select("sample", "repeat").lazy().join(ids_of, on=["sample", "repeat"], how="left").collect()
    ids = {row[0]: row[2] for row in found.rows()}
    return [[int(i) for i in ids[sample] or ()] for sample in typical["sample"]]


def optimisation_rows(
    found: Sequence[Group],
    order: Sequence[tuple[str, str]],
    config: Config,
    quality: Mapping[tuple[str, str, str, str], Mapping[str, float | None]] | None = None,
) -> list[dict[str, Any]]:
    """Each variant of a model against that model's first one (the config's order), ranked by total: what a setting is worth.

    found, order: groups, and (model, variant), in the order of the config. quality: (machine, dataset, model, variant) -> what its jobs
    found against the plain model.
    """
    first: dict[str, str] = {}
    for model, variant in order:
        first.setdefault(model, variant)
    base = {(g.machine, g.dataset, g.model, g.length): g for g in found if first.get(g.model) == g.variant}
    rows = []
    for group in found:
        reference = base.get((group.machine, group.dataset, group.model, group.length))
        if reference is None or reference is group:
            continue
        pair = paired(group, reference)
        changed = [f"{k}: {reference.settings[k]} -> {group.settings[k]}" for k in SETTINGS if group.settings[k] != reference.settings[k]]
        row = _identity(pair) | {"changed": "; ".join(changed)} | ratio_row(pair, "total_ms", config)
        for metric in ("sample_ms", "preprocess_ms", "encode_ms", "prefill_ms", "decode_ms", "ms_per_token"):
            row[f"{metric.removesuffix('_ms')}_ratio"] = ratio_row(pair, metric, config)["ratio"]
        row["share_of_limit"] = group.typical["share_of_limit"].drop_nulls().median()
        row |= _memory(group) | {"acceptance": _acceptance(group)} | dict((quality or {}).get(group.key[:4], {}))
        rows.append(row)
    names = ("machine", "dataset", "model", "length")
    places = {name: {value: number for number, value in enumerate(dict.fromkeys(getattr(g, name) for g in found))} for name in names}
    rows.sort(key=lambda r: (*(places[name][r[name]] for name in names), r["ratio"] if r["ratio"] is not None else float("inf")))
    return rows


def _memory(group: Group) -> dict[str, Any]:
    peaks = np.concatenate([group.column(f"{stage}_peak_bytes") for stage in STAGES])
    known = peaks[np.isfinite(peaks)]
    return {
        "weights_bytes": group.typical["weights_bytes"].drop_nulls().median(),
        "peak_bytes": float(known.max()) if len(known) else None,
    }


def _acceptance(group: Group) -> float | None:
    """Share of the tokens guessed ahead that the model accepted, over all accepted runs."""
    drafted, accepted = (int(group.runs[name].sum()) for name in ("drafted_tokens", "accepted_tokens"))
    return accepted / drafted if drafted else None


def load_rows(found: Sequence[Group]) -> list[dict[str, Any]]:
    """Load by source: all accepted runs of a variant, whatever their length mode, for load does not know it."""
    merged: dict[tuple[str, str, str, str], list[Group]] = {}
    for group in found:
        merged.setdefault((group.machine, group.dataset, group.model, group.variant), []).append(group)
    rows = []
    for (machine, dataset, model, variant), members in merged.items():
        runs = pl.concat([g.runs.select("sample", "load_ms", "total_ms") for g in members])
        per_sample = runs.group_by("sample").agg(pl.col("load_ms").median(), pl.col("total_ms").median()).sort("sample").drop_nulls()
        load, total = per_sample["load_ms"].to_numpy(), per_sample["total_ms"].to_numpy()
        row: dict[str, Any] = {"machine": machine, "dataset": dataset, "model": model, "variant": variant}
        row |= {name: members[0].settings[name] for name in ("input", "source", "frames")}
        row |= {name: max(getattr(g, name) for g in members) for name in ("failed", "discarded")}
        row |= {"n": len(load), "runs": len(runs), "median_ms": float(np.median(load)) if len(load) else None}
        row |= {f"p{round(100 * p)}_ms": quantile(load, p) for p in (0.05, 0.9, 0.95, 0.99)}
        row["share_of_total"] = float(load.sum() / total.sum()) if len(load) else None
        rows.append(row)
    return rows
