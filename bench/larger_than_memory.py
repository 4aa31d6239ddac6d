"""A checkpoint larger than the memory it runs in: tokens per second from memory, mapped, and with a pool of experts.

    python bench/larger_than_memory.py FOLDER --json bench/results/larger_than_memory.json
    python bench/larger_than_memory.py FOLDER --precision released

Writes a checkpoint of 3.4 billion parameters into FOLDER if it is not there, 6.8 GB in bfloat16 or 2.0 GB in the codes
of the release, and runs ``dsv4 bench engine`` on it in a control group with less memory. What the system keeps of files
counts there too, so that what does not fit is read again from the disk. Needs root and the memory controller, as a
container or a virtual machine has them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import dsv4
from dsv4.cli.bench_setup import Options, machine, random_model
from dsv4.config.model import ModelConfig
from dsv4.config.presets import bench_engine

GROUPS = Path("/sys/fs/cgroup")
KILLED = -9  # exit code
HEADER = "| weights | memory | pool | prefill | decode | process | found in the pool | read a token | disk |"


@dataclass(frozen=True)
class Case:
    """A way to run it. limit_gib, pool_gib: None for none."""

    weights: str
    limit_gib: float | None
    pool_gib: float | None = None


CASES = {
    "bfloat16": (
        Case("memory", None),
        Case("mapped", None),
        Case("memory", 2),
        Case("mapped", 2),
        Case("mapped", 2, 0.25),
        Case("mapped", 2, 1),
    ),
    "released": (
        Case("memory", None),
        Case("mapped", None),
        Case("memory", 1),
        Case("mapped", 1),
        Case("mapped", 1, 0.125),
        Case("mapped", 1, 0.5),
    ),
}


def config() -> ModelConfig:
    """The shape of ``dsv4 bench engine``, with eight times as many experts of four times the width."""
    small = bench_engine()
    return replace(small, moe=replace(small.moe, num_experts=256, expert_dim=1024), mtp_kinds=())


@contextmanager
def group(limit_gib: float | None) -> Iterator[Path | None]:
    """A control group with so much memory: the file that takes the ids of its processes."""
    if limit_gib is None:
        yield None
        return
    is_unified = (GROUPS / "cgroup.controllers").is_file()
    parent = GROUPS if is_unified else GROUPS / "memory" / _own_group().lstrip("/")
    directory = parent / "dsv4-larger-than-memory"
    directory.mkdir(exist_ok=True)
    try:
        limit = directory / ("memory.max" if is_unified else "memory.limit_in_bytes")
        limit.write_text(str(int(limit_gib * 2**30)))
        yield directory / "cgroup.procs"
    finally:
        directory.rmdir()


def _own_group() -> str:
    """This process's group under the memory controller of its own (version 1)."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next(line.split(":", 2)[2] for line in lines if "memory" in line.split(":")[1].split(","))


def run(case: Case, folder: Path, prompt_tokens: int, output_tokens: int, precision: str) -> dict[str, Any]:
    """Measure one case in a process of its own, its files dropped from memory before."""
    options: list[object] = ["--weights", case.weights, "--prompt-tokens", prompt_tokens]
    options += ["--output-tokens", output_tokens, "--precision", precision]
    options += [] if case.pool_gib is None else ["--expert-bytes", int(case.pool_gib * 2**30)]
    forget(folder)
    with tempfile.TemporaryDirectory() as directory, group(case.limit_gib) as processes:
        results = Path(directory) / "results.json"
        command = [sys.executable, "-m", "dsv4", "bench", "engine", folder, *options, "--json", results]
        join = None if processes is None else lambda: processes.write_text(str(os.getpid()))
        done = subprocess.run(list(map(str, command)), preexec_fn=join, stdout=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, KILLED):
            raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}")
        (measured,) = json.loads(results.read_text())["cases"] if done.returncode == 0 else [None]
    return {"weights": case.weights, "limit_gib": case.limit_gib, "pool_gib": case.pool_gib, "result": measured}


def forget(folder: Path) -> None:
    """Let the system forget what it keeps of a checkpoint's files."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folder: Path) -> float:
    """Bytes a second that the disk gives of one file, in pieces of a megabyte."""
    forget(folder)
    file = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    begin = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while opened.read(2**20):
            pass
    return file.stat().st_size / (time.perf_counter() - begin)


def describe(found: dict[str, Any]) -> str:
    """A case as a row of a table."""
    cells = [found["weights"], *(f"{x:g} GiB" if x else "-" for x in (found["limit_gib"], found["pool_gib"]))]
    result = found["result"]
    if result is None:
        return f"| {' | '.join([*cells, 'killed', *'-----'])} |"
    cells += [f"{result['prefill_tokens_per_s']:,.0f}", f"{result['decode_tokens_per_s']:.1f}"]
    cells += [f"{result['resident_memory_bytes'] / 2**30:.2f} GiB"]
    if "expert_hits" in result:
        share = result["expert_hits"] / (result["expert_hits"] + result["expert_misses"])
        cells += [f"{share:.0%}", f"{result['expert_bytes_per_token'] / 1e6:.1f} MB"]
    else:
        cells += ["-", "-"]
    return f"| {' | '.join(cells)} | {found['disk_bytes_per_s'] / 1e6:,.0f} MB/s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="of the checkpoint, on the disk to measure")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=list(CASES), default="bfloat16")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not (given.folder / "config.json").is_file():
        dsv4.save_model(random_model(config(), Options(precision=given.precision)), given.folder)
    size = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
    print(HEADER)
    found = []
    for case in CASES[given.precision]:
        rate = disk_rate(given.folder)
        measured = run(case, given.folder, given.prompt_tokens, given.output_tokens, given.precision)
        found.append(measured | {"disk_bytes_per_s": rate})
        print(describe(found[-1]), flush=True)
    results = {"machine": machine(), "date": date.today().isoformat(), "checkpoint_bytes": size, "cases": found}
    results |= {"prompt_tokens": given.prompt_tokens, "output_tokens": given.output_tokens}
    results |= {"precision": given.precision}
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
