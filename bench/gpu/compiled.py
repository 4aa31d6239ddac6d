"""What a compiler makes of the kernels at true shapes for an H200, on a machine that has no GPU.

    python -m bench.gpu.compiled [--only ROOM ...] [--results FILE]

The cases of the benchmark run on tensors without memory: torch only makes others of the right shapes, and kernels are
compiled with what their launches tell the compiler, but not launched. An operation that looked at a number, and so
would wait for the GPU, fails. Spilled bytes are those of a thread's stack: registers that did not suffice.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.gpu.__main__ import RESULTS, ROOMS, cases, console
from bench.gpu.case import Case
from dsv4 import device
from dsv4.cli.bench_setup import save

NOWHERE = torch.device("meta")
INSTRUCTION = r"\s+/\*[0-9a-f]+\*/"  # as a line of nvdisasm begins


def main(only: tuple[str, ...] = ROOMS, results: Path = RESULTS / "gpu_compiled.json") -> None:
    """Compile the kernels of some rooms, print and keep what they take.

    Args:
        only: rooms whose kernels are compiled.
        results: where the figures are kept.
    """
    if unknown := sorted(set(only) - set(ROOMS)):
        sys.exit(f"--only has {', '.join(unknown)}; expected rooms among {', '.join(ROOMS)}")
    kernels: dict[str, dict[str, Any]] = {}
    with compiling() as made:
        for case in cases(only):
            for name, kernel in built(case, made):
                if kernel.hash not in kernels:
                    kernels[kernel.hash] = {"case": case.name, "kernel": name, **usage(kernel)}
                    console.print(line(kernels[kernel.hash]))
    found = list(kernels.values())
    save(results, {
        "command": "python -m bench.gpu.compiled", "target": "sm_90", "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__, "triton": version("triton"), "kernels": found,
    })  # fmt: skip
    spilled = sum(one["spilled_bytes"] > 0 for one in found)
    console.print(f"{len(found)} kernels compiled, {spilled} of them with spilled registers; {results}")


@contextmanager
def compiling() -> Iterator[list[tuple[str, Any]]]:
    """Compile whatever is launched meanwhile, and list it by name: for an H200, whatever this machine has.

    The process can launch nothing afterwards.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver(CudaDriver):
        def __init__(self) -> None:
            """Load nothing of a GPU's."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    made: list[tuple[str, Any]] = []
    run, accelerator = JITFunction.run, device.accelerator

    def compile_only(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *given, grid=grid, warmup=True, **named)
        made.append((f"{self.fn.__module__.removeprefix('dsv4.ops.')}.{self.fn.__name__}", kernel))
        return kernel

    driver.set_active(Driver())
    JITFunction.run, device.accelerator = compile_only, lambda: NOWHERE
    try:
        yield made
    finally:
        JITFunction.run, device.accelerator = run, accelerator


def built(case: Case, made: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The kernels that a case launches."""
    made.clear()
    case.make()()
    return [*made]


def usage(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes of the processor."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources, code = (
            subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", resources)[0]
    return {
        "registers": int(registers), "spilled_bytes": int(stack), "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps, "instructions": len(re.findall("^" + INSTRUCTION, code, re.MULTILINE)),
        "in_loops": loops(code),
    }  # fmt: skip


def loops(code: str) -> list[int]:
    """How many instructions are in each loop of a listing: from a label to the branch behind that goes back to it."""
    labels: dict[str, int] = {}
    found, number = [], 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = number
        elif re.match(INSTRUCTION, line):
            number += 1
            back = re.search(r"BRA.*\((\.L_x_\d+)\)", line)
            if back and number - labels.get(back[1], number) > 1:  # not the trap at the end, which goes to itself
                found.append(number - labels[back[1]])
    return found


def line(one: dict[str, Any]) -> str:
    """One kernel in words."""
    spilled = f", {one['spilled_bytes']:,} bytes SPILLED" if one["spilled_bytes"] else ""
    return (
        f"{one['kernel']} ({one['case']}): {one['registers']} registers{spilled}, {one['shared_bytes'] / 1024:.0f} KiB "
        f"shared, {one['warps']} warps, {one['instructions']:,} instructions"
        + (f", in loops {', '.join(map(str, one['in_loops']))}" if one["in_loops"] else "")
    )


if __name__ == "__main__":
    tyro.cli(main)
