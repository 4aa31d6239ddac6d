"""What this machine does: its matrix-product rate. The only file of ``train`` that measures anything."""

from __future__ import annotations

import time

import torch

from dsv4.device import is_accelerator, wait

PRODUCT, LARGE_PRODUCT = 1024, 8192  # rows and columns of the matrices timed, on a CPU and on an accelerator
ROUNDS = 5
SECONDS = 0.1  # of one round, at least


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure FLOP/s of a product large enough for the device, the best of a few rounds: the bound of utilisation."""
    size = LARGE_PRODUCT if is_accelerator(device) else PRODUCT
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    wait(device)
    best = 0.0
    for _ in range(ROUNDS):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            torch.mm(a, b)
            count += 1
            if count % 50 == 0:
                wait(device)
        wait(device)
        best = max(best, count * 2 * size**3 / (time.perf_counter() - start))
    return best
