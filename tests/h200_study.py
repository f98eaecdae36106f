"""A study with the values and the gaps that an H200 gives: three 7B models, three engines, readings that are missing in part of the rows.

Stage times and powers are near those of docs/results/engines_7b.md; nothing here is a measurement.
"""

from pathlib import Path
from typing import Any

import numpy as np

from factories import FakePlan, config, make_study
from pictures import write_pictures
from stagebench.merge import merge
from stagebench.stages import STAGES

STAGES_MS = {
    "eventgpt": {"load": 2.4, "preprocess": 32.0, "h2d": 0.9, "encode": 7.7, "prefill": 23.6},
    "video_llava": {"load": 1.5, "preprocess": 37.8, "h2d": 0.8, "encode": 8.3, "prefill": 61.6},
    "llava": {"load": 1.5, "preprocess": 98.6, "h2d": 0.5, "encode": 8.5, "prefill": 22.5},
}
PACE_MS = {"generate": 18.6, "graph": 7.0, "fused": 3.55}
TOKENS = {"eventgpt": 45, "video_llava": 102, "llava": 60}
COUNTER_MS = 400.0
"""A stage shorter than this has no energy of its own."""
CLIPS = {"eventgpt": "events"}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng([row["order"], *row["sample"].encode(), *row["model"].encode(), *row["engine"].encode()])
    stages = {stage: ms * float(np.exp(rng.normal(0, 0.02))) for stage, ms in STAGES_MS[row["model"]].items()}
    steps = row["new_tokens"] - 1
    pace = PACE_MS[row["engine"]]
    stages["decode"] = steps * pace * float(np.exp(rng.normal(0, 0.02)))
    total = sum(stages.values()) + 0.8
    watts = 260.0 + 60 * (row["engine"] != "generate") + float(rng.normal(0, 4))
    row |= {f"{stage}_ms": ms for stage, ms in stages.items()}
    row |= {f"{stage}_gpu_ms": ms - 0.02 for stage, ms in stages.items()} | {"total_gpu_ms": total - 0.02}
    row |= {f"{stage}_peak_bytes": 14_100_000_000 + 90_000_000 * i for i, stage in enumerate(STAGES)}
    row |= {"total_ms": total, "residual_ms": 0.8, "ttft_ms": total - stages["decode"] - 0.8, "weights_bytes": 14_126_859_272}
    row |= {"token_ms": [stages["decode"] * (i + 1) / steps for i in range(steps)], "kv_bytes": 524_288 * (642 + row["new_tokens"])}
    row |= {"limit_ms": 3.1, "share_of_limit": 3.1 / pace, "dtype": "bfloat16", "preset": "7b"}
    # readings fail now and then, and energy is only there where a sample is long enough for the counter
    if row["order"] % 5:
        row |= {
            "sm_clock_mhz": 1980.0 - 15 * (row["order"] % 3 == 0),
            "temperature_c": 38.0 + min(20.0, row["order"] / 4),
            "power_w": watts,
        }
    if total > COUNTER_MS:
        row["energy_j"] = watts * total / 1000
        row |= {f"{stage}_energy_j": watts * ms / 1000 for stage, ms in stages.items() if ms > COUNTER_MS}
    return row


def edited(row: dict[str, Any]) -> dict[str, Any]:
    if row["sample"].startswith("seq_03/000002") and row["model"] == "eventgpt":
        return {**row, "status": "error", "reason": "clip cut short: 5 decodable frames, 8 asked for", "total_ms": None}
    return _row(row)


def h200_study(folder: Path, *, samples: int = 24, repeats: int = 3, pictures: bool = True) -> FakePlan:
    """Merged, with pictures of two samples."""
    stanzas = {
        name: {"adapter": "hf", "input": CLIPS.get(name, "frames"), "weights": "dummy:0", "preset": "7b"}
        for name in ("eventgpt", "video_llava")
    }
    stanzas["llava"] = {"adapter": "hf", "input": "frames", "frames_as": "grid", "weights": "dummy:0", "preset": "7b"}
    plan = make_study(
        folder,
        plan_config=config(models=stanzas, variants={"engine": list(PACE_MS)}),
        samples=samples,
        sequences=max(4, samples // 12),
        repeats=repeats,
        lengths=("natural", "45"),
        models={name: {"tokens": tokens} for name, tokens in TOKENS.items()},
        variants={f"{engine}-{i}0000000": {"engine": engine} for i, engine in enumerate(PACE_MS)},
        machine={"gpu": {"name": "NVIDIA H200"}, "cpu": {"name": "Fake CPU"}, "torch": "2.11.0"},
        edit=edited,
    )
    merge(plan, folder)
    if pictures:
        write_pictures(folder)
    return plan
