"""The next-token loss straight from hidden states: the logits of all tokens never exist at once.

    loss = sum_t token_weight_t * (logsumexp(logits_t) - logits_t[target_t]),    logits = hidden . weight^T

Logits and their statistics are float32.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend, pick
from dsv4.ops.cross_entropy import portable, reference
from dsv4.ops.shapes import Shapes, check_integer


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    backend: Backend = "portable",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted loss, a float32 scalar, and each token's negative log-likelihood, [T] float32.

    hidden: [T, D]; weight: [V, D]; targets: [T] int64 in 0 .. V - 1; token_weights: [T] float32, 0 for
    tokens without a target, 1 / (their number) for a mean. The likelihoods carry no gradient.
    """
    shapes = Shapes()
    shapes.check("hidden", hidden, "T D")
    shapes.check("weight", weight, "V D")
    shapes.check("targets", targets, "T")
    shapes.check("token_weights", token_weights, "T")
    check_integer("targets", targets)
    chosen = pick(
        backend,
        reference=reference.cross_entropy,
        portable=portable.cross_entropy,
        triton="cross_entropy.triton:cross_entropy",
    )
    return chosen(hidden, weight, targets, token_weights)
