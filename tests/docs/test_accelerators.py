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


def test_what_is_compiled_is_what_was_measured():
    found = json.loads((ROOT / "bench/results/compiled_cpu.json").read_text(encoding="utf-8"))
    rows = [{row["operation"]: row for row in found[preset]} for preset in ("nano", "mini")]
    section = TEXT.partition("## Through `torch.compile`")[2].partition("\n## ")[0]
    for name in rows[0]:
        (line,) = [line for line in section.splitlines() if line.startswith(f"| `{name}` | ")]
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        is_kept = cells.pop() == "yes"
        for row, (portable, compiled, native) in zip((one[name] for one in rows), (cells[:3], cells[3:]), strict=True):
            assert portable == f"{row['portable ms']:.1f}"
            assert native == (f"{row['native is faster']:.2f}" if "native is faster" in row else "-")
            assert compiled == ("fails" if "fails" in row else f"{row['compiled is faster']:.2f}")
            assert not is_kept or row["compiled is faster"] > 1.2
    for backend, taken in found["step"]["passes s"].items():
        assert f"{taken:.2f} s" in section, backend


def test_nothing_is_said_to_be_proved_that_is_not():
    assert ("It is empty so far" in TEXT) == (not proved())
