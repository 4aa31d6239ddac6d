"""A byte n-gram model, the baseline that a trained model must beat: interpolated modified Kneser-Ney.

With h a context, h' the same without its first byte, c the counts of an order and N_i(h) the number of bytes seen i
times after h (3 standing for 3 and more):

    p(w | h) = (c(h w) - D_min(c, 3) + (D_1 N_1(h) + D_2 N_2(h) + D_3 N_3(h)) p(w | h')) / sum_v c(h v)

The difference is 0 where h w was never seen, and p(w | h') stands alone where h never was. Below the empty context
lies the uniform distribution over 256 bytes. The highest order counts occurrences, the lower ones the different symbols
seen before h w. The discounts follow from n_i, how many n-grams of an order have the count i (Chen and Goodman 1998):

    Y = n_1 / (n_1 + 2 n_2),    D_i = i - (i + 1) Y n_(i+1) / n_i

Documents are independent: each begins after begin marks, which fill contexts and are never predicted. Nor is a
document's end, which a language model is charged for and this baseline is not.

An n-gram is one integer, 9 bits a symbol, its last byte lowest, so that sorting puts the n-grams of a context together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SYMBOL_BITS = 9
BEGIN = 256  # the begin mark; bytes are themselves
HIGHEST_ORDER = 63 // SYMBOL_BITS  # n-grams are non-negative int64
FEW_COUNTS_DISCOUNTS = (0.5, 1.0, 1.5)  # where a text is too small for the formula: no n-gram of some count


@dataclass(frozen=True)
class Order:
    """The counts of one order n, ready for use; arrays are parallel and sorted by their first.

    grams: [G] int64, the n-grams seen; discounted: [G] float64, their counts less the discount. contexts: [H] int64;
    totals: [H] float64, the sum of a context's counts; withheld: [H] float64, the sum of its discounts.
    """

    grams: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    withheld: np.ndarray


def bits_per_byte(train: Iterable[bytes], validation: Iterable[bytes], order: int = 5) -> float:
    """Return the mean bits that a model of ``order`` counted on ``train`` needs for a byte of ``validation``.

    Memory: about 30 bytes a byte of text. Raises ValueError where one of them holds no byte.
    """
    orders = fit(train, order)
    grams, counts = np.unique(encode(validation, order, "validation"), return_counts=True)
    return float(-(counts * np.log2(probabilities(orders, grams))).sum() / counts.sum())


def fit(train: Iterable[bytes], order: int) -> tuple[Order, ...]:
    """Count documents and return the orders 1 to ``order``."""
    grams, counts = np.unique(encode(train, order, "train"), return_counts=True)
    orders = [_order(grams, counts)]
    for n in range(order - 1, 0, -1):
        grams, counts = np.unique(_suffixes(grams, n), return_counts=True)  # each different longer n-gram counts once
        orders.append(_order(grams, counts))
    return tuple(reversed(orders))


def probabilities(orders: tuple[Order, ...], grams: np.ndarray) -> np.ndarray:
    """Return the probability of the last byte of each n-gram after the others, [G] float64.

    grams: [G] int64, n-grams of the highest of ``orders``, as ``encode`` makes them.
    """
    result = np.full(len(grams), 1 / 256)
    for n, order in enumerate(orders, start=1):
        shorter = _suffixes(grams, n)
        context, is_known = _find(order.contexts, shorter >> SYMBOL_BITS)
        gram, is_counted = _find(order.grams, shorter)
        seen = np.where(is_counted, order.discounted[gram], 0.0)
        mixed = (seen + order.withheld[context] * result) / order.totals[context]
        result = np.where(is_known, mixed, result)
    return result


def encode(documents: Iterable[bytes], order: int, name: str) -> np.ndarray:
    """Return the n-gram that ends at each byte of each document, [bytes] int64; ``name`` is for the error."""
    if not 1 <= order <= HIGHEST_ORDER:
        raise ValueError(f"order is {order}; expected 1 to {HIGHEST_ORDER}")
    marks = np.full(order - 1, BEGIN, dtype=np.int16)
    pieces = [piece for document in documents for piece in (marks, np.frombuffer(document, dtype=np.uint8))]
    symbols = np.concatenate(pieces, dtype=np.int16) if pieces else marks
    last = np.flatnonzero(symbols != BEGIN)
    if len(last) == 0:
        raise ValueError(f"{name} holds no byte; expected at least one")
    grams = np.zeros(len(last), dtype=np.int64)
    for back in range(order - 1, -1, -1):
        grams <<= SYMBOL_BITS
        grams |= symbols[last - back]
    return grams


def _order(grams: np.ndarray, counts: np.ndarray) -> Order:
    """Form discounts and sums from sorted n-grams and their counts."""
    discounts = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3)]
    contexts, first = np.unique(grams >> SYMBOL_BITS, return_index=True)
    return Order(
        grams=grams,
        discounted=counts - discounts,
        contexts=contexts,
        totals=np.add.reduceat(counts, first).astype(np.float64),
        withheld=np.add.reduceat(discounts, first),
    )


def _discounts(counts: np.ndarray) -> tuple[float, ...]:
    """D_1, D_2 and D_3 of one order."""
    n = [int((counts == i).sum()) for i in range(1, 5)]
    if 0 in n:
        return FEW_COUNTS_DISCOUNTS
    share = n[0] / (n[0] + 2 * n[1])
    result = tuple(i - (i + 1) * share * n[i] / n[i - 1] for i in range(1, 4))
    return result if min(result) > 0 else FEW_COUNTS_DISCOUNTS


def _suffixes(grams: np.ndarray, n: int) -> np.ndarray:
    """The last n symbols of n-grams."""
    return grams & ((1 << n * SYMBOL_BITS) - 1)


def _find(ordered: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each wanted value is in a sorted array, and whether it is there at all (if not, any place)."""
    place = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
    return place, ordered[place] == wanted
