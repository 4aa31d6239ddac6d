"""The lightning indexer as Triton kernels: scores through a buffer of fixed size, choices out of registers.

A score is 2 I J = 16,384 operations of tensor cores, and four bytes. At the speed of an H200's products, 790 TFLOP/s,
that is 48 such numbers a nanosecond, 0.2 of its 4.8 TB/s: to store them costs little, and to compute them a second
time, as counting passes without a buffer would, costs as much as the whole. So queries go by as many as fit in
``SCORES_HELD``, a number that hangs on C alone: one kernel writes the scores of their entries as integers and the
largest of each 16, a second one finds the best of those where there are many, and a third one the best entries in them
(``triton_choice.py``). Choosing reads at most 64 KiB of peaks and 64 KiB of scores for each query at a million tokens.

In a long prompt 32 queries share a tile of keys in shared memory, and products are the limit. Where queries are few,
each streams the keys, spread over ``triton_scores.SPLITS`` programs, a number that C alone bounds: at a million tokens
one query reads 64 MiB of keys in bfloat16, 14 us at 4.8 TB/s, beside 5 us of products, 33 MiB of FP8 ones, and 17 MiB
of FP4 ones, which take longer to unpack than to read. Which of both ways a score is computed changes no bit of it
(``triton_scores.py``), and the choice among scores is exact, so that a query's picks hang neither on the other queries
nor on how the entries were spread.
"""

from __future__ import annotations

import torch
import triton

from dsv4.ops.index.triton_choice import choose_into
from dsv4.ops.index.triton_picked import score
from dsv4.ops.index.triton_scores import FOLD, Keys, Queries, Scores, config_of, rows_of, score_into

__all__ = ["choose", "score", "select"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCORES_HELD = 1 << 26  # of so many queries as fit, int32: 256 MiB
QUERIES_HELD = 1 << 20  # at most, whose groups fit in a grid


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    entry_begin: torch.Tensor,
    entry_end: torch.Tensor,
    num_picks: int,
) -> torch.Tensor:
    """See ``dsv4.ops.index.select``. q and k share one dtype: float32, float16 or bfloat16."""
    if k.dtype != q.dtype:
        raise ValueError(f"k has dtype {k.dtype}; expected {q.dtype}, that of q, for the Triton kernels")
    picked = entry_end.new_empty(*q.shape[:2], num_picks)
    begin, end = entry_begin.contiguous().flatten(), entry_end.contiguous().flatten()
    queries = Queries(
        q.contiguous().flatten(0, 1), weights.contiguous().flatten(0, 1), begin, begin, end, q.shape[1], ratio=0
    )
    choose(queries, rows_of(k.contiguous()), picked.flatten(0, 1))
    return picked


def choose(queries: Queries, keys: Keys, picked: torch.Tensor) -> None:
    """Write the choices of all queries: picked, [n, P] int32 or int64, ascending, then -1."""
    q = queries.q
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; expected float32, float16 or bfloat16 for the Triton kernels")
    num_picks, is_open = picked.shape[1], picked.shape[1] < keys.num_entries  # else whatever is seen is picked
    if picked.numel() == 0:
        return
    tile = config_of(queries, keys).entries
    length = triton.cdiv(keys.num_entries, tile) * tile if is_open else 0
    held = max(1, min(QUERIES_HELD, SCORES_HELD // max(1, length), len(q)))
    scores = Scores(*(torch.empty(held, n, dtype=torch.int32, device=q.device) for n in (length, length // FOLD)))
    for first in range(0, len(q), held):
        num_queries = min(held, len(q) - first)
        if is_open:
            score_into(scores, queries, keys, first, num_queries, num_picks)
        choose_into(picked, scores, queries, keys.num_entries, first, num_queries)
