"""The byte n-gram baseline against the formula with dictionaries, and what any language model must satisfy."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from dsv4.eval.ngram import BEGIN, FEW_COUNTS_DISCOUNTS, bits_per_byte, encode, fit, probabilities


class Slow:
    """The same model, a dictionary for each count of the formula and a recursion for each probability."""

    def __init__(self, documents: list[bytes], order: int) -> None:
        self.order = order
        occurrences = Counter()
        for document in documents:
            symbols = [BEGIN] * (order - 1) + list(document)
            for i in range(order - 1, len(symbols)):
                occurrences[tuple(symbols[i - order + 1 : i + 1])] += 1
        self.counts = {order: dict(occurrences)}
        for n in range(order - 1, 0, -1):
            before = defaultdict(set)
            for gram in occurrences:
                before[gram[order - n :]].add(gram[order - n - 1])
            self.counts[n] = {gram: len(symbols) for gram, symbols in before.items()}
        self.discounts = {n: self.discounts_of(counts) for n, counts in self.counts.items()}
        self.after = {n: defaultdict(list) for n in self.counts}
        for n, counts in self.counts.items():
            for gram, count in counts.items():
                self.after[n][gram[:-1]].append(count)

    @staticmethod
    def discounts_of(counts):
        n1, n2, n3, n4 = (sum(count == i for count in counts.values()) for i in (1, 2, 3, 4))
        if min(n1, n2, n3, n4) == 0:
            return FEW_COUNTS_DISCOUNTS
        y = n1 / (n1 + 2 * n2)
        result = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        return result if min(result) > 0 else FEW_COUNTS_DISCOUNTS

    def probability(self, gram):
        n = len(gram)
        if n == 0:
            return 1 / 256
        counts = self.after[n].get(gram[:-1])
        if counts is None:
            return self.probability(gram[1:])
        discounts = self.discounts[n]
        withheld = sum(discounts[min(count, 3) - 1] for count in counts)
        count = self.counts[n].get(gram, 0)
        seen = count - discounts[min(count, 3) - 1] if count else 0
        return (seen + withheld * self.probability(gram[1:])) / sum(counts)

    def bits(self, documents: list[bytes]) -> float:
        total = 0.0
        for document in documents:
            symbols = [BEGIN] * (self.order - 1) + list(document)
            for i in range(self.order - 1, len(symbols)):
                total -= math.log2(self.probability(tuple(symbols[i - self.order + 1 : i + 1])))
        return total / sum(map(len, documents))


def text(seed: int, num_documents: int, alphabet: int, offset: int = 0) -> list[bytes]:
    """Documents of skewed bytes in which n-grams of every small count occur; some documents are empty."""
    draw = np.random.default_rng(seed)
    return [
        bytes((np.minimum(draw.geometric(0.3, draw.integers(0, 60)), alphabet) - 1 + offset).astype(np.uint8))
        for _ in range(num_documents)
    ]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("num_documents", [2, 70])
def test_bits_are_those_of_dictionaries(order, num_documents):
    train = [*text(1, num_documents, alphabet=19, offset=237), b"\x00\x00\xff"]  # up to the last byte
    validation = [*text(2, 9, alphabet=19, offset=237), b"never seen", b"\x00"]
    assert bits_per_byte(train, validation, order) == pytest.approx(Slow(train, order).bits(validation), abs=1e-12)


def test_both_kinds_of_discounts_were_compared():
    small, large = (Slow([*text(1, count, alphabet=19, offset=237), b"\x00\x00\xff"], 5) for count in (2, 70))
    assert small.discounts[5] == FEW_COUNTS_DISCOUNTS
    assert large.discounts[5] != FEW_COUNTS_DISCOUNTS != large.discounts[2]
    assert large.counts[5] != large.counts[4]


@pytest.mark.parametrize("order", [1, 2, 5, 7])
def test_probabilities_of_all_bytes_add_up(order):
    train = text(3, 40, alphabet=11)
    orders = fit(train, order)
    seen = [document[:4] for document in train if len(document) > 4]
    draw = np.random.default_rng(4)
    unseen = [bytes(draw.integers(0, 256, length).astype(np.uint8)) for length in (0, 1, 3, 9)]
    mixed = [b"\xfe" + seen[0][1:], seen[0][:3] + b"\xfe"]  # a context that is known only in part
    for context in (*seen, *unseen, *mixed):
        grams = np.array([encode([context + bytes([byte])], order, "context")[-1] for byte in range(256)])
        p = probabilities(orders, grams)
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_order_one_is_the_entropy_of_smoothed_frequencies():
    train, validation = [b"abracadabra", b"aaab"], [b"bar", b"z"]
    d1, d2, d3 = FEW_COUNTS_DISCOUNTS  # no byte occurs four times
    counts = {"a": 8, "b": 3, "r": 2, "c": 1, "d": 1}
    withheld = 2 * d3 + d2 + 2 * d1
    of = {byte: (count - (0, d1, d2, d3)[min(count, 3)] + withheld / 256) / 15 for byte, count in counts.items()}
    expected = -(math.log2(of["b"]) + math.log2(of["a"]) + math.log2(of["r"]) + math.log2(withheld / 256 / 15)) / 4
    assert bits_per_byte(train, validation, 1) == pytest.approx(expected, abs=1e-12)


def test_more_text_of_a_known_source_comes_nearer_to_its_entropy():
    draw = np.random.default_rng(5)
    states = 12
    transitions = draw.dirichlet(np.full(states, 0.3), size=(states, states))  # of the last two symbols
    choices = draw.random(60_000)
    cumulative = transitions.cumsum(axis=-1)
    cumulative[..., -1] = 1.0
    symbols, entropy = [0, 1], 0.0
    for choice in choices:
        row = (symbols[-2], symbols[-1])
        symbols.append(int(np.searchsorted(cumulative[row], choice, side="right")))
        entropy -= math.log2(transitions[row][symbols[-1]])
    source = bytes(symbols[2:])
    documents = [source[i : i + 500] for i in range(0, len(source), 500)]
    validation, train = documents[:20], documents[20:]
    bits = [bits_per_byte(train[:count], validation, 5) for count in (1, 5, 25, 100)]
    assert bits == sorted(bits, reverse=True)
    assert entropy / len(choices) < bits[-1] < 1.1 * entropy / len(choices)


def test_documents_do_not_see_each_other():
    train = [b"a1", b"b2"] * 20
    together = bits_per_byte(train, [b"a1", b"b2"], 3)
    assert together == pytest.approx(np.mean([bits_per_byte(train, [one], 3) for one in (b"a1", b"b2")]), abs=1e-12)
    assert together == bits_per_byte(sorted(train), [b"b2", b"a1"], 3)
    # One bit chooses the document, its second byte follows: next to nothing is lost to discounts.
    assert together == pytest.approx(0.5, abs=0.1)
    assert bits_per_byte([b"".join(train)], [b"b2", b"a1"], 3) > 1


@pytest.mark.parametrize(
    ("train", "validation", "order", "message"),
    [
        ([b"a"], [b"a"], 0, "order is 0; expected 1 to 7"),
        ([b"a"], [b"a"], 8, "order is 8; expected 1 to 7"),
        ([], [b"a"], 5, "train holds no byte; expected at least one"),
        ([b"a"], [b"", b""], 5, "validation holds no byte"),
    ],
)
def test_what_cannot_be_counted_is_refused(train, validation, order, message):
    with pytest.raises(ValueError, match=message):
        bits_per_byte(train, validation, order)
