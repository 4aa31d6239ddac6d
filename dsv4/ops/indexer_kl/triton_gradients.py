"""Gradients of the indexer's queries, head weights and keys, from those of its scores; no atomics, sums in fixed order.

With g the gradient of the score of query t and entry c, and d the rounded product of a head's query and the key:

    grad weight[t, i] = sum_c g max(d, 0),    grad d = weight g where d > 0,    rounded to the dtype of q

and from grad d those of queries and keys. Queries go one by one. Keys of an interval may be seen by all queries of the
row: a program takes a block of keys and ``QUERIES`` of these, and what the programs found is added in the order of the
queries. Of picked ones a program takes a query and a block of its picks, and what it found is added entry by entry,
along a list of the picks sorted by entry, as the gradients of attention's entries are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from dsv4.ops.attend.triton_picked import add_picked_

if TYPE_CHECKING:
    from dsv4.ops.attend import Entries

QUERIES = 64  # whose gradients of an interval's keys are one part


class Config(NamedTuple):
    """Heads and entries of a tile, warps of a program, and how many tiles are on their way."""

    heads: int
    entries: int
    warps: int
    stages: int

    def block_heads(self, num_heads: int) -> int:
        """Heads of a tile where there are so many in all."""
        return min(self.heads, max(16, triton.next_power_of_2(num_heads)))


CONFIGS = {
    # Sums of 64 x 128 are 64 registers a thread; 16 KiB of queries or keys a tile.
    "narrow": Config(64, 64, 4, 2),
    "float32": Config(16, 16, 4, 1),
}


class Seen(NamedTuple):
    """Which entries queries see; tensors that ``kind`` leaves out are stand-ins, and not read.

    kind: ``interval`` or ``picked``; picked: [B, T, P]; begin, end: [B, T]; num_entries: of a row; columns: of a row of
    scores, as many as a query can see.
    """

    kind: str
    picked: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    num_entries: int
    columns: int

    @classmethod
    def of(cls, entries: Entries) -> Seen:
        """Complete what an ``Entries`` says."""
        num_entries = entries.values.shape[1]
        if entries.picked is not None:
            picked = entries.picked.contiguous()
            return cls("picked", picked, picked, picked, num_entries, picked.shape[2] if num_entries else 0)
        assert entries.begin is not None
        assert entries.end is not None
        begin, end = entries.begin.contiguous(), entries.end.contiguous()
        return cls("interval", begin, begin, end, num_entries, num_entries)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the order in which kernels take them."""
        return self.picked, self.begin, self.end


class Student:
    """The indexer's side, contiguous, and its gradients.

    q: [B, T, I, J]; k: [B, C, J]; weights: [B, T, I] float32. The gradients of k and weights are float32.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, seen: Seen, learns: bool) -> None:
        self.q, self.k, self.weights, self.seen, self.learns = q, k, weights, seen, learns
        if learns:  # zeros remain where nothing is seen
            self.grad_q, self.grad_weights = torch.zeros_like(q), torch.zeros_like(weights)
            self.grad_k = torch.zeros_like(k, dtype=torch.float32)

    def learn(self, grad_scores: torch.Tensor, now: tuple[int, int, int]) -> None:
        """Take in the gradients of the scores of some queries, [held, S], of a row from one on: so many."""
        (row, first, count), (_, T, I, J) = now, self.q.shape  # noqa: E741
        config = CONFIGS["float32" if self.q.dtype == torch.float32 else "narrow"]
        sizes = {
            "KIND": self.seen.kind, "I": I, "J": J, "BLOCK_I": config.block_heads(I),
            "BLOCK_J": max(16, triton.next_power_of_2(J)), "BLOCK_N": config.entries,
            "num_warps": config.warps, "num_stages": config.stages,
        }  # fmt: skip
        given = (self.q, self.k, self.weights, *self.seen.tensors(), grad_scores)
        numbers = T, self.seen.num_entries, self.seen.columns, row * T + first
        _query_gradient[(count, triton.cdiv(I, sizes["BLOCK_I"]))](
            *given, self.grad_q, self.grad_weights, *numbers, **sizes
        )
        groups = count if self.seen.kind == "picked" else triton.cdiv(count, QUERIES)
        parts = self.grad_k.new_empty(groups, self.seen.columns, J)
        blocks = triton.cdiv(self.seen.columns, config.entries)
        _key_gradient[(groups * blocks,)](*given, parts, *numbers, count, blocks, QUERIES=QUERIES, **sizes)
        if self.seen.kind == "picked":
            add_picked_(self.grad_k[row], parts[:, :, None], self.seen.picked[row, first : first + count])
        else:  # torch's own sum, in an order that the shape decides
            self.grad_k[row].add_(parts.sum(dim=0))


@triton.jit
def num_columns(begin_ptr, end_ptr, query, C, S, KIND: tl.constexpr):
    """How many columns of scores a query has: all of its picks, or an entry of its interval each."""
    if KIND == "picked":
        return tl.cast(S, tl.int64)  # a size of 1 comes as a constant
    else:
        first = tl.maximum(tl.load(begin_ptr + query), 0)
        return tl.maximum(tl.minimum(tl.load(end_ptr + query), C) - first, 0)


@triton.jit
def entries_in(picked_ptr, begin_ptr, query, column, last, S, KIND: tl.constexpr):
    """The entries in columns [N] of a query, and whether it sees them; ``last``: columns from here on have none."""
    if KIND == "picked":
        entry = tl.load(picked_ptr + query * S + column, mask=column < last, other=-1)
        return entry, entry >= 0
    else:
        return tl.maximum(tl.load(begin_ptr + query), 0) + column, column < last


@triton.jit(do_not_specialize=["queries_before"])
def _query_gradient(
    q_ptr, keys_ptr, weights_ptr, picked_ptr, begin_ptr, end_ptr, grad_scores_ptr, grad_q_ptr, grad_weights_ptr,
    T, C, S, queries_before,
    KIND: tl.constexpr, I: tl.constexpr, J: tl.constexpr,  # noqa: E741
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query and a block of heads."""
    place = tl.program_id(0).to(tl.int64)
    query = queries_before + place
    row = query // T
    head = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    channel = tl.arange(0, BLOCK_J)
    at = (query * I + head)[:, None] * J + channel[None, :]
    is_q = (head < I)[:, None] & (channel < J)[None, :]
    q = tl.load(q_ptr + at, mask=is_q, other=0.0)  # [i, j]
    weight = tl.load(weights_ptr + query * I + head, mask=head < I, other=0.0)
    acc = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.float32)
    grad_weight = tl.zeros([BLOCK_I], dtype=tl.float32)
    last = num_columns(begin_ptr, end_ptr, query, C, S, KIND)
    for start in range(0, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        entry, is_seen = entries_in(picked_ptr, begin_ptr, query, column, last, S, KIND)
        keys_at = (row * C + entry)[:, None] * J + channel[None, :]
        keys = tl.load(keys_ptr + keys_at, mask=is_seen[:, None] & (channel < J)[None, :], other=0.0)  # [n, j]
        grad = tl.load(grad_scores_ptr + place * S + column, mask=is_seen, other=0.0)
        dots = tl.dot(q, tl.trans(keys), input_precision="ieee").to(q.dtype).to(tl.float32)  # [i, n]
        grad_weight += tl.sum(tl.maximum(dots, 0.0) * grad[None, :], axis=1)
        grad_dots = tl.where(dots > 0, weight[:, None] * grad[None, :], 0.0)
        acc = tl.dot(grad_dots.to(q.dtype), keys, acc, input_precision="ieee")
    tl.store(grad_q_ptr + at, acc.to(grad_q_ptr.dtype.element_ty), mask=is_q)
    tl.store(grad_weights_ptr + query * I + head, grad_weight, mask=head < I)


@triton.jit(do_not_specialize=["queries_before", "count"])
def _key_gradient(
    q_ptr, keys_ptr, weights_ptr, picked_ptr, begin_ptr, end_ptr, grad_scores_ptr, parts_ptr,
    T, C, S, queries_before, count, num_blocks,
    KIND: tl.constexpr, I: tl.constexpr, J: tl.constexpr, QUERIES: tl.constexpr,  # noqa: E741
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of keys and the queries of one part that see some of them; the part of picks is one query."""
    group = (tl.program_id(0) // num_blocks).to(tl.int64)
    row = (queries_before // T).to(tl.int64)
    key = (tl.program_id(0) % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # an entry, or a pick
    channel = tl.arange(0, BLOCK_J)
    if KIND == "picked":
        entry = tl.load(picked_ptr + (queries_before + group) * S + key, mask=key < S, other=-1)
        is_key = entry >= 0
        first = group
        last = group + 1
    else:
        entry = key
        is_key = key < C
        reader = group * QUERIES + tl.arange(0, QUERIES)
        begin = tl.load(begin_ptr + queries_before + reader, mask=reader < count, other=0)
        end = tl.load(end_ptr + queries_before + reader, mask=reader < count, other=0)
        reads = (begin <= tl.max(key, axis=0)) & (end > tl.min(key, axis=0)) & (reader < count)
        first = tl.min(tl.where(reads, reader, count), axis=0)
        last = tl.max(tl.where(reads, reader + 1, 0), axis=0)
    keys_at = (row * C + entry)[:, None] * J + channel[None, :]
    keys = tl.load(keys_ptr + keys_at, mask=is_key[:, None] & (channel < J)[None, :], other=0.0)  # [n, j]
    acc = tl.zeros([BLOCK_N, BLOCK_J], dtype=tl.float32)
    head_blocks: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    for step in range(first * head_blocks, last * head_blocks):  # one loop over queries and heads: it is pipelined
        place = step // head_blocks
        query = queries_before + place
        head = (step % head_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
        at = (query * I + head)[:, None] * J + channel[None, :]
        q = tl.load(q_ptr + at, mask=(head < I)[:, None] & (channel < J)[None, :], other=0.0)  # [i, j]
        weight = tl.load(weights_ptr + query * I + head, mask=head < I, other=0.0)
        if KIND == "picked":
            column = key
            is_seen = is_key
        else:
            column = key - tl.maximum(tl.load(begin_ptr + query), 0)
            is_seen = (column >= 0) & (key < tl.minimum(tl.load(end_ptr + query), C))
        grad = tl.load(grad_scores_ptr + place * S + column, mask=is_seen, other=0.0)
        dots = tl.dot(keys, tl.trans(q), input_precision="ieee").to(q.dtype).to(tl.float32)  # [n, i]
        grad_dots = tl.where(dots > 0, grad[:, None] * weight[None, :], 0.0)
        acc = tl.dot(grad_dots.to(q.dtype), q, acc, input_precision="ieee")
    part = parts_ptr + (group * S + key)[:, None] * J + channel[None, :]
    tl.store(part, acc, mask=(key < S)[:, None] & (channel < J)[None, :])
