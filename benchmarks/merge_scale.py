"""What the merge and the report cost at scale: CPU and memory over made-up timing files of many rows.

    .venv/bin/python benchmarks/merge_scale.py --rows 100000
    .venv/bin/python benchmarks/merge_scale.py --rows 1000000

Two models, blocks of 256 samples, 3 repeats in two length modes, 40 tokens a natural answer: one block is made row by row (tests/factories)
and written again for each block with other keys. Merge and report are processes of their own; peak_mib is what the kernel counted for them.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from plan_scale import measured

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests"))
import factories  # noqa: E402

BLOCK = 256
RUNS = 6
MODELS = {"eventgpt": {}, "video_llava": {"factor": 2.0, "pace": 25.0, "tokens": 60}}

STEP = """
import pickle, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
folder = Path(sys.argv[2])
if sys.argv[3] == "merge":
    from stagebench.merge import merge
    print(merge(pickle.loads((folder / "plan.pickle").read_bytes()), folder).rows, "rows merged")
else:
    from stagebench.report import write_report
    print(write_report(folder).stat().st_size / 2**20, "MiB of report")
"""


def write(folder: Path, rows: int) -> int:
    """Timing files of about that many rows, and the plan that names them. Returns the number of files."""
    blocks = max(1, round(rows / (len(MODELS) * RUNS * BLOCK)))
    jobs = []
    for model, arguments in MODELS.items():
        made = factories.make_rows(model=model, samples=factories.sample_keys(BLOCK, 4), **arguments)
        table = pa.Table.from_pylist(made, schema=factories.SCHEMA)
        for number in range(blocks):
            name = f"{number:012b}-{number:016x}"
            prefix = f"run_{number:05d}_"
            columns = {key: [prefix + value for value in table[key].to_pylist()] for key in ("sample", "clip", "sequence")}
            columns |= {"block": [name] * len(table), "job": [f"{model}-{name}"] * len(table)}
            other = table
            for key, values in columns.items():
                at = table.schema.get_field_index(key)
                other = other.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
            block = factories.FakeBlock(name, tuple(dict.fromkeys(columns["sample"])))
            job = factories.FakeJob("set", model, factories.FakeVariant("generate-00000000", {}), block)
            path = folder / job.path
            if number == 0:
                factories.write_rows(path, made)  # for its metadata
                metadata = pq.read_schema(path).metadata
            pq.write_table(other.replace_schema_metadata(metadata), path, compression="zstd")
            jobs.append(job)
    (folder / "plan.pickle").write_bytes(pickle.dumps(factories.FakePlan(factories.config(), jobs)))
    return len(jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge_scale-") as name:
        folder = Path(name)
        files = write(folder, options.rows)
        size = sum(path.stat().st_size for path in (folder / "timings").rglob("*.parquet"))
        print(f"{files} timing files, {size / 2**20:.0f} MiB")
        for step in ("merge", "report"):
            cost = measured([sys.executable, "-c", STEP, str(REPO / "tests"), str(folder), step], folder)
            print(
                f"{step}: {cost.cpu_s:.1f} s CPU, {cost.wall_s:.1f} s, peak {cost.peak_mib:.0f} MiB; {cost.text.strip().splitlines()[-1]}"
            )


if __name__ == "__main__":
    main()
