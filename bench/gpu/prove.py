"""Prove the numerics of the Triton kernels on this machine's accelerator, and note those that hold.

    python -m bench.gpu.prove [--only ROOM ...]

The kernels of a room are proved by its own tests, which run on the accelerator where there is one (float64 references,
memory filled with NaN, gradients, tails, two runs of the same bits, any batch), and by its cases of the benchmark at
true shapes, which must agree with the portable twin in bfloat16 and give the same bits twice. ``dsv4/ops/proved.json``
holds the names of those that were, with device and date; ``backend="auto"`` takes these.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from rich.console import Console

from bench.gpu.__main__ import ROOMS, cases
from bench.gpu.case import Case
from bench.gpu.measure import check, free
from dsv4.cli.bench_setup import save
from dsv4.device import accelerator, name_of
from dsv4.ops.backend import PROVED

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\w+\.\w*triton\w*:\w+")
MOST_TOKENS = 5000  # of a case at a true shape that is compared: the portable twin must fit beside it
MOST_ERROR = 0.03  # of the largest value, in bfloat16, where sums run in another order

console = Console(highlight=False, soft_wrap=True)


def main(only: tuple[str, ...] = (), sanitize: bool = True) -> None:
    """Test kernels, and write which are proved.

    Args:
        only: rooms of ``dsv4.ops`` whose kernels are tested; all if not given.
        sanitize: also run the tests under compute-sanitizer, where it is installed.
    """
    device = accelerator()
    if device is None:
        sys.exit("no accelerator here; expected one: an interpreter proves nothing about a GPU")
    proved = json.loads(PROVED.read_text(encoding="utf-8"))
    mark = {
        "device": name_of(device), "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__,
        "triton": version("triton"),
    }  # fmt: skip
    if unknown := sorted(set(only) - set(kernels_of_rooms())):
        sys.exit(f"--only has {', '.join(unknown)}; expected rooms among {', '.join(kernels_of_rooms())}")
    rooms = {room: kernels for room, kernels in kernels_of_rooms().items() if not only or room in only}
    for room, kernels in rooms.items():
        agreements = [agrees(case, device) for case in true_shapes(room)]
        holds = all(agreements) and passes(room, sanitize=sanitize)
        for kernel in kernels:
            proved.pop(kernel, None)
            if holds:
                proved[kernel] = mark
            console.print(f"{kernel}: {'proved' if holds else 'NOT proved'}")
    save(PROVED, dict(sorted(proved.items())))
    console.print(f"{len(proved)} kernels are proved: {PROVED.relative_to(ROOT)}")


def kernels_of_rooms() -> dict[str, list[str]]:
    """The names of the kernels that a room of ``dsv4.ops`` has."""
    found: dict[str, list[str]] = {}
    for kernel in sorted(names()):
        found.setdefault(kernel.split(".")[0], []).append(kernel)
    return found


def tests_of(room: str) -> list[Path]:
    """The tests of a room's kernels."""
    return [path for path in sorted((ROOT / "tests/ops" / room).glob("test_*.py")) if "triton" in path.read_text()]


def names() -> set[str]:
    """All kernels that operations can pick, as the code names them."""
    return {
        node.value
        for path in (ROOT / "dsv4/ops").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value)
    }


def passes(room: str, *, sanitize: bool) -> bool:
    """Whether all tests of a room's kernels pass, also under compute-sanitizer where there is one."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, tests_of(room))]
    sanitizer = shutil.which("compute-sanitizer") if sanitize else None
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        return False
    if sanitizer is None:
        return True
    return subprocess.run([sanitizer, "--error-exitcode", "9", *command], cwd=ROOT, check=False).returncode == 0


def true_shapes(room: str) -> list[Case]:
    """A room's cases at true shapes that have few enough tokens for their portable twins."""
    found = []
    for case in cases(ROOMS):
        tokens = re.search(r"(\d+) tokens", case.shape)
        if room_of(case) == room and "portable" in case.twins and tokens and int(tokens[1]) <= MOST_TOKENS:
            found.append(case)
    return found


def room_of(case: Case) -> str:
    """The room of ``dsv4.ops`` whose kernel a case runs."""
    return re.split(r"\W", case.kernel)[0]


def agrees(case: Case, device: torch.device) -> bool:
    """Whether a case computes what its twin does, twice the same, at its true shape."""
    found = check(case, device)
    free()
    holds = found["error"] is not None and found["error"] <= MOST_ERROR and found["same_bits"]
    console.print(f"{case.name}: error {found['error']}, {'agrees' if holds else 'DOES NOT AGREE'}")
    return holds


if __name__ == "__main__":
    tyro.cli(main)
