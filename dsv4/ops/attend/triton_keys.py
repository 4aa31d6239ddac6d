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

from dsv4.ops.attend.triton_backward import CONFIGS, LOG2_E, NARROW, Seen, distance, gradients

QUERIES = 64  # whose gradients of an interval's entries are one part
PARTS_HELD = 1 << 28  # elements of parts in memory at a time, float32


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
        for row in range(B):
            for first in range(0, T, held):
                parts = grad_values.new_empty(min(held, T - first), num_picks, K)
                find("picked", values, parts, num_picks, num_groups=parts.shape[0], first=row * T + first)
                add_picked_(grad_values[row], parts, seen.picked[row, first : first + held])
    return grad_kv, grad_values.to(values.dtype)


def add_picked_(grad: torch.Tensor, parts: torch.Tensor, picked: torch.Tensor) -> None:
    """Add the gradient of each pick, in their order, to that of its entry; overwrites grad.

    grad: [C, K] float32; parts: [t, P, K] float32; picked: [t, P] int64, -1 for none. All are contiguous.
    """
    num_entries, K = grad.shape
    by_entry, order = picked.flatten().sort(stable=True)
    starts = torch.searchsorted(by_entry, torch.arange(num_entries + 1, device=grad.device))
    block = min(128, triton.next_power_of_2(K))
    grid = num_entries, triton.cdiv(K, block)
    _add_picked[grid](parts, order, starts, grad, K=K, BLOCK_K=block, BLOCK_N=16)


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
        self.q, self.grad_out, self.tensors = q, grad_out, (*seen.tensors(), log_total, delta)
        self.distance = distance(grad_out, q)
        self.numbers = (kv.shape[1], values.shape[1], seen.picked.shape[-1], window, scale, scale * LOG2_E)
        self.config = CONFIGS["float32" if q.dtype == torch.float32 else NARROW]

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
            *(self.q, keys, *self.tensors, grads, self.distance, T, *self.numbers, first),
            KIND=kind,
            H=H,
            K=K,
            QUERIES=QUERIES,
            BLOCK_H=min(config.heads, max(16, triton.next_power_of_2(H))),
            BLOCK_K=max(16, triton.next_power_of_2(triton.cdiv(K, 2))),
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
    grads_ptr,
    distance,
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
    # Channels go in two halves: a tile of all of them passes through more registers than there are.
    low = tl.arange(0, BLOCK_K)[None, :]
    high = low + BLOCK_K
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
    keys_at = keys_ptr + source[:, None] * K
    keys_low = tl.load(keys_at + low, mask=is_key[:, None] & (low < K), other=0.0)  # [n, k / 2]
    keys_high = tl.load(keys_at + high, mask=is_key[:, None] & (high < K), other=0.0)

    sum_low = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    sum_high = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    line = tl.arange(0, 2 * BLOCK_H)  # of a query and of its gradient, in turn
    is_grad = (line % 2)[:, None].to(tl.int64)
    head_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    for step in range(first * head_blocks, last * head_blocks):  # one loop over queries and heads: it is pipelined
        query = row * T + step // head_blocks
        head = (step % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        head_of_line = (step % head_blocks) * BLOCK_H + line // 2
        both_at = q_ptr + (query * H + head_of_line)[:, None] * K + is_grad * distance
        is_line = (head_of_line < H)[:, None]
        both_low = tl.load(both_at + low, mask=is_line & (low < K), other=0.0)  # [2 h, k / 2]
        both_high = tl.load(both_at + high, mask=is_line & (high < K), other=0.0)
        log_total = tl.load(log_total_ptr + query * H + head, mask=head < H, other=0.0)
        delta = tl.load(delta_ptr + query * H + head, mask=head < H, other=0.0)
        if KIND == "raw":
            own = S - T + step // head_blocks
            is_seen = (key <= own) & (key > own - window) & (key >= tl.load(raw_begin_ptr + query)) & is_key
        elif KIND == "interval":
            is_seen = (key >= tl.load(begin_ptr + query)) & (key < tl.load(end_ptr + query)) & is_key
        else:
            is_seen = is_key
        weights, grad_scores = gradients(
            both_low, both_high, keys_low, keys_high, is_seen, log_total, delta, log2_scale
        )
        # What a line counts for: of a query, the gradient of its score; of its gradient, its weight.
        shares = tl.reshape(tl.permute(tl.join(grad_scores * scale, weights), (0, 2, 1)), (2 * BLOCK_H, BLOCK_N))
        shares = shares.to(keys_low.dtype)
        sum_low = tl.dot(tl.trans(both_low), shares, sum_low, input_precision="ieee")  # [k / 2, n]
        sum_high = tl.dot(tl.trans(both_high), shares, sum_high, input_precision="ieee")
    is_stored = (key < num_keys)[:, None]
    grads_at = grads_ptr + target[:, None] * K
    dtype = grads_ptr.dtype.element_ty
    tl.store(grads_at + low, tl.trans(sum_low).to(dtype), mask=is_stored & (low < K))
    tl.store(grads_at + high, tl.trans(sum_high).to(dtype), mask=is_stored & (high < K))


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
