"""Two engines in processes of their own, one folder of prefixes, too small for both: no answer is another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dsv4
from dsv4 import native
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine

ROOT = Path(dsv4.__file__).parents[1]

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")

SHARE = """
import json, logging, sys
import dsv4
from dsv4.config.engine import Limits, PrefixLimits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine

folder, model = sys.argv[1], dsv4.load_model(sys.argv[2])
prefix = PrefixLimits(folder=folder, policy=sys.argv[3], folder_bytes=int(sys.argv[4]), state_bytes=1)
limits = Limits(numerics="invariant", cache_bytes=50_000, max_requests=3, step_tokens=200, prefix=prefix)
prompts = json.loads(sys.argv[5])
print("ready", flush=True)
sys.stdin.readline()
answers, counts = [], [0, 0, 0, 0, 0]
for _ in range(3):
    with Engine(model, limits) as engine:  # nothing in memory: what is found was on the disk
        for begin in range(0, len(prompts), 4):
            found = engine.generate(prompts[begin : begin + 4], Sampling(max_tokens=6, temperature=0, ignore_eos=True))
            answers += [completion.token_ids for completion in found]
            counts[0] += sum(completion.num_cached > 0 for completion in found)
        store = engine.folder.store.statistics()
        assert engine.pool.num_free == engine.pool.num_pages
    counts[1:] = [a + b for a, b in zip(counts[1:], [store.hits, store.evicted, store.wrong_files, store.failed])]
print(json.dumps([answers, counts]))
"""


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", SHARE, *map(str, arguments)],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def prompts_of(seed):
    """Long ones that begin alike in several ways, in an order of one's own."""
    begins = [[0, *([3 + i, 5, 9 - i] * 100)] for i in range(4)]
    lengths = [140, 270, 270, 300, 140, 300, 270, 140, 300, 270, 140, 270]
    return [[*begins[(i * (1 + 2 * seed)) % 4][:length], 2 + i % 7] for i, length in enumerate(lengths)]


@needs_kernels
@pytest.mark.parametrize("policy", ["full", "zero"])
def test_two_processes_hammer_one_folder(tiny, tiny_saved, small, tmp_path, policy):
    plain = Engine(tiny, small(numerics="invariant"))
    size = plain.runner.cache.page_bytes() + (plain.runner.cache.state_bytes() if policy == "full" else 0)
    max_bytes = 5 * (size + 500)  # of the eight pages that the prompts of both have
    prompts = [prompts_of(seed) for seed in range(2)]
    processes = [start(tmp_path, tiny_saved, policy, max_bytes, json.dumps(own)) for own in prompts]
    ready = [process.stdout.readline() for process in processes]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in processes]
    assert ready == ["ready\n"] * 2, outputs
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [err for _, err in outputs] == ["", ""]
    sampling = Sampling(max_tokens=6, temperature=0, ignore_eos=True)
    totals = np.zeros(5, int)
    for (out, _), own in zip(outputs, prompts, strict=True):
        answers, counts = json.loads(out)
        assert answers == 3 * [completion.token_ids for completion in plain.generate(own, sampling)]
        totals += counts
    num_found, num_hits, num_evicted, num_wrong, num_failed = totals
    assert min(num_found, num_hits, num_evicted) > 5
    assert (num_wrong, num_failed) == (0, 0)
    held = sum(path.stat().st_size for path in tmp_path.glob("*.prefix"))
    assert held == int.from_bytes((tmp_path / ".lock").read_bytes(), "little") <= max_bytes
    assert list(tmp_path.glob(".*.partial")) == []
