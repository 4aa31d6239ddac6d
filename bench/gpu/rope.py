"""Rotations of queries and keys, and of outputs back, judged by the bytes of what goes in and out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import BANDWIDTH, Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.rope import rotate, rotate_unit

TOKENS, CHANNELS, ROTARY, EPS = 4096, 512, 64, 1e-6
HEADS = {"flash": 64, "pro": 128}


def cases() -> list[Case]:
    """Queries, normalised and rotated, and outputs rotated back; with gradients, too."""
    return [
        _case(model, name, backward)
        for model in HEADS
        for name in ("rotate_unit", "rotate")
        for backward in (False, True)
    ]


def _case(model: str, name: str, backward: bool) -> Case:
    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(HEADS[model], name, backward, backend)

    tensors = 5 if backward else 2  # backward reads the gradient and x, and writes x's gradient
    return Case(
        kernel=f"rope.{name}" + (" and backward" if backward else ""),
        shape=f"{model} {TOKENS} tokens",
        make=maker("unproved"),
        num_bytes=tensors * TOKENS * HEADS[model] * CHANNELS * 2,
        twins={"portable": maker("portable")},
        mark=BANDWIDTH,
    )


def _make(heads: int, name: str, backward: bool, backend: Backend) -> Callable[[], object]:
    x, grad = (torch.randn(1, TOKENS, heads, CHANNELS, device=best(), dtype=torch.bfloat16) for _ in range(2))
    cos, sin = (torch.randn(1, TOKENS, ROTARY // 2, device=best()) for _ in range(2))

    def run() -> torch.Tensor:
        if name == "rotate":
            return rotate(x, cos, sin, inverse=True, backend=backend)
        return rotate_unit(x, cos, sin, EPS, backend=backend)

    x.requires_grad_(backward)
    return (lambda: torch.autograd.grad(run(), x, grad)) if backward else run
