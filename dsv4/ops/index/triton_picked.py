"""Scores of picked entries and their gradients as Triton kernels: a program per query, which gathers its keys.

With d = q . k rounded, s = sum_i weight_i relu(d_i), and the gradient g of a pick's score:

    e_i = g weight_i where d_i > 0, else 0
    grad weight_i = sum over picks: g relu(d_i),    grad q_i = sum over picks: e_i k,    grad k = sum over picks of it
    and heads: e_i q_i

A query's gradients are found in one pass over its picks, which leaves the gradient of the key of each pick behind, [P,
J] float32; those are added entry by entry, along a list of the picks sorted by entry. That is done for so many queries
of a row at a time, a number that hangs on P and J alone, that what is left behind fits in ``PARTS_HELD``.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.attend.triton_picked import add_picked_
from dsv4.ops.index.triton_scores import EXACT, Config, load_query, score_tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARTS_HELD = 1 << 28  # elements of keys' gradients in memory at a time, float32
CONFIGS = {
    # Gathered keys of 128 picks are 32 KiB, three tiles of them on their way beside the query's 16 KiB.
    "wide": Config(128, 4, 3, None),
    "float32": Config(16, 4, 1, None),
}
GRADIENT_CONFIGS = {
    # Two sums in registers, [64 heads, 128] and [64 picks, 128], of four warps, beside products of 64 x 64.
    "wide": Config(64, 4, 2, None),
    "shared": Config(64, 8, 2, 128),
    "float32": Config(16, 4, 1, None),
}
NARROW = "wide"  # the one for 16-bit dtypes


def score(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.index.score``. q and k share one dtype: float32, float16 or bfloat16."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; expected float32, float16 or bfloat16 for the Triton kernels")
    if k.dtype != q.dtype:
        raise ValueError(f"k has dtype {k.dtype}; expected {q.dtype}, that of q, for the Triton kernels")
    return _Score.apply(q, k, weights, picked)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, weights, picked):
        q, k, weights, picked = (x.contiguous() for x in (q, k, weights, picked))
        scores = torch.empty(picked.shape, dtype=torch.float32, device=q.device)
        if scores.numel():
            _launch(_score, (q, k, weights, picked, scores), 0, q.shape[0] * q.shape[1], CONFIGS)
        ctx.save_for_backward(q, k, weights, picked)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, weights, picked = ctx.saved_tensors
        grad_q, grad_weights = torch.zeros_like(q), torch.zeros_like(weights)
        grad_k = torch.zeros_like(k, dtype=torch.float32)
        if grad.numel():
            B, T, P = picked.shape
            held = max(1, PARTS_HELD // (P * q.shape[3]))
            grads = grad.float().contiguous(), grad_q, grad_weights
            for row in range(B):
                for first in range(0, T, held):
                    now = picked[row, first : first + held]
                    parts = grad_k.new_empty(*now.shape, q.shape[3])
                    tensors = (q, k, weights, picked, *grads, parts)
                    _launch(_gradients, tensors, row * T + first, len(now), GRADIENT_CONFIGS)
                    add_picked_(grad_k[row], parts[:, :, None], now)
        return grad_q, grad_k.to(k.dtype), grad_weights, None


def _launch(kernel, tensors, first: int, num_queries: int, configs: dict[str, Config]) -> None:
    q, k, _, picked = tensors[:4]
    T, heads, channels = q.shape[1:]
    config = configs["float32" if q.dtype == torch.float32 else NARROW]
    kernel[(num_queries,)](
        *(*tensors, first, T, k.shape[1], picked.shape[2]),
        HEADS=heads,
        CHANNELS=channels,
        BLOCK_I=max(16, triton.next_power_of_2(heads)),
        BLOCK_J=max(16, triton.next_power_of_2(channels)),
        BLOCK_N=config.entries,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        **EXACT,
    )


@triton.jit
def _load_picks(
    k_ptr, picked_ptr, query, start, T, C, P, CHANNELS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The entries of a block of picks [n], -1 beyond the last, and their keys [n, j]; those of -1 are zero."""
    pick = start + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_J)
    entry = tl.load(picked_ptr + query * P + pick, mask=pick < P, other=-1)
    at = (query // T * C + entry)[:, None] * CHANNELS + channel[None, :]
    return entry, tl.load(k_ptr + at, mask=(entry >= 0)[:, None] & (channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def _score(
    q_ptr, k_ptr, weights_ptr, picked_ptr, scores_ptr, first, T, C, P,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query: scores [P], -inf where nothing is picked."""
    query = first + tl.program_id(0).to(tl.int64)
    q, weights = load_query(q_ptr, weights_ptr, query, HEADS, CHANNELS, BLOCK_I, BLOCK_J)
    for start in range(0, P, BLOCK_N):
        entry, keys = _load_picks(k_ptr, picked_ptr, query, start, T, C, P, CHANNELS, BLOCK_J, BLOCK_N)
        scores = tl.where(entry >= 0, score_tile(keys, q, weights), float("-inf"))
        pick = start + tl.arange(0, BLOCK_N)
        tl.store(scores_ptr + query * P + pick, scores, mask=pick < P)


@triton.jit
def _gradients(
    q_ptr, k_ptr, weights_ptr, picked_ptr, grad_ptr, grad_q_ptr, grad_weights_ptr, parts_ptr, first, T, C, P,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query: gradients of q [i, j] and of its weights [i], and those of its picks' keys, parts [P, J]."""
    group = tl.program_id(0).to(tl.int64)
    query = first + group
    q, weights = load_query(q_ptr, weights_ptr, query, HEADS, CHANNELS, BLOCK_I, BLOCK_J)
    head = tl.arange(0, BLOCK_I)
    channel = tl.arange(0, BLOCK_J)
    is_channel = (channel < CHANNELS)[None, :]
    grad_q = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    grad_weights = tl.zeros((BLOCK_I,), dtype=tl.float32)
    for start in range(0, P, BLOCK_N):
        entry, keys = _load_picks(k_ptr, picked_ptr, query, start, T, C, P, CHANNELS, BLOCK_J, BLOCK_N)
        pick = start + tl.arange(0, BLOCK_N)
        grad = tl.load(grad_ptr + query * P + pick, mask=(pick < P) & (entry >= 0), other=0.0)  # [n]
        dots = tl.dot(keys, tl.trans(q), input_precision="ieee").to(q.dtype).to(tl.float32)  # [n, i], as in forward
        grad_weights += tl.sum(tl.maximum(dots, 0.0) * grad[:, None], axis=0)
        moved = tl.where(dots > 0.0, grad[:, None] * weights[None, :], 0.0).to(q.dtype)
        grad_q = tl.dot(tl.trans(moved), keys, grad_q, input_precision="ieee")
        part = tl.dot(moved, q, input_precision="ieee")  # [n, j]
        parts_at = parts_ptr + (group * P + pick)[:, None] * CHANNELS + channel[None, :]
        tl.store(parts_at, part, mask=(pick < P)[:, None] & is_channel)
    at = (query * HEADS + head)[:, None] * CHANNELS + channel[None, :]
    tl.store(grad_q_ptr + at, grad_q.to(grad_q_ptr.dtype.element_ty), mask=(head < HEADS)[:, None] & is_channel)
    grad_weights = grad_weights.to(grad_weights_ptr.dtype.element_ty)
    tl.store(grad_weights_ptr + query * HEADS + head, grad_weights, mask=head < HEADS)
