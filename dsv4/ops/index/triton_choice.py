"""The P best of a row of scores, exactly, as Triton kernels: where to look first, then what to take.

The best P entries lie in the best P folds by their largest scores, equal ones by their place: P folds that come before
another one hold P entries that come before each of its. So of the 262,144 scores of a million tokens, one program reads
16,384 peaks, and a second one P folds of 16 scores, both few enough for registers. A row of no more than P folds needs
no peaks. There, the P-th largest integer is found by halving an interval and counting, at most 32 times, and places in
the list by a running sum: no sort, no atomics, and equal scores go to the smaller entry by construction.
"""

# Kernels are a language of their own, in which a constexpr is a number.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4.ops.index.triton_scores import FOLD, NOTHING, Queries, Scores, seen_by

FEWER = 8  # a query that sees so many times fewer folds than there is room for holds as many fewer scores
PER_THREAD = 32  # scores in the registers of a thread
FEWEST_WARPS, MOST_WARPS = 4, 16
CHUNK = 2048  # scores whose places are found at a time, at most 2^15

_MOST = tl.constexpr(2**31 - 1)


def choose_into(
    picked: torch.Tensor, scores: Scores, queries: Queries, num_entries: int, first: int, num_queries: int
) -> None:
    """Write the choices of queries from ``first`` on: picked [all, P] int64 or int32, ascending, then -1.

    The scores of those that see no more than P entries are not read.
    """
    num_picks = picked.shape[1]
    num_folds = triton.cdiv(num_entries, FOLD)
    folds = triton.next_power_of_2(max(1, min(num_folds, num_picks)))  # in registers
    has_list = num_folds > folds
    best = picked.new_empty(num_queries if has_list else 0, num_picks, dtype=torch.int32)
    numbers = (first, first + num_queries, queries.num_tokens, num_entries, num_picks, scores.ordered.shape[1])
    seen = (queries.slot, queries.begin, queries.end)
    if has_list:
        block = triton.next_power_of_2(num_folds)
        _best_folds[(num_queries,)](
            *(scores.peaks, *seen, best, *numbers),
            RATIO=queries.ratio, FOLD=FOLD, FOLDS=folds, BLOCK=block, CHUNK=min(CHUNK, block), num_warps=_warps(block),
        )  # fmt: skip
    _choose[(num_queries,)](
        *(scores.ordered, *seen, best, picked, *numbers),
        RATIO=queries.ratio, FOLD=FOLD, FOLDS=folds, FEWER=max(1, folds // FEWER),
        BLOCK_P=triton.next_power_of_2(num_picks), CHUNK=CHUNK, num_warps=_warps(folds * FOLD),
    )  # fmt: skip


def _warps(numbers: int) -> int:
    return max(FEWEST_WARPS, min(MOST_WARPS, numbers // (32 * PER_THREAD)))


@triton.jit
def _least(keys, num_picks):
    """The least of the num_picks largest of keys [n] int32, and how many of those equal it; more are above NOTHING."""
    low = tl.min(tl.where(keys == NOTHING, _MOST, keys), axis=0).to(tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64)
    while low < high:  # the largest number that at least num_picks keys reach is in low to high
        middle = low + (high - low + 1) // 2
        count = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0)
        low = tl.where(count >= num_picks, middle, low)
        high = tl.where(count == num_picks, middle, tl.where(count > num_picks, high, middle - 1))
    least = low.to(tl.int32)
    return least, num_picks - tl.sum((keys > least).to(tl.int32), axis=0)


@triton.jit
def _places(keys, least, num_equal, above, equal):
    """Which of the next keys [n] are among the largest, and their places, after so many above and equal to the least.

    Returns the counts after these keys, too.
    """
    is_above = keys > least
    is_equal = keys == least
    counted = (is_above.to(tl.int32) << 16) + is_equal.to(tl.int32)  # of up to 2^15 keys
    before = tl.cumsum(counted, axis=0) - counted
    equal_before = equal + (before & 0xFFFF)
    is_best = is_above | (is_equal & (equal_before < num_equal))
    places = above + (before >> 16) + tl.minimum(equal_before, num_equal)
    total = tl.sum(counted, axis=0)
    return is_best, places, above + (total >> 16), equal + (total & 0xFFFF)


@triton.jit
def _load_peaks(peaks_ptr, fold, first, last):
    return tl.load(peaks_ptr + fold, mask=(fold >= first) & (fold < last), other=NOTHING)


@triton.jit
def _best_folds(
    peaks_ptr, slot_ptr, begin_ptr, end_ptr, best_ptr, first_query, stop_query, T, C, P, length,
    RATIO: tl.constexpr, FOLD: tl.constexpr, FOLDS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The P best folds of a query that sees more than FOLDS, ascending."""
    row = tl.program_id(0).to(tl.int64)
    _, begin, end = seen_by(first_query + row, stop_query, slot_ptr, begin_ptr, end_ptr, T, C, RATIO)
    first, last = begin // FOLD, tl.cdiv(end, FOLD)
    peaks_ptr += row * (length // FOLD)
    if last - first > FOLDS:
        least, num_equal = _least(_load_peaks(peaks_ptr, tl.arange(0, BLOCK), first, last), P)
        above, equal = 0, 0
        for start in range(0, BLOCK, CHUNK):
            fold = start + tl.arange(0, CHUNK)
            peaks = _load_peaks(peaks_ptr, fold, first, last)
            is_best, places, above, equal = _places(peaks, least, num_equal, above, equal)
            tl.store(best_ptr + row * P + places, fold, mask=is_best)


@triton.jit
def _choose(
    ordered_ptr, slot_ptr, begin_ptr, end_ptr, best_ptr, picked_ptr, first_query, stop_query, T, C, P, length,
    RATIO: tl.constexpr, FOLD: tl.constexpr, FOLDS: tl.constexpr, FEWER: tl.constexpr, BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The choice of one query."""
    row = tl.program_id(0).to(tl.int64)
    _, begin, end = seen_by(first_query + row, stop_query, slot_ptr, begin_ptr, end_ptr, T, C, RATIO)
    ordered_ptr += row * length
    best_ptr += row * P
    picked_ptr += (first_query + row) * P
    num_folds = tl.cdiv(end, FOLD) - begin // FOLD
    if end - begin <= P:
        place = tl.arange(0, BLOCK_P)
        every = tl.where(begin + place < end, begin + place, -1)
        tl.store(picked_ptr + place, every.to(picked_ptr.dtype.element_ty), mask=place < P)
    elif num_folds <= FEWER:
        _choose_in(ordered_ptr, best_ptr, picked_ptr, begin, end, P, 0, FOLD, FEWER * FOLD, CHUNK)
    else:
        num_listed = tl.where(num_folds > FOLDS, P, 0)
        _choose_in(ordered_ptr, best_ptr, picked_ptr, begin, end, P, num_listed, FOLD, FOLDS * FOLD, CHUNK)


@triton.jit
def _choose_in(
    ordered_ptr, best_ptr, picked_ptr, begin, end, P, num_listed, FOLD: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The P best in the folds of a list, or without one in all folds of a query, which hold at most BLOCK scores."""
    part: tl.constexpr = CHUNK if CHUNK < BLOCK else BLOCK
    _, all_scores = _load_scores(ordered_ptr, best_ptr, tl.arange(0, BLOCK), begin, end, num_listed, FOLD)
    least, num_equal = _least(all_scores, P)
    above, equal = 0, 0
    for start in range(0, BLOCK, part):
        number = start + tl.arange(0, part)
        entry, scores = _load_scores(ordered_ptr, best_ptr, number, begin, end, num_listed, FOLD)
        is_best, places, above, equal = _places(scores, least, num_equal, above, equal)
        tl.store(picked_ptr + places, entry.to(picked_ptr.dtype.element_ty), mask=is_best)


@triton.jit
def _load_scores(ordered_ptr, best_ptr, number, begin, end, num_listed, FOLD: tl.constexpr):
    """Entries and scores by their numbers [n] in the folds: those listed, or all from that of begin on."""
    number_of_fold = number // FOLD
    listed = tl.load(best_ptr + number_of_fold, mask=number_of_fold < num_listed, other=_MOST // FOLD)
    fold = tl.where(num_listed > 0, listed, begin // FOLD + number_of_fold)
    entry = fold * FOLD + number % FOLD
    scores = tl.load(ordered_ptr + entry, mask=(entry >= begin) & (entry < end), other=NOTHING)
    return entry, scores
