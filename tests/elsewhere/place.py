"""A device that torch does not know, registered as its plug-ins for accelerators register theirs.

A process has one such device, and keeps it: tests that want it run in a process of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import types
from pathlib import Path

import torch

NAME = "elsewhere"
SOURCE = Path(__file__).with_name("device.cpp")
TORCH = Path(torch.__file__).parent


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build(library: Path) -> None:
    """Compile the device; it takes ten seconds."""
    include = (TORCH / "include", TORCH / "include/torch/csrc/api/include")
    command = [compiler(), "-std=c++20", "-O0", "-fPIC", "-shared", *(f"-I{path}" for path in include), SOURCE]
    command += ["-o", library, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    subprocess.run(list(map(str, command)), check=True)


def register(library: Path) -> None:
    """Make the device known to this process: from now on it is the accelerator of this machine."""
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(NAME)
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None  # random numbers come from the CPU
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
