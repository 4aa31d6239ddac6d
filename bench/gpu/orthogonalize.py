"""Orthogonalisation on a GPU: the report's ten steps for the matrices that Flash and Pro have most of.

Judged by three products a step, as if none of them were symmetric: half of two of them need not be done, so that more
than the ceiling can be had.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.orthogonalize import HYBRID, orthogonalize

MARK = 0.9
SHAPES = {
    "flash 8 experts, in": (8, 2048, 4096),
    "flash 8 experts, out": (8, 4096, 2048),
    "flash queries": (1, 32768, 1024),
    "pro 8 experts, in": (8, 3072, 7168),
    "pro output": (1, 7168, 16384),
}


def cases() -> list[Case]:
    """Each shape, of float32 matrices in bfloat16 products."""
    return [_case(name, shape) for name, shape in SHAPES.items()]


def _case(name: str, shape: tuple[int, int, int]) -> Case:
    batch, R, C = shape[0], min(shape[1:]), max(shape[1:])

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(shape, backend)

    return Case(
        kernel="orthogonalize",
        shape=name,
        make=maker("unproved"),
        num_bytes=2 * 4 * batch * R * C,
        flops=len(HYBRID) * 2 * batch * (2 * R * R * C + R * R * R),
        twins={"portable": maker("portable"), "compiled": lambda: torch.compile(_make(shape, "portable"))},
        mark=MARK,
    )


def _make(shape: tuple[int, int, int], backend: Backend) -> Callable[[], object]:
    matrices = torch.randn(shape, device=best())
    return lambda: orthogonalize(matrices, dtype=torch.bfloat16, backend=backend)
