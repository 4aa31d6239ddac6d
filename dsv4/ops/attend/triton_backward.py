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


QUERY_CONFIGS = {
    # Queries and output gradients of 64 heads are 128 KiB of shared memory, so that 32 keys go at a time.
    "wide": Config(64, 32, 8, 2),
    "flat": Config(64, 64, 8, 1),
    "float32": Config(16, 16, 4, 1),
}
NARROW = "wide"  # the one for 16-bit dtypes, of both tables


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
    config = QUERY_CONFIGS["float32" if q.dtype == torch.float32 else NARROW]
    block_heads = min(config.heads, max(16, triton.next_power_of_2(H)))
    _query_gradient[(B * T, triton.cdiv(H, block_heads))](
        *(q, kv, values, *seen.tensors(), log_total, out, grad_out, grad_q, delta),
        *(T, kv.shape[1], values.shape[1], seen.picked.shape[-1], window, scale, scale * LOG2_E),
        KIND=seen.kind,
        H=H,
        K=K,
        BLOCK_H=block_heads,
        BLOCK_K=max(16, triton.next_power_of_2(K)),
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
    """One query and a block of heads, along the loops of forward; past 60 lines like them."""
    query = tl.program_id(0).to(tl.int64)
    row, t = query // T, query % T
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_K)
    place = tl.arange(0, BLOCK_N)
    is_channel = (channel < K)[None, :]
    is_q = (head < H)[:, None] & is_channel
    at = (query * H + head)[:, None] * K + channel[None, :]
    q = tl.load(q_ptr + at, mask=is_q, other=0.0)  # [h, k]
    grad = tl.load(grad_ptr + at, mask=is_q, other=0.0)
    out = tl.load(out_ptr + at, mask=is_q, other=0.0)
    log_total = tl.load(log_total_ptr + query * H + head, mask=head < H, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)  # [h]
    tl.store(delta_ptr + query * H + head, delta, mask=head < H)
    acc = tl.zeros((BLOCK_H, BLOCK_K), dtype=tl.float32)

    own = S - T + t
    first = tl.maximum(tl.maximum(tl.load(raw_begin_ptr + query), own - window + 1), 0)
    for start in range(first, own + 1, BLOCK_N):
        raw = start + place
        is_seen = raw <= own
        keys_at = kv_ptr + (row * S + raw)[:, None] * K + channel[None, :]
        keys = tl.load(keys_at, mask=is_seen[:, None] & is_channel, other=0.0)  # [n, k]
        acc = _add_query_gradient(q, grad, keys, is_seen, acc, log_total, delta, log2_scale)
    if KIND == "interval":
        first_entry = tl.maximum(tl.load(begin_ptr + query), 0)
        end = tl.minimum(tl.load(end_ptr + query), C)
        for start in range(first_entry, end, BLOCK_N):
            entry = start + place
            is_seen = entry < end
            keys_at = values_ptr + (row * C + entry)[:, None] * K + channel[None, :]
            keys = tl.load(keys_at, mask=is_seen[:, None] & is_channel, other=0.0)
            acc = _add_query_gradient(q, grad, keys, is_seen, acc, log_total, delta, log2_scale)
    if KIND == "picked":
        for start in range(0, P, BLOCK_N):
            pick = start + place
            entry = tl.load(picked_ptr + query * P + pick, mask=pick < P, other=-1)
            is_seen = entry >= 0
            keys_at = values_ptr + (row * C + entry)[:, None] * K + channel[None, :]
            keys = tl.load(keys_at, mask=is_seen[:, None] & is_channel, other=0.0)
            acc = _add_query_gradient(q, grad, keys, is_seen, acc, log_total, delta, log2_scale)
    tl.store(grad_q_ptr + at, (acc * scale).to(grad_q_ptr.dtype.element_ty), mask=is_q)


@triton.jit
def _add_query_gradient(q, grad, keys, is_seen, acc, log_total, delta, log2_scale):
    """Add ds x of a tile of keys [n, k] to acc [h, k]."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * log2_scale  # [h, n]
    weights = tl.exp2(tl.where(is_seen[None, :], scores - log_total[:, None], float("-inf")))
    moved = tl.dot(grad, tl.trans(keys), input_precision="ieee")
    grad_scores = weights * (moved - delta[:, None])
    return tl.dot(grad_scores.to(keys.dtype), keys, acc, input_precision="ieee")
