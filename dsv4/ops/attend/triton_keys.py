"""Gradients of keys, raw tokens and entries of an interval, as Triton kernels without atomics.

Keys go by blocks, whose program loops over the queries that may see them, in their order. Raw tokens are seen by a
window's worth of queries, and are done. Entries of an interval may be seen by all queries of the row: a program takes
``QUERIES`` of them, and what the programs found is added in the order of the queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4.ops.attend.triton_backward import (
    LOG2_E,
    Config,
    Seen,
    distance,
    gradients,
    pairs,
    seen_by,
    shares_of_pairs,
    unseen,
)

QUERIES = 64  # whose gradients of an interval's entries are one part
PARTS_HELD = 1 << 28  # elements of parts in memory at a time, float32
CONFIGS = {
    # In shared memory, of 227 KiB: 64 of keys, and two tiles of 64 of 32 lines and their gradients.
    "wide": Config(32, 64, 8, 2),
    "flat": Config(64, 64, 8, 1),
    "float32": Config(16, 16, 4, 1),
}
NARROW = "wide"  # the one for 16-bit dtypes


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
    grad_values: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of kv, [B, S, K]; adds that of an interval's values to grad_values, [B, C, K] float32.

    The others are as in ``query_gradient``, and what it returns.
    """
    if not q.numel():
        return torch.zeros_like(kv)
    (B, T, _, K), num_entries = q.shape, values.shape[1]
    find = _Finder(q, kv, values, seen, window, scale, log_total, delta, grad_out)
    grad_kv = torch.empty_like(kv)
    find("raw", kv, grad_kv, num_keys=kv.shape[1], num_groups=1)
    if seen.kind == "interval":
        num_parts = triton.cdiv(T, QUERIES)
        held = max(1, PARTS_HELD // (B * num_entries * K))
        for first in range(0, num_parts, held):
            parts = grad_values.new_empty(B, min(held, num_parts - first), num_entries, K)
            find("interval", values, parts, num_entries, num_groups=parts.shape[1], first=first)
            block, size = 1024, num_entries * K
            _add_parts[(triton.cdiv(size, block), B)](parts, grad_values, parts.shape[1], size, BLOCK=block)
    return grad_kv


class _Finder:
    """Launches ``_key_gradient`` over the inputs that its uses share."""

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
        self.q, self.tensors = q, (seen.raw_begin, seen.begin, seen.end, log_total, delta)
        self.distance = distance(grad_out, q)
        self.grad_out = grad_out  # held, since kernels find it by its distance alone
        self.numbers = (kv.shape[1], values.shape[1], window, scale, scale * LOG2_E)
        self.config = CONFIGS["float32" if q.dtype == torch.float32 else NARROW]

    def __call__(
        self, kind: str, keys: torch.Tensor, grads: torch.Tensor, num_keys: int, num_groups: int, first: int = 0
    ) -> None:
        """Write the gradients of blocks of so many keys to grads, by groups of queries from ``first`` on."""
        B, T, H, K = self.q.shape
        config = self.config
        if not num_keys:
            return
        # The first dimension of a grid is the only one that may pass 65,535.
        _key_gradient[(num_groups * triton.cdiv(num_keys, config.keys), B)](
            *(self.q, keys, *self.tensors, grads, self.distance, T, *self.numbers, first),
            KIND=kind,
            H=H,
            K=K,
            QUERIES=QUERIES,
            LINES=config.lines,
            BLOCK_K=max(16, triton.next_power_of_2(K)),
            BLOCK_N=config.keys,
            STAGES=config.stages,
            num_warps=config.warps,
        )


@triton.jit
def _key_gradient(
    q_ptr,
    keys_ptr,
    raw_begin_ptr,
    begin_ptr,
    end_ptr,
    log_total_ptr,
    delta_ptr,
    grads_ptr,
    distance,
    T,
    S,
    C,
    window,
    scale,
    log2_scale,
    first_group,
    KIND: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    QUERIES: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of keys and the queries first <= t < last; past 60 lines, to have both kinds side by side.

    Both conditions on sizes always hold, and are there for the compiler as those of forward.
    """
    num_keys = S if KIND == "raw" else C
    num_blocks = tl.cdiv(num_keys, BLOCK_N)
    group = (tl.program_id(0) // num_blocks).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_K)[None, :]
    is_channel = channel < K
    key = (tl.program_id(0) % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [n]
    is_key = key < num_keys
    if KIND == "raw":
        # The first query whose own token is in the block, to the last whose window still reaches it.
        first_t = tl.maximum(tl.min(key, axis=0) - (S - T), 0).to(tl.int32)
        last_t = tl.minimum(tl.max(key, axis=0) + window - (S - T), T).to(tl.int32)
        target = row * S + key
    else:
        t = ((first_group + group) * QUERIES).to(tl.int32) + tl.arange(0, QUERIES)
        begin = tl.load(begin_ptr + row * T + t, mask=t < T, other=0)
        end = tl.load(end_ptr + row * T + t, mask=t < T, other=0)
        is_reader = (begin <= tl.max(key, axis=0)) & (end > tl.min(key, axis=0)) & (t < T)
        first_t = tl.min(tl.where(is_reader, t, T), axis=0)
        last_t = tl.max(tl.where(is_reader, t + 1, 0), axis=0)
        target = (row * (tl.num_programs(0) // num_blocks) + group) * C + key
    keys_at = keys_ptr + (row * num_keys + key)[:, None] * K + channel
    keys = tl.load(keys_at, mask=is_key[:, None] & is_channel, other=0.0)  # [n, k]
    sums = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    own_line, is_grad = pairs(LINES)
    from_ptr = raw_begin_ptr if KIND == "raw" else begin_ptr
    for step in tl.range(first_t * H // LINES, tl.cdiv(last_t * H, LINES), num_stages=STAGES):
        both_line = step * LINES + own_line
        both_at = q_ptr + (row * T * H + both_line)[:, None] * K + is_grad[:, None] * distance + channel
        both = tl.load(both_at, mask=(both_line < T * H)[:, None] & is_channel, other=0.0)  # [2 m, k]
        if T > 0:
            line = step * LINES + tl.arange(0, LINES)
            is_line = line < T * H
            log_total = tl.load(log_total_ptr + row * T * H + line, mask=is_line, other=0.0)
            delta = tl.load(delta_ptr + row * T * H + line, mask=is_line, other=0.0)
            if H % LINES == 0:
                own_t = step * LINES // H
                seen_from, seen_to = seen_by(KIND, from_ptr, end_ptr, row * T + own_t, True, T, own_t, num_keys, window)
                is_unseen = unseen(key, seen_from, seen_to)
            else:
                own_t = line // H
                seen_from, seen_to = seen_by(
                    KIND, from_ptr, end_ptr, row * T + own_t, is_line, T, own_t, num_keys, window
                )
                is_other = (own_t < first_t) | (own_t >= last_t)
                is_unseen = unseen(key, seen_from[:, None], seen_to[:, None]) | is_other[:, None]
            shares = tl.zeros((2 * LINES, BLOCK_N), dtype=keys.dtype)
            if S > 0:
                weights, grad_scores = gradients(both, keys, is_unseen, log_total, delta, log2_scale)
                shares = shares_of_pairs(grad_scores * scale, weights).to(keys.dtype)
            sums = tl.dot(tl.trans(both), shares, sums, input_precision="ieee")  # [k, n]
    grads_at = grads_ptr + target[:, None] * K + channel
    tl.store(grads_at, tl.trans(sums).to(grads_ptr.dtype.element_ty), mask=is_key[:, None] & is_channel)


@triton.jit
def _add_parts(parts_ptr, grad_ptr, num_parts, size, BLOCK: tl.constexpr):
    """grad[b] += parts[b, i], one i after the other: parts [B, n, size], grad [B, size]."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(grad_ptr + row * size + at, mask=at < size, other=0.0)
    for part in range(num_parts):
        total += tl.load(parts_ptr + (row * num_parts + part) * size + at, mask=at < size, other=0.0)
    tl.store(grad_ptr + row * size + at, total, mask=at < size)
