"""What this machine computes on: the one file that asks torch about accelerators.

Everything goes through ``torch.accelerator``, so that NVIDIA, AMD, Huawei's Ascend (with ``torch_npu``) and whatever
else registers itself with torch are the same to the rest of the package. What is given to an accelerator runs beside
the CPU, in the order in which it was given.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

_Result = TypeVar("_Result")

CPU = torch.device("cpu")


def accelerator() -> torch.device | None:
    """Return this machine's accelerator, or None if it has none."""
    return torch.accelerator.current_accelerator(check_available=True)


def best() -> torch.device:
    """Return the accelerator, or the CPU where there is none."""
    return accelerator() or CPU


def is_accelerator(device: torch.device) -> bool:
    """Whether tensors of this device lie elsewhere than in the CPU's memory."""
    return device.type != "cpu"


def wait(device: torch.device) -> None:
    """Wait until all work that was given to a device is done; on a CPU it is."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


@cache
def has_graphs(device: torch.device) -> bool:
    """Whether work of this device can be captured: torch knows graphs since 2.13, and not of every accelerator."""
    if not is_accelerator(device) or not hasattr(torch.accelerator, "Graph"):
        return False
    try:
        torch.accelerator.Graph()
    except RuntimeError:  # "Graph is not supported on device type"
        return False
    return True


def capture(run: Callable[[], _Result], device: torch.device) -> tuple[torch.accelerator.Graph, _Result]:
    """Return as a graph what ``run`` gives an accelerator to do, and the result, which holds nothing before a replay.

    ``run`` must have run before, and may not wait for the device.
    """
    graph = torch.accelerator.Graph(capture_error_mode="thread_local")
    with torch.Stream(device), graph:
        result = run()
    return graph, result


def empty_cache() -> None:
    """Give memory that torch keeps for later back to the accelerator, if there is one."""
    if accelerator() is not None:
        torch.accelerator.empty_cache()


def name_of(device: torch.device) -> str:
    """Return what its maker calls an accelerator, or torch if the maker says nothing."""
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: allocated on an accelerator, resident on a CPU."""
    if is_accelerator(device):
        return torch.accelerator.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def start_peak(device: torch.device) -> None:
    """Let ``peak_memory_bytes`` of an accelerator count from now on; a CPU's is that of the process."""
    if is_accelerator(device):
        torch.accelerator.reset_peak_memory_stats(device)
