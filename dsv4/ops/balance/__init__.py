"""The sequence-wise balance loss of a mixture of experts (report 2.1 and 4.2.2, DeepSeek-V3 equations 17 to 20).

    f[e]  = E / (A n) * how many of a document's n tokens go to expert e
    p[e]  = mean over its tokens of affinity[e] / sum over all experts of affinity
    loss  = sum_e f[e] p[e]

1 when the experts are used evenly, E / A when A of them are used alone. It is a weak guard against imbalance inside
one document; the routing bias balances the batch. f carries no gradient. A document weighs what its tokens weigh,
so that a packed row costs what its documents cost apart: that is ours, the report speaks of sequences.
"""

from __future__ import annotations

import torch

from dsv4.ops.backend import Backend, pick
from dsv4.ops.balance import portable, reference
from dsv4.ops.shapes import Shapes, check_integer


def balance(
    affinities: torch.Tensor,
    chosen: torch.Tensor,
    documents: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    backend: Backend = "portable",
) -> torch.Tensor:
    """Return the sum over documents of their loss times the weights of their tokens, a float32 scalar.

    affinities: [T, E] float32, as ``dsv4.ops.route.affinity`` gives, without bias; chosen: [T, A] int64; documents:
    [T] int64, the number of each token's document: from 0 on, ascending, none left out; token_weights: [T] float32,
    0 throughout padding, 1 / (number of tokens) elsewhere for a mean.
    """
    shapes = Shapes()
    shapes.check("affinities", affinities, "T E")
    shapes.check("chosen", chosen, "T A")
    shapes.check("documents", documents, "T")
    shapes.check("token_weights", token_weights, "T")
    check_integer("chosen", chosen)
    check_integer("documents", documents)
    implementation = pick(backend, reference=reference.balance, portable=portable.balance)
    return implementation(affinities, chosen, documents, token_weights)
