"""The divergence over slices of tokens: two models' products around one kernel that turns logits into a gradient.

A slice's logits are float32 sums, of the student and of the teacher, formed as those of the next-token loss are. The
kernel reads a row of both for its statistics, the divergence among them, reads it again and writes the student's
gradient, rounded to the dtype of the products to come, over the front of the student's row. So a token costs its two
forward products, two of the student's gradients, and 18 bytes a word, which are few beside 8 D operations.

    kl = sum_v exp(x_v - peak) * ((x_v - peak) - (y_v - peak')) / total - log(total) + log(total')

over student logits x and teacher logits y, each with its own peak and the total of its exponentials. Differences are
taken between numbers near 0, so logits of any size leave no rounding of their size, and of equal rows nothing is left.

A row is summed in an order that V alone decides. float64 is ``portable``'s: nothing but tests has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.cross_entropy.triton_logits import DTYPES, form_logits, head_of, multiply, rounded_head, slice_size
from dsv4.ops.lowbit.triton_codes import cast, raw_bits
from dsv4.ops.vocabulary_kl import portable

LOGITS_HELD = 1 << 28  # elements of either model, 2 GiB in all: 2048 tokens of 129,280
BLOCK = 2048  # logits of a row at a time: 8 a thread of either model, and as many of each statistic
WARPS = 8
_LOG2_E = tl.constexpr(1.4426950408889634)
_FLOOR = tl.constexpr(-1.0e38)  # a peak before any logit, and a logit where there is no word: finite, so that no
# difference is of two infinities, and nothing beside any other peak


def vocabulary_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    token_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.vocabulary_kl``."""
    if hidden.dtype not in DTYPES or teacher_hidden.dtype not in DTYPES:
        return portable.vocabulary_kl(hidden, weight, teacher_hidden, teacher_weight, token_weights)
    learns = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    weights = token_weights.float().contiguous()
    return _VocabularyKL.apply(hidden, weight, teacher_hidden, teacher_weight, weights, learns)


class _VocabularyKL(torch.autograd.Function):
    """learns: whether hidden, and whether weight, want a gradient. Both are formed here, and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, token_weights, learns):
        (T, D), V = hidden.shape, weight.shape[0]
        head, teacher_head = head_of(weight, hidden.dtype), head_of(teacher_weight, teacher_hidden.dtype)
        narrow = rounded_head(head, hidden.dtype, D)
        kl = torch.empty(T, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if learns[0] else hidden.new_empty(0)
        grad_weight = torch.empty(weight.shape if learns[1] else (0,), dtype=torch.float32, device=hidden.device)
        size = slice_size(T, V, LOGITS_HELD)
        logits = torch.empty(2, size, V, dtype=torch.float32, device=hidden.device)  # of student and teacher
        for first in range(0, T, size):
            now = slice(first, first + size)
            x = hidden[now]
            held, taught = logits[0, : len(x)], logits[1, : len(x)]
            form_logits(x, head, held)
            form_logits(teacher_hidden[now], teacher_head, taught)
            grad_logits = held if hidden.dtype == torch.float32 else held.view(hidden.dtype)[:, :V]
            _kl_kernel[(len(x),)](
                held, taught, token_weights[now], kl[now], raw_bits(grad_logits), V, held.stride(0),
                grad_logits.stride(0), any(learns), BLOCK, num_warps=WARPS,
            )  # fmt: skip
            if learns[0]:
                torch.mm(grad_logits, narrow, out=grad_hidden[now])
            if learns[1]:
                multiply(grad_logits.T, x, grad_weight, adds=first > 0)
        if T == 0:
            grad_weight.zero_()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.learns = weight.dtype, learns
        ctx.mark_non_differentiable(kl)
        return torch.dot(token_weights, kl), kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        of_hidden = grad_hidden * grad.to(grad_hidden.dtype) if ctx.learns[0] else None
        of_weight = None
        if ctx.learns[1]:  # scaled and rounded in one pass, without a second float32 copy
            of_weight = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            torch.mul(grad_weight, grad, out=of_weight)
        return of_hidden, of_weight, None, None, None, None


@triton.jit
def _kl_kernel(
    logits, taught, token_weights, kl, grads, V, logits_stride, grads_stride,
    HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token. taught: the teacher's logits. grads may lie where logits do, in numbers as wide or half as wide."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * logits_stride
    taught += token * logits_stride
    lane = tl.arange(0, BLOCK)
    # Every lane has statistics of its own, which meet once at the end: peaks, totals, and sums of exponentials times
    # differences, each against the lane's peaks of the moment.
    peaks = tl.full([BLOCK], _FLOOR, dtype=tl.float32)
    taught_peaks = tl.full([BLOCK], _FLOOR, dtype=tl.float32)
    totals = tl.zeros([BLOCK], dtype=tl.float32)
    taught_totals = tl.zeros([BLOCK], dtype=tl.float32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, V, BLOCK):
        column = first + lane
        x = tl.load(logits + column, mask=column < V, other=_FLOOR)
        y = tl.load(taught + column, mask=column < V, other=_FLOOR)
        higher, taught_higher = tl.maximum(peaks, x), tl.maximum(taught_peaks, y)
        shrinks = tl.exp2((peaks - higher) * _LOG2_E)
        share = tl.where(column < V, tl.exp2((x - higher) * _LOG2_E), 0.0)
        # Higher peaks move every difference of before by as much.
        moved = (peaks - higher) - (taught_peaks - taught_higher)
        sums = (sums + totals * moved) * shrinks + share * ((x - higher) - (y - taught_higher))
        totals = totals * shrinks + share
        taught_totals = taught_totals * tl.exp2((taught_peaks - taught_higher) * _LOG2_E)
        taught_totals += tl.exp2((y - taught_higher) * _LOG2_E)
        peaks, taught_peaks = higher, taught_higher
    peak, taught_peak = tl.max(peaks, axis=0), tl.max(taught_peaks, axis=0)
    shrinks = tl.exp2((peaks - peak) * _LOG2_E)
    moved = (peaks - peak) - (taught_peaks - taught_peak)
    total = tl.sum(totals * shrinks, axis=0)
    taught_total = tl.sum(taught_totals * tl.exp2((taught_peaks - taught_peak) * _LOG2_E), axis=0)
    of_totals = tl.log(total) - tl.log(taught_total)
    # (student.exp() * (student - teacher)).sum(dim=-1)
    divergence = tl.sum((sums + totals * moved) * shrinks, axis=0) / total - of_totals
    tl.store(kl + token, divergence)
    if HAS_GRADIENT:
        share_of = tl.load(token_weights + token) / total
        grads += token * grads_stride
        for first in range(0, V, BLOCK):
            column = first + lane
            x = tl.load(logits + column, mask=column < V, other=0.0)
            y = tl.load(taught + column, mask=column < V, other=0.0)
            difference = (x - peak) - (y - taught_peak) - of_totals
            grad = tl.exp2((x - peak) * _LOG2_E) * share_of * (difference - divergence)
            # Half as wide, a block of gradients covers logits before it, but the first one covers its own: all
            # threads have read theirs before any writes.
            tl.debug_barrier()
            tl.store(grads + column, cast(grad, grads.dtype.element_ty), mask=column < V)
