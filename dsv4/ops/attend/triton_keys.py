"""Gradients of keys, raw tokens and entries, as Triton kernels without atomics: every sum runs in a fixed order.

Keys go by blocks, whose program loops over the queries that may see them. Raw tokens are seen by a window's worth of
queries, and are done. Entries of an interval may be seen by all queries of the row: a program takes ``QUERIES`` of
them, and what the programs found is added in the order of the queries. A picked entry is seen by queries here and
there, one key a query: reading a query's 2 H K numbers for each of its keys would be limited by memory. So a program
takes a query and a block of its picks, which is a product of tiles again, and what it found for each pick is added
entry by entry, along a list of the picks sorted by entry. That is done for so many queries of a row at a time, a
number that depends on P and K alone, that it fits in PARTS_HELD.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4.ops.attend.triton_backward import LOG2_E, NARROW, Config, Seen

QUERIES = 64  # whose gradients of an interval's entries are one part
PARTS_HELD = 1 << 28  # elements of parts in memory at a time, float32
KEY_CONFIGS = {
    # The keys' sums, 64 x 512, are in registers; heads are what the products sum over, so that 32 do.
    "wide": Config(32, 64, 8, 2),
    "flat": Config(64, 64, 8, 1),
    "float32": Config(16, 16, 4, 1),
}


def key_gradients(
    q: torch.Tensor,
    kv: torch.Tensor,
    values: torch.Tensor,
    seen: Seen,
    window: int,
    scale: float,
    log_total: torch.Tensor,
    delta: torch.Tensor,
    grad_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of kv, [B, S, K], and of values, [B, C, K]. What is given is as in ``query_gradient``."""
    B, T, _, K = q.shape
    if not q.numel():
        return torch.zeros_like(kv), torch.zeros_like(values)
    find = _Finder(q, kv, values, seen, window, scale, log_total, delta, grad_out)
    grad_kv = torch.empty_like(kv)
    find("raw", kv, grad_kv, num_keys=kv.shape[1], num_groups=1)
    grad_values = torch.zeros_like(values, dtype=torch.float32)
    num_entries, num_picks = values.shape[1], seen.picked.shape[-1]
    if seen.kind == "interval":
        num_parts = triton.cdiv(T, QUERIES)
        held = max(1, PARTS_HELD // (B * num_entries * K))
        for first in range(0, num_parts, held):
            parts = grad_values.new_empty(B, min(held, num_parts - first), num_entries, K)
            find("interval", values, parts, num_entries, num_groups=parts.shape[1], first=first)
            block, size = 1024, num_entries * K
            _add_parts[(triton.cdiv(size, block), B)](parts, grad_values, parts.shape[1], size, BLOCK=block)
    elif seen.kind == "picked":
        held = max(1, PARTS_HELD // (num_picks * K))
        bounds = torch.arange(num_entries + 1, device=q.device)
        block = min(128, triton.next_power_of_2(K))
        for row in range(B):
            for first in range(0, T, held):
                parts = grad_values.new_empty(min(held, T - first), num_picks, K)
                find("picked", values, parts, num_picks, num_groups=parts.shape[0], first=row * T + first)
                picks = seen.picked[row, first : first + held].flatten()
                by_entry, order = picks.sort(stable=True)
                starts = torch.searchsorted(by_entry, bounds)
                _add_picked[(num_entries, triton.cdiv(K, block))](
                    parts, order, starts, grad_values[row], K=K, BLOCK_K=block, BLOCK_N=16
                )
    return grad_kv, grad_values.to(values.dtype)


class _Finder:
    """Launches ``_key_gradient`` over the inputs that all its uses share."""

    def __init__(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        values: torch.Tensor,
        seen: Seen,
        window: int,
        scale: float,
        log_total: torch.Tensor,
        delta: torch.Tensor,
        grad_out: torch.Tensor,
    ) -> None:
        self.q, self.tensors = q, (*seen.tensors(), log_total, delta, grad_out)
        self.numbers = (kv.shape[1], values.shape[1], seen.picked.shape[-1], window, scale, scale * LOG2_E)
        self.config = KEY_CONFIGS["float32" if q.dtype == torch.float32 else NARROW]

    def __call__(
        self, kind: str, keys: torch.Tensor, grads: torch.Tensor, num_keys: int, num_groups: int, first: int = 0
    ) -> None:
        """Write the gradients of blocks of so many keys to grads, by groups of queries from ``first`` on."""
        B, T, H, K = self.q.shape
        config, num_rows = self.config, 1 if kind == "picked" else B
        if not num_keys:
            return
        # The first dimension of a grid is the only one that may pass 65,535.
        _key_gradient[(num_groups * triton.cdiv(num_keys, config.keys), num_rows)](
            *(self.q, keys, *self.tensors, grads, T, *self.numbers, first),
            KIND=kind,
            H=H,
            K=K,
            QUERIES=QUERIES,
            BLOCK_H=min(config.heads, max(16, triton.next_power_of_2(H))),
            BLOCK_K=max(16, triton.next_power_of_2(K)),
            BLOCK_N=config.keys,
            num_warps=config.warps,
            num_stages=config.stages,
        )


@triton.jit
def _key_gradient(
    q_ptr,
    keys_ptr,
    raw_begin_ptr,
    picked_ptr,
    begin_ptr,
    end_ptr,
    log_total_ptr,
    delta_ptr,
    grad_ptr,
    grads_ptr,
    T,
    S,
    C,
    P,
    window,
    scale,
    log2_scale,
    first_group,
    KIND: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of keys and the queries first <= t < last; past 60 lines, to have the three kinds side by side."""
    if KIND == "raw":
        num_keys = S
    elif KIND == "interval":
        num_keys = C
    else:
        num_keys = P
    num_blocks = tl.cdiv(num_keys, BLOCK_N)
    group = (tl.program_id(0) // num_blocks).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_K)
    is_channel = (channel < K)[None, :]
    # [n]; picked: places in the list of a query
    key = (tl.program_id(0) % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    if KIND == "raw":
        is_key = key < S
        source = row * S + key
        # The first query whose own token is in the block, to the last whose window still reaches it.
        first = tl.maximum(tl.min(key, axis=0) - (S - T), 0)
        last = tl.minimum(tl.max(key, axis=0) + window - (S - T), T)
        target = row * S + key
    elif KIND == "interval":
        is_key = key < C
        source = row * C + key
        t = (first_group + group) * QUERIES + tl.arange(0, QUERIES)
        begin = tl.load(begin_ptr + row * T + t, mask=t < T, other=0)
        end = tl.load(end_ptr + row * T + t, mask=t < T, other=0)
        is_reader = (begin <= tl.max(key, axis=0)) & (end > tl.min(key, axis=0)) & (t < T)
        first = tl.min(tl.where(is_reader, t, T), axis=0)
        last = tl.max(tl.where(is_reader, t + 1, 0), axis=0)
        target = (row * (tl.num_programs(0) // num_blocks) + group) * C + key
    else:
        query = first_group + group  # of all B * T
        row = query // T
        first = query % T
        last = first + 1
        entry = tl.load(picked_ptr + query * P + key, mask=key < P, other=-1)
        is_key = entry >= 0
        source = row * C + entry
        target = group * P + key
    keys_at = keys_ptr + source[:, None] * K + channel[None, :]
    keys = tl.load(keys_at, mask=is_key[:, None] & is_channel, other=0.0)  # [n, k]

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    head_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    for step in range(first * head_blocks, last * head_blocks):  # one loop over queries and heads: it is pipelined
        query = row * T + step // head_blocks
        head = (step % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        at = (query * H + head)[:, None] * K + channel[None, :]
        is_q = (head < H)[:, None] & is_channel
        q = tl.load(q_ptr + at, mask=is_q, other=0.0)  # [h, k]
        grad = tl.load(grad_ptr + at, mask=is_q, other=0.0)
        log_total = tl.load(log_total_ptr + query * H + head, mask=head < H, other=0.0)
        delta = tl.load(delta_ptr + query * H + head, mask=head < H, other=0.0)
        if KIND == "raw":
            own = S - T + step // head_blocks
            is_seen = (key <= own) & (key > own - window) & (key >= tl.load(raw_begin_ptr + query)) & is_key
        elif KIND == "interval":
            is_seen = (key >= tl.load(begin_ptr + query)) & (key < tl.load(end_ptr + query)) & is_key
        else:
            is_seen = is_key
        scores = tl.dot(keys, tl.trans(q), input_precision="ieee") * log2_scale  # [n, h]
        weights = tl.exp2(tl.where(is_seen[:, None], scores - log_total[None, :], float("-inf")))
        moved = tl.dot(keys, tl.trans(grad), input_precision="ieee")
        grad_scores = weights * (moved - delta[None, :]) * scale
        acc = tl.dot(grad_scores.to(q.dtype), q, acc, input_precision="ieee")
        acc = tl.dot(weights.to(q.dtype), grad, acc, input_precision="ieee")
    grads_at = grads_ptr + target[:, None] * K + channel[None, :]
    tl.store(grads_at, acc.to(grads_ptr.dtype.element_ty), mask=(key < num_keys)[:, None] & is_channel)


@triton.jit
def _add_parts(parts_ptr, grad_ptr, num_parts, size, BLOCK: tl.constexpr):
    """grad[b] += parts[b, i], one i after the other: parts [B, n, size], grad [B, size]."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(grad_ptr + row * size + at, mask=at < size, other=0.0)
    for part in range(num_parts):
        total += tl.load(parts_ptr + (row * num_parts + part) * size + at, mask=at < size, other=0.0)
    tl.store(grad_ptr + row * size + at, total, mask=at < size)


@triton.jit
def _add_picked(
    parts_ptr, order_ptr, starts_ptr, grad_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """grad[c] += parts[order[i]] for the picks i of entry c, from starts[c] to starts[c + 1]."""
    entry = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_channel = channel < K
    total = tl.load(grad_ptr + entry * K + channel, mask=is_channel, other=0.0)
    end = tl.load(starts_ptr + entry + 1)
    for start in range(tl.load(starts_ptr + entry), end, BLOCK_N):
        pick = start + tl.arange(0, BLOCK_N)
        place = tl.load(order_ptr + pick, mask=pick < end, other=0)
        parts_at = parts_ptr + place[:, None] * K + channel[None, :]
        total += tl.sum(tl.load(parts_at, mask=(pick < end)[:, None] & is_channel[None, :], other=0.0), axis=0)
    tl.store(grad_ptr + entry * K + channel, total, mask=is_channel)
