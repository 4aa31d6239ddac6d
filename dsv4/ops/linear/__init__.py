"""Linear maps without bias: y = x W^T, alone, several of one input, and by groups.

Results come in the dtype of x, to which the weight is cast first, or ``wide``: multiplied and returned in float32, as
where the released code widens its inputs (router, compressors, head).

A weight may be a ``Packed`` matrix of codes. Then x is rounded to E4M3 in groups of 128 first, as released:

    y = sum over groups of (sum of x code times w code) * x scale * w scale, in float32

The kernels (backend ``native``, where no
gradient is asked for) compute each element by itself in a fixed order: it has the same bits whatever the other rows
and columns, on any number of threads. They read a weight as it is stored, and never convert it as a whole. So do those
in Triton, for packed weights and for wide maps of 16-bit numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv4.ops.backend import Backend, pick
from dsv4.ops.linear import native, portable, reference
from dsv4.ops.linear.portable import Weight
from dsv4.ops.lowbit import Packed
from dsv4.ops.shapes import Shapes


def linear(x: torch.Tensor, weight: Weight, *, wide: bool = False, backend: Backend = "portable") -> torch.Tensor:
    """Return x W^T, [..., N]. x: [..., K]; weight: [N, K], in any float dtypes, or packed."""
    _check(x, [weight])
    run = pick(
        backend,
        reference=reference.linear,
        portable=portable.linear,
        native=native.linear,
        triton="linear.triton:linear",
    )
    return run(x, weight, wide)


def linears(
    x: torch.Tensor, weights: Sequence[Weight], *, wide: Sequence[bool], backend: Backend = "portable"
) -> list[torch.Tensor]:
    """Return several maps of one input, as ``linear`` does each. x: [..., K]; weights: [N, K] each, of their own N."""
    _check(x, weights)
    if len(wide) != len(weights):
        raise ValueError(f"wide has {len(wide)} values; expected one for each of {len(weights)} weights")
    run = pick(
        backend,
        reference=reference.linears,
        portable=portable.linears,
        native=native.linears,
        triton="linear.triton:linears",
    )
    return run(x, weights, wide)


def linear_groups(x: torch.Tensor, weight: torch.Tensor, *, backend: Backend = "portable") -> torch.Tensor:
    """Map each group of channels by its own weight, [M, G * N]. x: [M, G, K]; weight: [G, N, K]."""
    shapes = Shapes()
    shapes.check("x", x, "M G K")
    shapes.check("weight", weight, "G N K")
    run = pick(backend, reference=reference.linear_groups, portable=portable.linear_groups, native=native.linear_groups)
    return run(x, weight)


def _check(x: torch.Tensor, weights: Sequence[Weight]) -> None:
    """Check the shapes, at the cost of comparing numbers where they fit: a decoding step has many small maps."""
    num_inputs = x.shape[-1] if x.dim() else -1
    if all(len(weight.shape) == 2 and weight.shape[1] == num_inputs for weight in weights):
        return
    for weight in weights:
        if isinstance(weight, Packed):
            if len(weight.shape) != 2 or weight.shape[1] != num_inputs:
                raise ValueError(
                    f"weight has shape {list(weight.shape)}; expected [N, {num_inputs}], as x has channels"
                )
            continue
        shapes = Shapes()
        shapes.check("x", x, "... K")
        shapes.check("weight", weight, "N K")
