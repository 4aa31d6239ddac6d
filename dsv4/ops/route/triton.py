"""The router from its logits in one kernel: affinity, choice and weights of a token without a trip through memory.

    s = sqrt(softplus(z)),    ds/dz = sigmoid(z) / (2 s), and nothing below the lowest logit

Softplus is log(1 + e^z) = log(u) * e^z / (u - 1) with u the rounded 1 + e^z: what the rounding takes from e^z it takes
from both factors, so that small ones keep their digits. A choice is the largest key, an integer that orders as its
score does; equal scores go to the smaller expert, and a NaN is above nothing but what is taken.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.route import portable
from dsv4.ops.route.reference import LOWEST as _LOWEST

LOWEST = tl.constexpr(_LOWEST)
TAKEN = tl.constexpr(-(2**31))
ELEMENTS, TOKENS, WARPS = 1024, 4, 4  # numbers of a program, tokens of one that routes: a warp each


def affinity(logits: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.route.affinity``."""
    return _Affinity.apply(logits) if logits.dtype == torch.float32 else portable.affinity(logits)


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, chosen: torch.Tensor | None, num_choices: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.route.route``."""
    T, E = logits.shape
    weights = logits.new_empty(T, num_choices)
    experts = chosen.contiguous() if chosen is not None else weights.new_empty(T, num_choices, dtype=torch.int64)
    if weights.numel():
        _route_kernel[(triton.cdiv(T, TOKENS),)](
            logits.contiguous(), logits if bias is None else bias.contiguous(), experts, weights, scale, T, E,
            num_choices, bias is not None, TOKENS, triton.next_power_of_2(E), triton.next_power_of_2(num_choices),
            num_warps=WARPS,
        )  # fmt: skip
    return experts, weights


class _Affinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        logits = logits.contiguous()
        out = torch.empty_like(logits)
        if count := logits.numel():
            _affinity_kernel[(triton.cdiv(count, ELEMENTS),)](logits, out, count, ELEMENTS, num_warps=WARPS)
        ctx.save_for_backward(logits, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, out = ctx.saved_tensors
        made = torch.empty_like(logits)
        if count := logits.numel():
            _affinity_backward_kernel[(triton.cdiv(count, ELEMENTS),)](
                grad.contiguous(), logits, out, made, count, ELEMENTS, num_warps=WARPS
            )
        return made


@triton.jit
def _affinity(logit):
    low = tl.where(logit < LOWEST, LOWEST, logit)
    grown = tl.exp(tl.where(low > 20, 20.0, low))
    u = 1 + grown
    softplus = tl.where(u == 1, grown, tl.log(u) * (grown / tl.where(u == 1, 1.0, u - 1)))
    return tl.sqrt_rn(tl.where(low > 20, low, softplus))  # softplus is the identity above 20, as in the released code


@triton.jit
def _affinity_kernel(logits, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, _affinity(tl.load(logits + at, mask=at < count, other=0.0)), mask=at < count)


@triton.jit
def _affinity_backward_kernel(grad, logits, out, made, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < count
    logit = tl.load(logits + at, mask=is_in, other=0.0)
    small = tl.exp(-tl.abs(tl.where(logit < LOWEST, LOWEST, logit)))
    slope = tl.where(logit > 20, 1.0, tl.where(logit < 0, small, 1.0) / (1 + small))
    scaled = tl.load(grad + at, mask=is_in, other=0.0) * slope / (2 * tl.load(out + at, mask=is_in, other=1.0))
    tl.store(made + at, tl.where(logit < LOWEST, 0.0, scaled), mask=is_in)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits, bias, experts, weights, scale, num_tokens, E: tl.constexpr, A: tl.constexpr, CHOOSES: tl.constexpr,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    choice = tl.arange(0, CHOICES)
    at = token[:, None] * A + choice[None, :]
    is_in = (token < num_tokens)[:, None] & (choice < A)[None, :]
    if CHOOSES:
        expert = tl.arange(0, PADDED)
        is_expert = (token < num_tokens)[:, None] & (expert < E)[None, :]
        logit = tl.load(logits + token[:, None] * E + expert[None, :], mask=is_expert, other=0.0)
        affinities = _affinity(logit)
        score = affinities + tl.load(bias + expert, mask=expert < E, other=0.0)[None, :]
        bits = score.to(tl.int32, bitcast=True)  # none is of a negative zero: affinities are above it
        key = tl.where(score != score, TAKEN + 1, bits ^ (bits >> 31 & 0x7FFFFFFF))
        key = tl.where((expert < E)[None, :], key, TAKEN)
        chosen = tl.zeros([TOKENS, CHOICES], dtype=tl.int32)
        own = tl.zeros([TOKENS, CHOICES], dtype=tl.float32)
        for i in range(A):
            best = tl.argmax(key, axis=1, tie_break_left=True)
            is_best = expert[None, :] == best[:, None]
            of_best = tl.sum(tl.where(is_best, affinities, 0.0), axis=1)
            key = tl.where(is_best, TAKEN, key)
            chosen = tl.where((choice == i)[None, :], best[:, None], chosen)
            own = tl.where((choice == i)[None, :], of_best[:, None], own)
        tl.store(experts + at, chosen.to(tl.int64), mask=is_in)
    else:
        chosen = tl.load(experts + at, mask=is_in, other=0)
        own = _affinity(tl.load(logits + token[:, None] * E + chosen, mask=is_in, other=0.0))
    total = tl.sum(tl.where((choice < A)[None, :], own, 0.0), axis=1)
    tl.store(weights + at, scale * own / total[:, None], mask=is_in)
