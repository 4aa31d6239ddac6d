"""The loss on a GPU at the released models' vocabulary, with gradients or without, judged by its matrix products.

The weight is a float32 master, as in training, or bfloat16. Of the former three products are made where one is counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import Case, compiled
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.cross_entropy import cross_entropy

V = 129280
WIDTHS = {"flash": 4096, "pro": 7168}
TOKENS = (4096, 16384)
BYTES = 2  # of an element, bfloat16
MARKS = {
    torch.bfloat16: 0.75,
    torch.float32: 0.4,
}  # of the products' speed: 10 bytes a logit move beside them, and 8 a number of the weight for each slice


def cases() -> list[Case]:
    """Each model at one slice of tokens and at several."""
    return [
        _case(model, tokens, dtype, learns)
        for model in WIDTHS
        for tokens in TOKENS
        for dtype in MARKS
        for learns in (False, True)
    ]


def _case(model: str, tokens: int, dtype: torch.dtype, learns: bool) -> Case:
    D = WIDTHS[model]
    given = (tokens * BYTES + V * dtype.itemsize) * D

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(D, tokens, dtype, learns, backend)

    return Case(
        kernel="cross_entropy" + (" with gradients" if learns else ""),
        shape=f"{model} {tokens} tokens, weight in {str(dtype).removeprefix('torch.')}",
        make=maker("unproved"),
        num_bytes=given * (2 if learns else 1),
        flops=2 * tokens * V * D * (3 if learns else 1),
        twins={
            "portable": maker("portable"),
            "compiled": compiled(lambda: _make(D, tokens, dtype, learns, "reference")),
        },
        mark=MARKS[dtype] * (0.8 if dtype == torch.float32 and not learns else 1),
    )


def _make(D: int, tokens: int, dtype: torch.dtype, learns: bool, backend: Backend) -> Callable[[], object]:
    device = best()
    hidden = torch.randn(tokens, D, device=device, dtype=torch.bfloat16, requires_grad=learns)
    weight = torch.randn(V, D, device=device, dtype=dtype) / D**0.5
    weight.requires_grad_(learns)
    targets = torch.randint(0, V, (tokens,), device=device)
    token_weights = torch.full((tokens,), 1 / tokens, device=device)

    def run() -> object:
        loss, nll = cross_entropy(hidden, weight, targets, token_weights, backend=backend)
        return torch.autograd.grad(loss, (hidden, weight)) if learns else nll

    return run
