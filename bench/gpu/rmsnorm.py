"""RMS normalisation at the widths of the released models, judged by the bytes of its input and output."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.rmsnorm import rmsnorm

TOKENS = 4096
EPS = 1e-6
WIDTHS = {"flash": 4096, "pro": 7168, "flash queries": 1024, "pro queries": 1536, "keys": 512}


def cases() -> list[Case]:
    """Forward at every width, forward and backward at those of the models."""
    both = [_case(name, D, backward=backward) for name, D in list(WIDTHS.items())[:2] for backward in (False, True)]
    return both + [_case(name, D, backward=False) for name, D in list(WIDTHS.items())[2:]]


def _case(name: str, D: int, *, backward: bool) -> Case:
    tensors = 5 if backward else 2  # backward reads the gradient and x, and writes x's gradient
    return Case(
        kernel="rmsnorm.rmsnorm" + (" and backward" if backward else ""),
        shape=f"{name} {TOKENS} tokens of {D}",
        make=lambda: _make("unproved", D, backward),
        num_bytes=tensors * TOKENS * D * 2,
        twins={
            "portable": lambda: _make("portable", D, backward),
            "compiled": lambda: _make("compiled", D, backward),
        },
        mark=0.7,
    )


def _tensors(D: int, backward: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, grad = (torch.randn(TOKENS, D, device=best(), dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(D, device=best())
    return x.requires_grad_(backward), weight.requires_grad_(backward), grad


def _make(backend: Backend, D: int, backward: bool) -> Callable[[], object]:
    x, weight, grad = _tensors(D, backward)
    if not backward:
        return lambda: rmsnorm(x, weight, EPS, backend=backend)
    return lambda: torch.autograd.grad(rmsnorm(x, weight, EPS, backend=backend), (x, weight), grad)
