"""Gradients of attention as Triton kernels: of queries, and what gradients of queries and of keys share.

With s = scale q . x, p = exp(s - log-sum-exp) and delta = out . grad, of a query, a head and a key x:

    ds = p (grad . x - delta),    grad q = scale sum_x ds x,    grad x = sum over queries and heads: scale ds q + p grad

Queries go as in forward, one by one; keys go the other way round, in ``triton_keys.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)


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
    # Of queries as of keys: sums, 512 x 32, are in registers, and two programs of four warps share a processor. With
    # eight warps and 64 lines each four of them would form the same products.
    "wide": Config(32, 32, 4, 1),
    "flat": Config(64, 64, 8, 1),
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of q, [B, T, H, K], and delta, [B, T, H] float32.

    log_total: [B, T, H] float32, base 2; out and grad_out: like q. All are contiguous.
    """
    B, T, H, K = q.shape
    grad_q, delta = torch.empty_like(q), torch.empty_like(log_total)
    if not q.numel():
        return grad_q, delta
    config = CONFIGS["float32" if q.dtype == torch.float32 else NARROW]
    block_heads = min(config.heads, max(16, triton.next_power_of_2(H)))
    _query_gradient[(B * T, triton.cdiv(H, block_heads))](
        *(q, kv, values, *seen.tensors(), log_total, out, grad_out, grad_q, delta),
        *(distance(grad_out, q), T, kv.shape[1], values.shape[1], seen.picked.shape[-1], window, scale, scale * LOG2_E),
        KIND=seen.kind,
        H=H,
        K=K,
        BLOCK_H=block_heads,
        BLOCK_K=max(16, triton.next_power_of_2(triton.cdiv(K, 2))),
        BLOCK_N=config.keys,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return grad_q, delta


@triton.jit
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
):
    """One query and a block of heads, along the loops of forward; past 60 lines like them.

    Channels go in two halves: a tile of all of them passes through more registers than there are.
    """
    query = tl.program_id(0).to(tl.int64)
    row, t = query // T, query % T
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    place = tl.arange(0, BLOCK_N)
    low = tl.arange(0, BLOCK_K)[None, :]
    high = low + BLOCK_K
    at = (query * H + head)[:, None] * K
    is_q = (head < H)[:, None]
    log_total = tl.load(log_total_ptr + query * H + head, mask=head < H, other=0.0)
    delta = _dot_of_lines(out_ptr + at, grad_ptr + at, low, is_q & (low < K))
    delta += _dot_of_lines(out_ptr + at, grad_ptr + at, high, is_q & (high < K))  # [h]
    tl.store(delta_ptr + query * H + head, delta, mask=head < H)

    line = tl.arange(0, 2 * BLOCK_H)  # of a query and of its gradient, in turn
    head_of_line = tl.program_id(1) * BLOCK_H + line // 2
    line_at = q_ptr + (query * H + head_of_line)[:, None] * K + (line % 2)[:, None].to(tl.int64) * distance
    is_line = (head_of_line < H)[:, None]
    both_low = tl.load(line_at + low, mask=is_line & (low < K), other=0.0)  # [2 h, k / 2]
    both_high = tl.load(line_at + high, mask=is_line & (high < K), other=0.0)
    sum_low = tl.zeros((BLOCK_K, BLOCK_H), dtype=tl.float32)
    sum_high = tl.zeros((BLOCK_K, BLOCK_H), dtype=tl.float32)

    own = S - T + t
    first = tl.maximum(tl.maximum(tl.load(raw_begin_ptr + query), own - window + 1), 0)
    for start in range(first, own + 1, BLOCK_N):
        raw = start + place
        is_seen = raw <= own
        keys_at = kv_ptr + (row * S + raw)[:, None] * K
        keys_low = tl.load(keys_at + low, mask=is_seen[:, None] & (low < K), other=0.0)  # [n, k / 2]
        keys_high = tl.load(keys_at + high, mask=is_seen[:, None] & (high < K), other=0.0)
        _, grad_scores = gradients(both_low, both_high, keys_low, keys_high, is_seen, log_total, delta, log2_scale)
        shares = tl.trans(grad_scores).to(keys_low.dtype)  # [n, h]
        sum_low = tl.dot(tl.trans(keys_low), shares, sum_low, input_precision="ieee")  # [k / 2, h]
        sum_high = tl.dot(tl.trans(keys_high), shares, sum_high, input_precision="ieee")
    if KIND != "none":
        if KIND == "interval":
            first_entry = tl.maximum(tl.load(begin_ptr + query), 0)
            end = tl.minimum(tl.load(end_ptr + query), C)
        else:
            first_entry = 0
            end = P
        for start in range(first_entry, end, BLOCK_N):
            entry = start + place
            is_seen = entry < end
            if KIND == "picked":
                entry = tl.load(picked_ptr + query * P + entry, mask=is_seen, other=-1)
                is_seen = entry >= 0
            keys_at = values_ptr + (row * C + entry)[:, None] * K
            keys_low = tl.load(keys_at + low, mask=is_seen[:, None] & (low < K), other=0.0)
            keys_high = tl.load(keys_at + high, mask=is_seen[:, None] & (high < K), other=0.0)
            _, grad_scores = gradients(both_low, both_high, keys_low, keys_high, is_seen, log_total, delta, log2_scale)
            shares = tl.trans(grad_scores).to(keys_low.dtype)  # [n, h]
            sum_low = tl.dot(tl.trans(keys_low), shares, sum_low, input_precision="ieee")  # [k / 2, h]
            sum_high = tl.dot(tl.trans(keys_high), shares, sum_high, input_precision="ieee")
    dtype = grad_q_ptr.dtype.element_ty
    tl.store(grad_q_ptr + at + low, (tl.trans(sum_low) * scale).to(dtype), mask=is_q & (low < K))
    tl.store(grad_q_ptr + at + high, (tl.trans(sum_high) * scale).to(dtype), mask=is_q & (high < K))


@triton.jit
def _dot_of_lines(a_ptr, b_ptr, channel, is_in):
    """Sums over channels of a b, [h], of pointers to the beginnings of lines [h, 1]."""
    a = tl.load(a_ptr + channel, mask=is_in, other=0.0).to(tl.float32)
    return tl.sum(a * tl.load(b_ptr + channel, mask=is_in, other=0.0).to(tl.float32), axis=1)


@triton.jit
def gradients(both_low, both_high, keys_low, keys_high, is_seen, log_total, delta, log2_scale):
    """Weights of keys [n, k] and gradients of their scores, both [h, n], of lines [2 h, k]: queries and gradients."""
    products = tl.dot(both_low, tl.trans(keys_low), input_precision="ieee")
    products = tl.dot(both_high, tl.trans(keys_high), products, input_precision="ieee")  # [2 h, n]
    products = tl.reshape(products, (products.shape[0] // 2, 2, products.shape[1]))
    scores, moved = tl.split(tl.permute(products, (0, 2, 1)))
    weights = tl.exp2(tl.where(is_seen[None, :], scores * log2_scale - log_total[:, None], float("-inf")))
    return weights, weights * (moved - delta[:, None])
