"""docs/accelerators.md: what a compiler makes of the kernels, from the results, and what is proved so far."""

import json
from collections import defaultdict
from pathlib import Path

from dsv4.ops.backend import proved

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/accelerators.md").read_text(encoding="utf-8")


def test_the_table_is_what_was_compiled():
    found = json.loads((ROOT / "bench/results/gpu_compiled.json").read_text(encoding="utf-8"))
    rooms = defaultdict(list)
    for kernel in found["kernels"]:
        rooms[kernel["kernel"].split(".")[0]].append(kernel)
    assert len(rooms) > 10
    assert f"{len(found['kernels'])} kernels at these shapes ({found['date']}, torch {found['torch']}" in TEXT
    for room, kernels in rooms.items():
        spilled = [kernel["spilled_bytes"] for kernel in kernels]
        shared = max(kernel["shared_bytes"] for kernel in kernels) // 1024
        num_spilled = sum(map(bool, spilled))
        assert f"| `{room}` | {len(kernels)} | {num_spilled} | {max(spilled):,} | {shared} |" in TEXT


def test_nothing_is_said_to_be_proved_that_is_not():
    assert ("It is empty so far" in TEXT) == (not proved())
