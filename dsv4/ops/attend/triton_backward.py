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
    """Lines and keys of a tile, warps of a program, and how many tiles are on their way."""

    lines: int
    keys: int
    warps: int
    stages: int


CONFIGS = {
    # In shared memory, of 227 KiB: 128 of lines and their gradients, two tiles of keys of 32 each, and what products
    # hand on. 64 lines x 512 channels of float32 sums are half the registers.
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
    blocks, num_picks = triton.cdiv(T * H, config.lines), seen.picked.shape[-1]

    def find(first: int, count: int, parts: torch.Tensor, first_query: int) -> None:
        _query_gradient[(count,)](
            *(q, kv, values, *seen.tensors(), log_total, out, grad_out, grad_q, delta, parts, first, first_query),
            *(distance(grad_out, q), T, kv.shape[1], values.shape[1], num_picks, window, scale, scale * LOG2_E),
            KIND=seen.kind,
            H=H,
            K=K,
            PARTS=num_parts,
            LINES=config.lines,
            BLOCK_K=max(16, triton.next_power_of_2(K)),
            BLOCK_N=config.keys,
            STAGES=config.stages,
            num_warps=config.warps,
        )

    num_parts = blocks_of_a_query(H, config.lines)
    if seen.kind != "picked":
        find(0, B * blocks, parts=q, first_query=0)  # parts are not written
        return grad_q, delta, grad_values
    at_once = config.lines // math.gcd(H, config.lines)  # queries that are whole blocks
    held = max(1, PARTS_HELD // (num_picks * num_parts * K * at_once)) * at_once
    for row in range(B):
        for first in range(0, T, held):
            count = min(held, T - first)
            # A query that lies in fewer blocks than others leaves fewer parts.
            parts = q.new_zeros if H % config.lines and config.lines % H else q.new_empty
            parts = parts(count, num_picks, num_parts, K)
            first_block = row * blocks + first * H // config.lines
            find(first_block, triton.cdiv(count * H, config.lines), parts, row * T + first)
            add_picked_(grad_values[row], parts, seen.picked[row, first : first + held])
    return grad_q, delta, grad_values


def blocks_of_a_query(H: int, lines: int) -> int:
    """In how many blocks of lines a query of H heads can lie."""
    if H % lines == 0 or lines % H == 0:
        return max(1, H // lines)
    return triton.cdiv(H - 1, lines) + 1


@triton.jit(do_not_specialize=["first_block", "first_query"])
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
    first_block,
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
    PARTS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of lines, along the loops of forward; past 60 lines like them.

    The condition always holds: as in forward, it lets the next tile arrive beside the products.
    """
    row, line, t, is_line, first_t, last_t = lines_of(first_block + tl.program_id(0), T, H, LINES)
    place = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_K)[None, :]
    is_channel = channel < K
    of_lines = row * T * H + line
    at = of_lines[:, None] * K + channel
    is_q = is_line[:, None] & is_channel
    log_total = tl.load(log_total_ptr + of_lines, mask=is_line, other=0.0)
    delta = tl.load(out_ptr + at, mask=is_q, other=0.0).to(tl.float32)
    delta = tl.sum(delta * tl.load(grad_ptr + at, mask=is_q, other=0.0).to(tl.float32), axis=1)  # [m]
    tl.store(delta_ptr + of_lines, delta, mask=is_line)

    own_line, is_grad = pairs(LINES)
    own_line += tl.min(line, axis=0)
    both_at = q_ptr + (row * T * H + own_line)[:, None] * K + is_grad[:, None] * distance + channel
    both = tl.load(both_at, mask=(own_line < T * H)[:, None] & is_channel, other=0.0)  # [2 m, k]
    sums = tl.zeros((LINES, BLOCK_K), dtype=tl.float32)

    first, last, start_at, stop = spans(
        "raw", raw_begin_ptr, raw_begin_ptr, row, t, is_line, first_t, last_t, T, S, window, H, LINES, BLOCK_N
    )
    for start in tl.range(start_at, stop, BLOCK_N, num_stages=STAGES):
        raw = start + place
        keys_at = kv_ptr + (row * S + raw)[:, None] * K + channel
        keys = tl.load(keys_at, mask=(raw < stop)[:, None] & is_channel, other=0.0)  # [n, k]
        if T > 0:
            _, grad_scores = gradients(both, keys, unseen(raw, first, last), log_total, delta, log2_scale)
            sums = tl.dot(grad_scores.to(keys.dtype), keys, sums, input_precision="ieee")
    if KIND == "interval":
        first, last, start_at, stop = spans(
            "interval", begin_ptr, end_ptr, row, t, is_line, first_t, last_t, T, C, window, H, LINES, BLOCK_N
        )
        for start in tl.range(start_at, stop, BLOCK_N, num_stages=STAGES):
            entry = start + place
            keys_at = values_ptr + (row * C + entry)[:, None] * K + channel
            keys = tl.load(keys_at, mask=(entry < stop)[:, None] & is_channel, other=0.0)
            if T > 0:
                _, grad_scores = gradients(both, keys, unseen(entry, first, last), log_total, delta, log2_scale)
                sums = tl.dot(grad_scores.to(keys.dtype), keys, sums, input_precision="ieee")
    if KIND == "picked":
        tiles = tl.cdiv(P, BLOCK_N)
        for step in tl.range(0, (last_t - first_t + 1) * tiles, num_stages=STAGES):
            pick = step % tiles * BLOCK_N + place
            query = first_t + step // tiles
            entry = tl.load(picked_ptr + (row * T + query) * P + pick, mask=pick < P, other=-1)
            keys_at = values_ptr + (row * C + entry)[:, None] * K + channel
            keys = tl.load(keys_at, mask=(entry >= 0)[:, None] & is_channel, other=0.0)
            if T > 0:
                is_unseen = (entry < 0)[None, :]
                if H % LINES != 0:
                    is_unseen = is_unseen | (t != query)[:, None]
                weights, grad_scores = gradients(both, keys, is_unseen, log_total, delta, log2_scale)
                sums = tl.dot(grad_scores.to(keys.dtype), keys, sums, input_precision="ieee")
                shares = shares_of_pairs(grad_scores * scale, weights).to(keys.dtype)
                part = tl.trans(tl.dot(tl.trans(both), shares, input_precision="ieee"))  # [n, k]
                number = tl.min(line, axis=0) // LINES - query * H // LINES  # of this block among those of the query
                part_at = (((row * T + query - first_query) * P + pick) * PARTS + number) * K
                is_part = (pick < P)[:, None] & is_channel
                tl.store(parts_ptr + part_at[:, None] + channel, part.to(parts_ptr.dtype.element_ty), mask=is_part)
    tl.store(grad_q_ptr + at, (sums * scale).to(grad_q_ptr.dtype.element_ty), mask=is_q)


# What kernels share


@triton.jit
def lines_of(program, T, H: tl.constexpr, LINES: tl.constexpr):
    """The row of a program's block, its lines [m] in the row, the queries t of lines, which of them are there, and the
    first query and the last."""
    blocks = tl.cdiv(T * H, LINES)
    row = (program // blocks).to(tl.int64)
    first = program % blocks * LINES
    line = first + tl.arange(0, LINES)
    t = line // H
    return row, line, t, t < T, first // H, tl.minimum((first + LINES - 1) // H, T - 1)


@triton.jit
def spans(
    KIND: tl.constexpr, begin_ptr, end_ptr, row, t, is_line, first_t, last_t, T, size, window,
    H: tl.constexpr, LINES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of ``raw`` tokens or an ``interval`` of entries, so many: what lines see, first <= key < last, and all of the
    block. Of several queries, first and last are [m, 1], and where tiles begin is a multiple of them."""
    if H % LINES == 0:
        first, last = seen_by(KIND, begin_ptr, end_ptr, row * T + first_t, True, T, first_t, size, window)
        return first, last, first, last
    else:
        first, last = seen_by(KIND, begin_ptr, end_ptr, row * T + t, is_line, T, t, size, window)
        least = tl.min(tl.where(is_line, first, size), axis=0)
        most = tl.max(tl.where(is_line, last, 0), axis=0)
        return first[:, None], last[:, None], least // BLOCK_N * BLOCK_N, most


@triton.jit
def seen_by(KIND: tl.constexpr, begin_ptr, end_ptr, query, is_query, T, t, size, window):
    """The keys that queries see: first <= key < last, one or [m]."""
    first = tl.load(begin_ptr + query, mask=is_query, other=0)
    if KIND == "raw":
        last = size - T + t + 1
        first = tl.maximum(first, last - window)
    else:
        last = tl.minimum(tl.load(end_ptr + query, mask=is_query, other=0), size)
    return tl.maximum(first, 0).to(tl.int32), last.to(tl.int32)


@triton.jit
def unseen(key, first, last):
    """Which keys [n] lines do not see, [m, n] or, of one query, [1, n]."""
    return (key[None, :] < first) | (key[None, :] >= last)


@triton.jit
def pairs(LINES: tl.constexpr):
    """The lines of a tile of lines and their gradients, [2 m] each, and 1 where one is a gradient.

    Eight of each in turn: in a product, the two of a line then are in the registers of one thread.
    """
    both = tl.arange(0, 2 * LINES)
    return both // 16 * 8 + both % 8, (both // 8 % 2).to(tl.int64)


@triton.jit
def gradients(both, keys, is_unseen, log_total, delta, log2_scale):
    """Weights of keys [n, k] and gradients of their scores, both [m, n], of lines and their gradients [2 m, k]."""
    products = tl.dot(both, tl.trans(keys), input_precision="ieee")  # [2 m, n]
    each: tl.constexpr = (products.shape[0] // 2, products.shape[1])
    products = tl.reshape(products, (products.shape[0] // 16, 2, 8, products.shape[1]))
    scores, moved = tl.split(tl.permute(products, (0, 2, 3, 1)))
    scores = tl.reshape(scores, each) * log2_scale - log_total[:, None]
    weights = tl.exp2(tl.where(is_unseen, float("-inf"), scores))
    return weights, weights * (tl.reshape(moved, each) - delta[:, None])


@triton.jit
def shares_of_pairs(grad_scores, weights):
    """What ``pairs`` count for, [2 m, n]: a line, the gradient of its score; its gradient, its weight."""
    shape: tl.constexpr = (weights.shape[0] // 8, 8, weights.shape[1], 2)
    shares = tl.permute(tl.reshape(tl.join(grad_scores, weights), shape), (0, 3, 1, 2))
    return tl.reshape(shares, (2 * weights.shape[0], weights.shape[1]))
