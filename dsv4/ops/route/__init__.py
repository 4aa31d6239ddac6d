"""Which experts a token goes to, and with what weight (report 2.1).

    s_e = sqrt(softplus(logit_e)),    weight_e = routed_scale * s_e / sum of the chosen s

The chosen experts are the A largest of s + bias, or those that a table gives for the token's id. The bias
balances the load: it moves the choice, never the weight.
"""

from __future__ import annotations

import torch

from dsv4 import native as kernels
from dsv4.ops.backend import Backend, pick, triton_kernel
from dsv4.ops.route import native, portable, reference
from dsv4.ops.shapes import Shapes, check_integer


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    chosen: torch.Tensor | None,
    experts_per_token: int,
    routed_scale: float,
    *,
    backend: Backend = "portable",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts [T, A] int64 and their weights [T, A] float32, without gradients.

    logits: [T, E] float32. Experts are chosen by affinity plus bias [E] float32, unless ``chosen`` [T, A] int64 gives
    them: exactly one of the two is there.
    """
    if (bias is None) == (chosen is None):
        raise ValueError("bias and chosen are both given or both None; expected one of them")
    with torch.no_grad():
        if backend == "native" and kernels.serves(logits):
            return native.route(logits, bias, chosen, experts_per_token, routed_scale)
        kernel = triton_kernel(backend, "route.triton:route")
        if kernel is not None and logits.dtype == torch.float32:
            _check_count(experts_per_token, logits)
            return kernel(logits, bias, chosen, experts_per_token, routed_scale)
        affinities = affinity(logits, backend=backend)
        if chosen is None:
            assert bias is not None
            chosen = choose(affinities, bias, experts_per_token)
        return chosen, weigh(affinities, chosen, routed_scale)


def affinity(logits: torch.Tensor, *, backend: Backend = "portable") -> torch.Tensor:
    """Return sqrt(softplus(logits)), float32, any shape.

    Logits below -80 count as -80: there softplus nears the smallest float32, the gradient of its root would
    not be a number, and weights are 4e-18 of those of a logit of 0 either way.
    """
    run = pick(backend, reference=reference.affinity, portable=portable.affinity, triton="route.triton:affinity")
    return run(logits)


def choose(affinities: torch.Tensor, bias: torch.Tensor, experts_per_token: int) -> torch.Tensor:
    """Return the experts with the largest affinity plus bias, [T, A] int64. No gradient passes.

    affinities: [T, E] float32; bias: [E] float32.
    """
    shapes = Shapes()
    shapes.check("affinities", affinities, "T E")
    shapes.check("bias", bias, "E")
    _check_count(experts_per_token, affinities)
    with torch.no_grad():
        return (affinities + bias).topk(experts_per_token, dim=-1).indices


def weigh(affinities: torch.Tensor, experts: torch.Tensor, routed_scale: float) -> torch.Tensor:
    """Return the weights of the chosen experts, [T, A] float32, differentiable in the affinities.

    affinities: [T, E] float32; experts: [T, A] int64.
    """
    shapes = Shapes()
    shapes.check("affinities", affinities, "T E")
    shapes.check("experts", experts, "T A")
    check_integer("experts", experts)
    chosen = affinities.gather(-1, experts)  # [T, A]
    return routed_scale * chosen / chosen.sum(dim=-1, keepdim=True)


def _check_count(experts_per_token: int, scores: torch.Tensor) -> None:
    if experts_per_token > scores.shape[1]:
        raise ValueError(f"experts_per_token is {experts_per_token}; expected at most the {scores.shape[1]} experts")
