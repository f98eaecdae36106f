"""Pictures as `stagebench.thumbnails` writes them, for studies that have no shards."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stagebench.thumbnails import _SCHEMA, FILE, _small


def write_pictures(results: Path, samples: tuple[str, ...] = ("seq_00/000000#00000000", "seq_01/000000#00000001")) -> Path:
    """Two frames of each kind for each sample: a gradient, and blue and red dots on white."""
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 255, 640, dtype=np.uint8)[None, :, None], (480, 640, 3))
    dots = np.full((480, 640, 3), 255, np.uint8)
    for colour in ((0, 0, 255), (255, 0, 0)):
        dots[rng.integers(0, 480, 9000), rng.integers(0, 640, 9000)] = colour
    rows = [
        {"dataset": "set", "sample": sample, "clip": sample.partition("#")[0], "kind": kind, "position": i, "frames": 2}
        | _small(pixels, kind)
        for sample in samples
        for kind, pixels in (("frames", ramp), ("events", dots))
        for i in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), results / FILE)
    return results / FILE
