"""Muon (report 2.4, algorithm 1) for many matrices at once.

    M <- momentum M + G
    O  = orthogonalize(momentum M + G) sqrt(max(rows, columns)) update_rms
    W <- (1 - learning_rate weight_decay) W - learning_rate O

A full-rank O has a root mean square of ``update_rms``. Matrices of equal shape, of whatever parameters, are
orthogonalised together (report 3.5.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from dsv4.device import is_accelerator
from dsv4.ops.backend import resolve
from dsv4.ops.orthogonalize import HYBRID, Steps, orthogonalize

ELEMENTS_AT_ONCE = 1 << 24  # of matrices orthogonalised together: 64 MiB in float32, of which about five are held
MOST_AT_ONCE = 1 << 28  # on an accelerator, which has more to do at a time


class Stack(NamedTuple):
    """The independent matrices of a parameter, views of it: all [number, rows, columns], float32 or float64."""

    weight: torch.Tensor
    grad: torch.Tensor
    momentum: torch.Tensor


@torch.no_grad()
def step_(
    stacks: Iterable[Stack],
    learning_rate: float,
    *,
    momentum: float,
    weight_decay: float,
    update_rms: float,
    dtype: torch.dtype,
    steps: Steps = HYBRID,
) -> None:
    """Take one step; overwrites weights and momenta. dtype: of the products inside the orthogonalisation."""
    for batch in _batches(stacks):
        ahead = torch.cat([_look_ahead_(stack, momentum) for stack in batch])  # [number, rows, columns]
        directions = orthogonalize(ahead, dtype=dtype, steps=steps, backend=resolve("auto", ahead.device))
        scale = update_rms * max(ahead.shape[1:]) ** 0.5
        parts = directions.split([len(stack.weight) for stack in batch])
        for stack, direction in zip(batch, parts, strict=True):
            stack.weight.mul_(1 - learning_rate * weight_decay).add_(direction, alpha=-learning_rate * scale)


def _look_ahead_(stack: Stack, momentum: float) -> torch.Tensor:
    """Add the gradient to the momentum, in place; return where the next step would take it: momentum M + G."""
    return stack.grad.add(stack.momentum.mul_(momentum).add_(stack.grad), alpha=momentum)


def _batches(stacks: Iterable[Stack]) -> Iterator[list[Stack]]:
    """Join stacks of equal matrices, and cut where a batch would be too large."""
    by_shape: dict[torch.Size, list[Stack]] = {}
    for stack in stacks:
        by_shape.setdefault(stack.weight.shape[1:], []).append(stack)
    for shape, alike in by_shape.items():
        at_once = MOST_AT_ONCE if is_accelerator(alike[0].weight.device) else ELEMENTS_AT_ONCE
        limit = max(1, at_once // shape.numel())
        batch: list[Stack] = []
        room = limit
        for stack in alike:
            begin, number = 0, len(stack.weight)
            while begin < number:
                end = min(number, begin + room)
                batch.append(Stack(*(tensor[begin:end] for tensor in stack)))
                room -= end - begin
                begin = end
                if room == 0:
                    yield batch
                    batch, room = [], limit
        if batch:
            yield batch
