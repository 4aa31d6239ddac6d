"""Gradients of attention as Triton kernels: of queries and picks, and what they share with those of keys.

With s = scale q . x, p = exp(s - log-sum-exp) and delta = out . grad, of a query, a head and a key x:

    ds = p (grad . x - delta),    grad q = scale sum_x ds x,    grad x = sum over queries and heads: scale ds q + p grad

Queries go as in forward, one by one; raw tokens and entries of an interval the other way round, in ``triton_keys.py``.
A picked entry is seen by queries here and there, one key a query: to read a query's 2 H K numbers again for its picks
would be limited by memory. So a query leaves what it finds for its picks behind, [P, K] in the dtype of q, and that is
added entry by entry (``triton_picked.py``). It is done for so many queries of a row at a time, a number that depends on
P and K alone, that what they leave fits in ``PARTS_HELD``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4.ops.attend.triton_picked import add_picked_

LOG2_E = math.log2(math.e)
PARTS_HELD = 1 << 29  # elements that queries leave behind at a time


class Seen(NamedTuple):
    """Which keys queries see; tensors that ``kind`` leaves out are stand-ins, and not read.

    kind: ``none``, ``interval`` or ``picked``; raw_begin, begin, end: [B, T]; picked: [B, T, P]. All contiguous int64.
    """

    kind: str
    raw_begin: torch.Tensor
    picked: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor

    @classmethod
    def of(
        cls,
        raw_begin: torch.Tensor,
        picked: torch.Tensor | None,
        begin: torch.Tensor | None,
        end: torch.Tensor | None,
        num_entries: int,
    ) -> Seen:
        """Complete what an ``Entries`` of so many entries says."""
        nothing = raw_begin[..., None]
        if picked is not None and picked.shape[2] and num_entries:
            return cls("picked", raw_begin, picked.contiguous(), raw_begin, raw_begin)
        if begin is not None and end is not None and num_entries:
            return cls("interval", raw_begin, nothing, begin.contiguous(), end.contiguous())
        return cls("none", raw_begin, nothing, raw_begin, raw_begin)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All but the kind, in the order in which kernels take them."""
        return self[1:]


class Config(NamedTuple):
    """Heads and keys of a tile, warps of a program, and how many tiles are on their way."""

    heads: int
    keys: int
    warps: int
    stages: int


CONFIGS = {
    # In shared memory, of 227 KiB: 128 of queries and their gradients, two tiles of keys of 32 each, and what products
    # hand on. 64 heads x 512 channels of float32 sums are half the registers.
    "wide": Config(64, 32, 8, 2),
    "narrow": Config(32, 32, 4, 2),
    "float32": Config(16, 16, 4, 1),
}
NARROW = "wide"  # the one for 16-bit dtypes


def distance(grad_out: torch.Tensor, q: torch.Tensor) -> int:
    """From q to its gradient in memory, in elements.

    A tile holds lines of both, in turn; were they chosen by pointer, the compiler would load number by number.
    """
    return (grad_out.data_ptr() - q.data_ptr()) // q.element_size()


def query_gradient(
    q: torch.Tensor,
    kv: torch.Tensor,
    values: torch.Tensor,
    seen: Seen,
    window: int,
    scale: float,
    log_total: torch.Tensor,
    out: torch.Tensor,
    grad_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradient of q, [B, T, H, K], delta, [B, T, H] float32, and that of picked values, [B, C, K] float32.

    log_total: [B, T, H] float32, base 2; out and grad_out: like q. All are contiguous. Values that are not picked have
    zeros.
    """
    B, T, H, K = q.shape
    grad_q, delta = torch.empty_like(q), torch.empty_like(log_total)
    grad_values = torch.zeros_like(values, dtype=torch.float32)
    if not q.numel():
        return grad_q, delta, grad_values
    config = CONFIGS["float32" if q.dtype == torch.float32 else NARROW]
    block_heads = min(config.heads, max(16, triton.next_power_of_2(H)))
    head_blocks, num_picks = triton.cdiv(H, block_heads), seen.picked.shape[-1]

    def find(first: int, count: int, parts: torch.Tensor) -> None:
        _query_gradient[(count, head_blocks)](
            *(q, kv, values, *seen.tensors(), log_total, out, grad_out, grad_q, delta, parts, first),
            *(distance(grad_out, q), T, kv.shape[1], values.shape[1], num_picks, window, scale, scale * LOG2_E),
            KIND=seen.kind,
            H=H,
            K=K,
            BLOCK_H=block_heads,
            BLOCK_K=max(16, triton.next_power_of_2(K)),
            BLOCK_N=config.keys,
            STAGES=config.stages,
            num_warps=config.warps,
        )

    if seen.kind != "picked":
        find(0, B * T, parts=q)  # which is not written
        return grad_q, delta, grad_values
    held = max(1, PARTS_HELD // (num_picks * head_blocks * K))
    for row in range(B):
        for first in range(0, T, held):
            parts = q.new_empty(min(held, T - first), num_picks, head_blocks, K)
            find(row * T + first, len(parts), parts)
            add_picked_(grad_values[row], parts, seen.picked[row, first : first + held])
    return grad_q, delta, grad_values


@triton.jit(do_not_specialize=["first_query"])
def _query_gradient(
    q_ptr,
    kv_ptr,
    values_ptr,
    raw_begin_ptr,
    picked_ptr,
    begin_ptr,
    end_ptr,
    log_total_ptr,
    out_ptr,
    grad_ptr,
    grad_q_ptr,
    delta_ptr,
    parts_ptr,
    first_query,
    distance,
    T,
    S,
    C,
    P,
    window,
    scale,
    log2_scale,
    KIND: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query and a block of heads, along the loops of forward; past 60 lines like them.

    The condition always holds: as in forward, it lets the next tile arrive beside the products.
    """
    query = first_query + tl.program_id(0).to(tl.int64)
    row, t = query // T, query % T
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    place = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_K)[None, :]
    is_channel = channel < K
    at = (query * H + head)[:, None] * K + channel
    is_q = (head < H)[:, None] & is_channel
    log_total = tl.load(log_total_ptr + query * H + head, mask=head < H, other=0.0)
    delta = tl.load(out_ptr + at, mask=is_q, other=0.0).to(tl.float32)
    delta = tl.sum(delta * tl.load(grad_ptr + at, mask=is_q, other=0.0).to(tl.float32), axis=1)  # [h]
    tl.store(delta_ptr + query * H + head, delta, mask=head < H)

    own_head, is_grad = lines(BLOCK_H)
    own_head += tl.program_id(1) * BLOCK_H
    both_at = q_ptr + (query * H + own_head)[:, None] * K + is_grad[:, None] * distance + channel
    both = tl.load(both_at, mask=(own_head < H)[:, None] & is_channel, other=0.0)  # [2 h, k]
    sums = tl.zeros((BLOCK_H, BLOCK_K), dtype=tl.float32)

    own = S - T + t
    first = tl.maximum(tl.maximum(tl.load(raw_begin_ptr + query), own - window + 1), 0)
    for start in tl.range(first, own + 1, BLOCK_N, num_stages=STAGES):
        raw = start + place
        is_seen = raw <= own
        keys_at = kv_ptr + (row * S + raw)[:, None] * K + channel
        keys = tl.load(keys_at, mask=is_seen[:, None] & is_channel, other=0.0)  # [n, k]
        if T > 0:
            _, grad_scores = gradients(both, keys, is_seen, log_total, delta, log2_scale)
            sums = tl.dot(grad_scores.to(keys.dtype), keys, sums, input_precision="ieee")
    if KIND == "interval":
        first_entry = tl.maximum(tl.load(begin_ptr + query), 0)
        end = tl.minimum(tl.load(end_ptr + query), C)
        for start in tl.range(first_entry, end, BLOCK_N, num_stages=STAGES):
            entry = start + place
            is_seen = entry < end
            keys_at = values_ptr + (row * C + entry)[:, None] * K + channel
            keys = tl.load(keys_at, mask=is_seen[:, None] & is_channel, other=0.0)
            if T > 0:
                _, grad_scores = gradients(both, keys, is_seen, log_total, delta, log2_scale)
                sums = tl.dot(grad_scores.to(keys.dtype), keys, sums, input_precision="ieee")
    if KIND == "picked":
        for start in tl.range(0, P, BLOCK_N, num_stages=STAGES):
            pick = start + place
            entry = tl.load(picked_ptr + query * P + pick, mask=pick < P, other=-1)
            is_seen = entry >= 0
            keys_at = values_ptr + (row * C + entry)[:, None] * K + channel
            keys = tl.load(keys_at, mask=is_seen[:, None] & is_channel, other=0.0)
            if T > 0:
                weights, grad_scores = gradients(both, keys, is_seen, log_total, delta, log2_scale)
                sums = tl.dot(grad_scores.to(keys.dtype), keys, sums, input_precision="ieee")
                shares = shares_of_lines(grad_scores * scale, weights).to(keys.dtype)
                part = tl.dot(tl.trans(both), shares, input_precision="ieee")  # [k, n]
                part_at = ((tl.program_id(0).to(tl.int64) * P + pick) * tl.num_programs(1) + tl.program_id(1)) * K
                part = tl.trans(part.to(parts_ptr.dtype.element_ty))
                tl.store(parts_ptr + part_at[:, None] + channel, part, mask=(pick < P)[:, None] & is_channel)
    tl.store(grad_q_ptr + at, (sums * scale).to(grad_q_ptr.dtype.element_ty), mask=is_q)


# What queries and keys share


@triton.jit
def lines(BLOCK_H: tl.constexpr):
    """The heads of the lines of a tile of queries and their gradients, [2 h] each, and 1 where a line is a gradient.

    Eight of each in turn: in a product, the two lines of a head then are in the registers of one thread.
    """
    line = tl.arange(0, 2 * BLOCK_H)
    return line // 16 * 8 + line % 8, (line // 8 % 2).to(tl.int64)


@triton.jit
def gradients(both, keys, is_seen, log_total, delta, log2_scale):
    """Weights of keys [n, k] and gradients of their scores, both [h, n], of lines [2 h, k]."""
    products = tl.dot(both, tl.trans(keys), input_precision="ieee")  # [2 h, n]
    each: tl.constexpr = (products.shape[0] // 2, products.shape[1])
    products = tl.reshape(products, (products.shape[0] // 16, 2, 8, products.shape[1]))
    scores, moved = tl.split(tl.permute(products, (0, 2, 3, 1)))
    scores = tl.reshape(scores, each) * log2_scale - log_total[:, None]
    weights = tl.exp2(tl.where(is_seen[None, :], scores, float("-inf")))
    return weights, weights * (tl.reshape(moved, each) - delta[:, None])


@triton.jit
def shares_of_lines(grad_scores, weights):
    """What a line counts for, [2 h, n]: of a query, the gradient of its score; of its gradient, its weight."""
    shape: tl.constexpr = (weights.shape[0] // 8, 8, weights.shape[1], 2)
    shares = tl.permute(tl.reshape(tl.join(grad_scores, weights), shape), (0, 3, 1, 2))
    return tl.reshape(shares, (2 * weights.shape[0], weights.shape[1]))
