"""Where kernels are tested: on the accelerator of this machine, or else on the CPU, through Triton's interpreter."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dsv4.device import accelerator

DEVICE = accelerator() or torch.device("cpu")
IS_INTERPRETED = DEVICE.type == "cpu"
DTYPES = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
"""The interpreter's products of bfloat16 are wrong, and say nothing about a GPU's."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the largest value of what is compared: rounding of inputs that both sides share is not in it."""


@contextlib.contextmanager
def poisoned():
    """Fill every new tensor with NaN (or the largest integer), so that what a kernel leaves out is seen."""
    made = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    new = torch.Tensor.new_empty

    def spoil(tensor):
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    with pytest.MonkeyPatch.context() as patch:
        for name, make in made.items():
            patch.setattr(torch, name, lambda *args, make=make, **given: spoil(make(*args, **given)))
        patch.setattr(torch.Tensor, "new_empty", lambda self, *args, **given: spoil(new(self, *args, **given)))
        yield


def assert_near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Compare with a float64 result: errors as a share of its largest value."""
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    largest = wanted.abs().max().clamp(min=1e-30)
    error = ((found.double() - wanted.double()).abs().max() / largest).item()
    assert error <= factor * TOLERANCE[dtype], f"{error:.2e} of the largest value"
