"""AdamW; the count of steps is each parameter's own.

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    W <- (1 - learning_rate weight_decay) W - learning_rate m' / (sqrt(v') + eps)

with m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t) at step t. The report's eps of 1e-20 is a float32 number and
only keeps 0 / 0 away: where every gradient so far was 0, nothing moves but by weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Moments(NamedTuple):
    """A parameter with its gradient and their running averages, all of one shape, float32 or float64.

    count: the number of this step, from 1.
    """

    weight: torch.Tensor
    grad: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    count: int


@torch.no_grad()
def step_(
    parameters: Iterable[Moments],
    learning_rate: float,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Take one step; overwrites weights, means and squares."""
    beta1, beta2 = betas
    for weight, grad, mean, square, count in parameters:
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square.sqrt() / (1 - beta2**count) ** 0.5).add_(eps)
        weight.mul_(1 - learning_rate * weight_decay)
        weight.addcdiv_(mean, root, value=-learning_rate / (1 - beta1**count))
