"""The indexer's loss as Triton kernels, the student's gradients formed along with it.

For some queries of a row at a time, as many as SCORES_HELD takes:

    _teacher   log mass of each entry a query sees: products with all heads, of which a tile keeps one number an entry
    _student   index scores of the same entries
    _compare   both distributions, their divergences, and the gradient of the scores, which replaces them
    gradients  of the student's queries, weights and keys, in ``triton_gradients.py``

Columns of scores are the places of a query's entries: of its picks, or counted from the first of its interval. Tiles
run along them, so that a query's numbers depend on its own entries alone. ``recall`` takes the teacher's mass from the
same kernel; it waits for the device once, for the number of queries it measures. float64 is ``portable``'s: nothing but
tests has it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from dsv4.ops.indexer_kl import portable
from dsv4.ops.indexer_kl.triton_gradients import QUERIES, Config, Seen, Student, entries_in, num_columns

if TYPE_CHECKING:
    from dsv4.ops.attend import Entries

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORES_HELD = 1 << 26  # scores of teacher and of student held at a time, elements; 256 MiB each
PARTS_HELD = 1 << 28  # numbers of the gradients of picked keys held at a time, 1 GiB
COLUMNS = 512  # of a program of a query, so that a long row is many; its queries are read once for them
BLOCK = 1024  # columns that are compared at a time
LN_2, LOG2_E = math.log(2), math.log2(math.e)
CONFIGS = {
    # 64 queries of 512 channels are 64 KiB of shared memory, and two tiles of as many entries fill the rest.
    "teacher": Config(64, 64, 4, 2),
    # All 128 heads of Pro meet a tile of entries at once: two of 64 would take more than there is.
    "tall teacher": Config(128, 64, 8, 1),
    # More heads than that, block by block.
    "teacher of many": Config(64, 32, 4, 1),
    # float32 has no tensor cores here, and twice the bytes.
    "float32": Config(16, 16, 4, 1),
    # Of 128 channels; a product 128 wide, and three tiles on their way.
    "student": Config(64, 128, 4, 3),
}
_FLOOR = tl.constexpr(-1.0e38)  # a peak before any number, finite so that no difference is of two infinities
_TINY = tl.constexpr(1.0e-37)


def indexer_kl(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    index_weights: torch.Tensor,
    q: torch.Tensor,
    entries: Entries,
    log_sum_exp: torch.Tensor,
    query_weights: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.indexer_kl``."""
    narrow = {x.dtype for x in (index_q, index_k, q, entries.values)} <= set(DTYPES)
    if not narrow or index_q.dtype != index_k.dtype or q.dtype != entries.values.dtype:
        return portable.indexer_kl(index_q, index_k, index_weights, q, entries, log_sum_exp, query_weights, scale)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (index_q, index_k, index_weights))
    return _IndexerKL.apply(
        index_q, index_k, index_weights, q, entries, log_sum_exp, query_weights, scale, learns
    )  # fmt: skip


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q, index_k, index_weights, q, entries, log_sum_exp, query_weights, scale, learns):
        B, T = q.shape[:2]
        seen = Seen.of(entries)
        factors = query_weights.float().contiguous()
        kl, uniform_kl = (torch.zeros(B, T, dtype=torch.float32, device=q.device) for _ in range(2))
        student = Student(index_q.contiguous(), index_k.contiguous(), index_weights.float().contiguous(), seen, learns)
        if kl.numel() and seen.columns:
            teacher = q.contiguous(), entries.values.contiguous(), log_sum_exp.float().contiguous()
            _run(teacher, student, seen, factors, kl, uniform_kl, scale)
        ctx.dtypes = index_k.dtype, index_weights.dtype
        if learns:
            ctx.save_for_backward(student.grad_q, student.grad_k, student.grad_weights)
        ctx.mark_non_differentiable(kl, uniform_kl)
        return torch.dot(factors.flatten(), kl.flatten()), kl, uniform_kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        grad_q, grad_k, grad_weights = ctx.saved_tensors
        of_k, of_weights = ctx.dtypes
        grads = grad_q * grad.to(grad_q.dtype), (grad_k * grad).to(of_k), (grad_weights * grad).to(of_weights)
        return *grads, *([None] * 6)


def _run(
    teacher: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    student: Student,
    seen: Seen,
    factors: torch.Tensor,
    kl: torch.Tensor,
    uniform_kl: torch.Tensor,
    scale: float,
) -> None:
    """Write the divergences of all queries, [B, T], and the student's gradients. teacher: q, values, log_sum_exp."""
    (B, T), S = kl.shape, seen.columns
    limit = PARTS_HELD // (S * student.q.shape[3]) if seen.kind == "picked" and student.learns else SCORES_HELD
    held = _queries_held(T, S, limit)
    mass, scores = (torch.empty(held, S, dtype=torch.float32, device=kl.device) for _ in range(2))
    for row in range(B):
        for first in range(0, T, held):
            now = row, first, min(held, T - first)
            _score(teacher, seen, mass, now, T, scale)
            _score((student.q, student.k, student.weights), seen, scores, now, T, None)
            _compare[(now[2],)](
                mass, scores, *seen.tensors(), factors, kl, uniform_kl, S, seen.num_entries, row * T + first,
                KIND=seen.kind, LEARNS=student.learns, BLOCK=min(BLOCK, triton.next_power_of_2(S)), num_warps=4,
            )  # fmt: skip
            if student.learns:
                student.learn(scores, now)


def _queries_held(T: int, S: int, limit: int) -> int:
    """Queries whose scores, S each, are held at a time, in whole parts of the gradients of keys."""
    parts = max(1, min(SCORES_HELD // S, limit) // QUERIES)
    return min(triton.cdiv(T, QUERIES), parts) * QUERIES


def recall(
    q: torch.Tensor, entries: Entries, log_sum_exp: torch.Tensor, picked: torch.Tensor, scale: float
) -> torch.Tensor:
    """See ``dsv4.ops.indexer_kl.recall``."""
    if q.dtype not in DTYPES or q.dtype != entries.values.dtype:
        return portable.recall(q, entries, log_sum_exp, picked, scale)
    (B, T), num_picks, seen = q.shape[:2], picked.shape[2], Seen.of(entries)
    begin, S = seen.begin.clamp(min=0), seen.columns
    num_seen = seen.end.clamp(max=S) - begin  # [B, T]
    shares = torch.empty(B, T, dtype=torch.float32, device=q.device)
    if num_picks >= S or not shares.numel():
        return shares.fill_(torch.nan)
    teacher = q.contiguous(), entries.values.contiguous(), log_sum_exp.float().contiguous()
    held, column = _queries_held(T, S, SCORES_HELD), torch.arange(S, device=q.device)
    mass = torch.empty(held, S, dtype=torch.float32, device=q.device)
    for row in range(B):
        for first in range(0, T, held):
            now = slice(first, min(first + held, T))
            _score(teacher, seen, mass, (row, first, now.stop - first), T, scale)
            log_mass = mass[: now.stop - first].masked_fill_(column >= num_seen[row, now, None], -torch.inf)
            best = log_mass.topk(num_picks, dim=-1).indices + begin[row, now, None]
            shares[row, now] = _share_held(picked[row, now], best)
    return shares.where(num_seen > num_picks, torch.nan)


def _share_held(some: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The share of each row of ``wanted`` [n, P] that the same row of ``some`` [n, P] holds, [n] float32."""
    some = some.sort(dim=-1).values
    at = torch.searchsorted(some, wanted).clamp_(max=some.shape[-1] - 1)
    return (some.gather(-1, at) == wanted).float().mean(dim=-1)


def _score(
    side: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seen: Seen,
    scores: torch.Tensor,
    now: tuple[int, int, int],
    T: int,
    scale: float | None,
) -> None:
    """Write a row of scores for each query: log mass with a scale, the teacher's, or index scores without."""
    q, keys, of_heads = side
    (row, first, count), S, (H, K) = now, seen.columns, q.shape[2:]
    narrow = "student" if scale is None else _teacher_config(H)
    config = CONFIGS["float32" if q.dtype == torch.float32 else narrow]
    chunks = triton.cdiv(S, COLUMNS)
    given = (q, keys, of_heads, *seen.tensors(), scores, T, seen.num_entries, S, row * T + first, chunks)
    sizes = {
        "KIND": seen.kind, "H": H, "K": K, "COLUMNS": COLUMNS, "BLOCK_H": config.block_heads(H),
        "BLOCK_K": max(16, triton.next_power_of_2(K)), "BLOCK_N": config.entries,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    if scale is None:
        _student[(count * chunks,)](*given, **sizes)
    else:
        _teacher[(count * chunks,)](*given, scale * LOG2_E, LOG2_E, LN_2, **sizes)


def _teacher_config(H: int) -> str:
    return "teacher" if H <= 64 else "tall teacher" if H <= 128 else "teacher of many"


@triton.jit
def _rows(x, query, head, channel, H: tl.constexpr, K: tl.constexpr):
    """Heads of a query, [H, K], zero beyond."""
    at = (query * H + head)[:, None] * K + channel[None, :]
    return tl.load(x + at, mask=(head < H)[:, None] & (channel < K)[None, :], other=0.0)


@triton.jit
def _columns(queries_before, chunks, T, COLUMNS: tl.constexpr):
    """This program's place among the queries of the call, its query among all, and its first column."""
    place = (tl.program_id(0) // chunks).to(tl.int64)
    return place, queries_before + place, (tl.program_id(0) % chunks) * COLUMNS


@triton.jit(do_not_specialize=["queries_before"])
def _teacher(
    q_ptr, values_ptr, log_sum_exp_ptr, picked_ptr, begin_ptr, end_ptr, mass_ptr, T, C, S, queries_before, chunks,
    log2_scale, log2_e, ln_2,
    KIND: tl.constexpr, H: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some columns of one query: the logarithm of what all heads together give to each entry."""
    place, query, first = _columns(queries_before, chunks, T, COLUMNS)
    row = query // T
    last = tl.minimum(num_columns(begin_ptr, end_ptr, query, C, S, KIND), first + COLUMNS)
    channel = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_H)
    if H <= BLOCK_H:
        q = _rows(q_ptr, query, lane, channel, H, K)
        norm = tl.load(log_sum_exp_ptr + query * H + lane, mask=lane < H, other=0.0) * log2_e
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        entry, is_seen = entries_in(picked_ptr, begin_ptr, query, column, last, S, KIND)
        at = (row * C + entry)[:, None] * K + channel[None, :]
        values = tl.load(values_ptr + at, mask=is_seen[:, None] & (channel < K)[None, :], other=0.0)  # [n, k]
        peak = tl.full([BLOCK_N], _FLOOR, dtype=tl.float32)
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for head_first in tl.static_range(0, H, BLOCK_H):
            head = head_first + lane
            if H > BLOCK_H:
                q = _rows(q_ptr, query, head, channel, H, K)
                norm = tl.load(log_sum_exp_ptr + query * H + head, mask=head < H, other=0.0) * log2_e
            scores = tl.dot(q, tl.trans(values), input_precision="ieee") * log2_scale - norm[:, None]  # [h, n]
            scores = tl.where((head < H)[:, None], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=0))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[None, :]), axis=0)
            peak = higher
        tl.store(mass_ptr + place * S + column, (peak + tl.log2(total)) * ln_2, mask=column < last)


@triton.jit(do_not_specialize=["queries_before"])
def _student(
    q_ptr, keys_ptr, weights_ptr, picked_ptr, begin_ptr, end_ptr, scores_ptr, T, C, S, queries_before, chunks,
    KIND: tl.constexpr, H: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some columns of one query: index scores, of products rounded to the dtype of q."""
    place, query, first = _columns(queries_before, chunks, T, COLUMNS)
    row = query // T
    last = tl.minimum(num_columns(begin_ptr, end_ptr, query, C, S, KIND), first + COLUMNS)
    channel = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_H)
    if H <= BLOCK_H:
        q = _rows(q_ptr, query, lane, channel, H, K)
        weight = tl.load(weights_ptr + query * H + lane, mask=lane < H, other=0.0)
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        entry, is_seen = entries_in(picked_ptr, begin_ptr, query, column, last, S, KIND)
        at = (row * C + entry)[:, None] * K + channel[None, :]
        keys = tl.load(keys_ptr + at, mask=is_seen[:, None] & (channel < K)[None, :], other=0.0)  # [n, j]
        score = tl.zeros([BLOCK_N], dtype=tl.float32)
        for head_first in tl.static_range(0, H, BLOCK_H):
            if H > BLOCK_H:
                q = _rows(q_ptr, query, head_first + lane, channel, H, K)
                weight = tl.load(weights_ptr + query * H + head_first + lane, mask=head_first + lane < H, other=0.0)
            dots = tl.dot(q, tl.trans(keys), input_precision="ieee").to(q.dtype).to(tl.float32)  # [i, n]
            score += tl.sum(tl.maximum(dots, 0.0) * weight[:, None], axis=0)
        tl.store(scores_ptr + place * S + column, score, mask=column < last)


@triton.jit(do_not_specialize=["queries_before"])
def _compare(
    mass_ptr, scores_ptr, picked_ptr, begin_ptr, end_ptr, factors_ptr, kl_ptr, uniform_kl_ptr, S, C, queries_before,
    KIND: tl.constexpr, LEARNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query: its divergences, and in place of its scores their gradient, 0 where there is no entry.

    Lanes have peaks and sums of their own, which meet at the end of each pass.
    """
    place = tl.program_id(0).to(tl.int64)
    query = queries_before + place
    mass_ptr += place * S
    scores_ptr += place * S
    last = num_columns(begin_ptr, end_ptr, query, C, S, KIND)
    lane = tl.arange(0, BLOCK)
    peak_p, peak_r = tl.full([BLOCK], _FLOOR, dtype=tl.float32), tl.full([BLOCK], _FLOOR, dtype=tl.float32)
    total_p, total_r = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    num_seen = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, last, BLOCK):
        _, is_seen = entries_in(picked_ptr, begin_ptr, query, start + lane, last, S, KIND)
        peak_p, total_p = _take_in(mass_ptr + start + lane, is_seen, peak_p, total_p)
        peak_r, total_r = _take_in(scores_ptr + start + lane, is_seen, peak_r, total_r)
        num_seen += tl.where(is_seen, 1.0, 0.0)
    norm_p, norm_r = _log_total(peak_p, total_p), _log_total(peak_r, total_r)
    kl, uniform = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    factor = tl.load(factors_ptr + query)
    for start in range(0, last, BLOCK):
        column = start + lane
        _, is_seen = entries_in(picked_ptr, begin_ptr, query, column, last, S, KIND)
        log_p = tl.where(is_seen, tl.load(mass_ptr + column, mask=is_seen, other=0.0) - norm_p, 0.0)
        log_r = tl.where(is_seen, tl.load(scores_ptr + column, mask=is_seen, other=0.0) - norm_r, 0.0)
        p = tl.where(is_seen, tl.exp(log_p), 0.0)
        kl += p * (log_p - log_r)
        uniform += p * log_p
        if LEARNS:
            r = tl.where(is_seen, tl.exp(log_r), 0.0)
            tl.store(scores_ptr + column, (r - p) * factor, mask=column < last)
    tl.store(kl_ptr + query, tl.sum(kl, axis=0))
    tl.store(uniform_kl_ptr + query, tl.sum(uniform, axis=0) + tl.log(tl.maximum(tl.sum(num_seen, axis=0), 1.0)))


@triton.jit
def _take_in(logits, is_seen, peak, total):
    """Running peaks and sums of lanes with one number more each."""
    x = tl.load(logits, mask=is_seen, other=float("-inf"))
    higher = tl.maximum(peak, x)
    return higher, total * tl.exp(peak - higher) + tl.exp(x - higher)


@triton.jit
def _log_total(peaks, totals):
    """The logarithm of the sum over all lanes; of none, some number."""
    peak = tl.max(peaks, axis=0)
    return peak + tl.log(tl.maximum(tl.sum(totals * tl.exp(peaks - peak), axis=0), _TINY))
