"""The loss over slices of tokens: matrix products around one kernel that turns logits into their own gradient.

A slice's logits are float32 sums of a product in the dtype of the activations. The kernel reads a row of them for its
statistics, reads it again and writes the gradient, rounded to the dtype of the products to come, over the front of the
same row. So the loss costs three products of 2 T V D each and 10 bytes a logit.

Why no kernel with the products inside it: one that never writes its logits must form them twice, for the sums over the
vocabulary and then for the gradient. At V = 129,280 and D of 4096 or 7168 a fourth product takes a third more time,
while the 10 bytes take a twentieth of that of 6 D operations. And the products are plain ones, which are cuBLAS' own.

A row's statistics and gradient are summed in an order that V alone decides. What else a token's bits hang on is which
algorithm the library takes for a slice of so many tokens. float64 is ``portable``'s: nothing but tests has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.cross_entropy import portable
from dsv4.ops.cross_entropy.triton_logits import DTYPES, form_logits, head_of, multiply, rounded_head, slice_size
from dsv4.ops.lowbit.triton_codes import cast, raw_bits

LOGITS_HELD = 1 << 29  # elements, 2 GiB: 4096 tokens of 129,280, so that the gradient of the weight is seldom reread
BLOCK = 4096  # logits of a row at a time: 16 a thread, and as many running peaks and sums
WARPS = 8
_LOG2_E = tl.constexpr(1.4426950408889634)
_FLOOR = tl.constexpr(-1.0e38)  # a peak before any logit, finite so that no difference is of two infinities


def cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.cross_entropy``."""
    if hidden.dtype not in DTYPES:
        return portable.cross_entropy(hidden, weight, targets, token_weights)
    learns = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return _CrossEntropy.apply(hidden, weight, targets.contiguous(), token_weights.float().contiguous(), learns)


class _CrossEntropy(torch.autograd.Function):
    """learns: whether hidden, and whether weight, want a gradient. Both are formed here, and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, learns):
        T, V = hidden.shape[0], weight.shape[0]
        head = head_of(weight, hidden.dtype)
        narrow = rounded_head(head, hidden.dtype, weight.shape[1])
        nll = torch.empty(T, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if learns[0] else hidden.new_empty(0)
        grad_weight = torch.empty(weight.shape if learns[1] else (0,), dtype=torch.float32, device=hidden.device)
        size = slice_size(T, V, LOGITS_HELD)
        logits = torch.empty(size, V, dtype=torch.float32, device=hidden.device)
        for first in range(0, T, size):
            now = slice(first, first + size)
            x = hidden[now]
            held = logits[: len(x)]
            form_logits(x, head, held)
            grad_logits = held if hidden.dtype == torch.float32 else held.view(hidden.dtype)[:, :V]
            _loss_kernel[(len(x),)](
                held, targets[now], token_weights[now], nll[now], raw_bits(grad_logits), V, held.stride(0),
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
        ctx.mark_non_differentiable(nll)
        return torch.dot(token_weights, nll), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        of_hidden = grad_hidden * grad.to(grad_hidden.dtype) if ctx.learns[0] else None
        of_weight = None
        if ctx.learns[1]:  # scaled and rounded in one pass, without a second float32 copy
            of_weight = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            torch.mul(grad_weight, grad, out=of_weight)
        return of_hidden, of_weight, None, None, None


@triton.jit
def _loss_kernel(
    logits, targets, token_weights, nll, grads, V, logits_stride, grads_stride,
    HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token. grads may lie where logits do, in numbers as wide or half as wide."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * logits_stride
    lane = tl.arange(0, BLOCK)
    # Every lane has a peak and a sum of its own, which meet once at the end.
    peaks = tl.full([BLOCK], _FLOOR, dtype=tl.float32)
    totals = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(logits + first + lane, mask=first + lane < V, other=float("-inf"))
        higher = tl.maximum(peaks, x)
        totals = totals * tl.exp2((peaks - higher) * _LOG2_E) + tl.exp2((x - higher) * _LOG2_E)
        peaks = higher
    peak = tl.max(peaks, axis=0)
    total = tl.sum(totals * tl.exp2((peaks - peak) * _LOG2_E), axis=0)
    target = tl.load(targets + token)
    # The difference first: large logits that are close leave no rounding of their size.
    tl.store(nll + token, (peak - tl.load(logits + target)) + tl.log(total))
    if HAS_GRADIENT:
        weight = tl.load(token_weights + token)
        share = weight / total
        grads += token * grads_stride
        for first in range(0, V, BLOCK):
            column = first + lane
            x = tl.load(logits + column, mask=column < V, other=0.0)
            grad = tl.exp2((x - peak) * _LOG2_E) * share
            grad = tl.where(column == target, grad - weight, grad)
            # Half as wide, a block of gradients covers logits before it, but the first one covers its own: all
            # threads have read theirs before any writes.
            tl.debug_barrier()
            tl.store(grads + column, cast(grad, grads.dtype.element_ty), mask=column < V)
