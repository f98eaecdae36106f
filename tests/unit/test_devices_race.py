"""Timing jobs of one machine start at the same moment and take a GPU each: real processes, real locks."""

import json
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

HOLD = """
import json, sys, time
from pathlib import Path
from stagebench.errors import TimingError
from stagebench.machine.devices import lock_one
folder, gpus, start, wait_s, hold_s = json.loads(sys.argv[1])
time.sleep(max(0, start - time.time()))
try:
    lease = lock_one(gpus, Path(folder), wait_s)
except TimingError:
    print(json.dumps(None))
else:
    begin = time.time()
    time.sleep(hold_s)
    print(json.dumps([lease.device, begin, time.time()]), flush=True)
"""


def race(folder: Path, jobs: int, gpus: int, wait_s: float, hold_s: float) -> list[list | None]:
    """What each of so many processes got that ask at one moment: [device, from, to], or None."""
    names = {f"cuda:{n}": f"GPU-{n}" for n in range(gpus)}
    argument = json.dumps([str(folder), names, time.time() + 3, wait_s, hold_s])
    processes = [subprocess.Popen([sys.executable, "-c", HOLD, argument], stdout=subprocess.PIPE, text=True) for _ in range(jobs)]
    return [json.loads(process.communicate(timeout=60)[0]) for process in processes]


def test_as_many_jobs_as_gpus_take_one_each(tmp_path):
    got = race(tmp_path, jobs=4, gpus=4, wait_s=0, hold_s=4)
    assert None not in got
    assert Counter(device for device, *_ in got) == Counter(f"cuda:{n}" for n in range(4))


def test_jobs_beyond_the_gpus_wait_their_turn_and_none_shares(tmp_path):
    got = race(tmp_path, jobs=5, gpus=2, wait_s=40, hold_s=0.5)
    assert None not in got
    for device in ("cuda:0", "cuda:1"):
        spans = sorted((begin, end) for name, begin, end in got if name == device)
        assert spans
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
