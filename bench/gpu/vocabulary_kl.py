"""The divergence from a teacher on a GPU: a student of Flash's width, a teacher of Flash's or of Pro's.

The student's head is a float32 master, as in training, the teacher's is bfloat16, as it is stored. Of the former's
forward product three are made where one is counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.vocabulary_kl import vocabulary_kl

V, D = 129280, 4096
TEACHERS = {"flash": 4096, "pro": 7168}  # widths
TOKENS = (2048, 4096)  # one slice, and two
BYTES, WIDE = 2, 4  # of an element, bfloat16 and float32
MARKS = {True: 0.4, False: 0.32}  # of the products' speed, with gradients and without: as the next-token loss


def cases() -> list[Case]:
    """Each teacher with gradients, and without, as a metric."""
    return [_case(teacher, tokens, learns) for teacher in TEACHERS for tokens in TOKENS for learns in (False, True)]


def _case(teacher: str, tokens: int, learns: bool) -> Case:
    E = TEACHERS[teacher]
    of_student, of_teacher = (tokens * BYTES + V * WIDE) * D, (tokens + V) * BYTES * E

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(E, tokens, learns, backend)

    return Case(
        kernel="vocabulary_kl" + (" with gradients" if learns else ""),
        shape=f"flash {tokens} tokens, teacher {teacher}",
        make=maker("unproved"),
        num_bytes=of_student * (2 if learns else 1) + of_teacher,
        flops=2 * tokens * V * (D * (3 if learns else 1) + E),
        twins={
            "portable": maker("portable"),
            "compiled": lambda: torch.compile(_make(E, tokens, learns, "reference")),
        },
        mark=MARKS[learns],
    )


def _make(E: int, tokens: int, learns: bool, backend: Backend) -> Callable[[], object]:
    device, narrow = best(), torch.bfloat16
    hidden = torch.randn(tokens, D, device=device, dtype=narrow, requires_grad=learns)
    weight = torch.randn(V, D, device=device) / D**0.5
    weight.requires_grad_(learns)
    teacher_hidden = torch.randn(tokens, E, device=device, dtype=narrow)
    teacher_weight = torch.randn(V, E, device=device, dtype=narrow) / E**0.5
    token_weights = torch.full((tokens,), 1 / tokens, device=device)

    def run() -> object:
        loss, kl = vocabulary_kl(hidden, weight, teacher_hidden, teacher_weight, token_weights, backend=backend)
        return torch.autograd.grad(loss, (hidden, weight)) if learns else kl

    return run
