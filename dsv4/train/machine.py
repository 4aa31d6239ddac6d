"""What this machine does: its matrix-product rate, its memory. The only file of ``train`` that measures anything."""

from __future__ import annotations

import resource
import sys
import time

import torch

PRODUCT = 1024  # rows and columns of the matrices timed
ROUNDS = 5
SECONDS = 0.1  # of one round, at least


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure FLOP/s of a 1024-cubed product, the best of a few rounds: the bound utilisation is a share of."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    _wait(device)
    best = 0.0
    for _ in range(ROUNDS):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            torch.mm(a, b)
            count += 1
            if device.type != "cpu" and count % 50 == 0:
                _wait(device)
        _wait(device)
        best = max(best, count * 2 * PRODUCT**3 / (time.perf_counter() - start))
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: resident on a CPU, allocated on an accelerator."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
