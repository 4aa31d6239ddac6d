"""Rows are full, documents are whole unless there is no other way, and every token is delivered once."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.data.pack import PADDED_SHARE, Packer, Piece, choose


def pieces_of(lengths, start=0):
    """Documents whose tokens say where they are from: token i of document d is 10^6 d + i."""
    for document, length in enumerate(lengths, start):
        yield Piece(0, document, 0, document * 10**6 + np.arange(length))


def places(row):
    """Document, first token and length of each piece of a row."""
    return [(*divmod(int(piece[0]), 10**6), len(piece)) for piece in row]


def all_rows(lengths, sequence, capacity):
    packer = Packer(pieces_of(lengths), capacity)
    return list(iter(lambda: packer.row(sequence), []))


def num_needed(lengths, sequence):
    """Cuts that no packing can do without."""
    return sum(-(-length // sequence) - 1 for length in lengths)


def num_cuts(rows, lengths):
    return sum(map(len, rows)) - len(lengths)


@pytest.mark.parametrize(
    ("lengths", "room", "choice"),
    [
        ([70, 20, 300], 100, (0, 70)),  # a new row: the oldest piece
        ([300, 20, 70], 100, (0, 100)),  # as much of it as there is room for
        ([80, 20, 30, 25], 30, (2, 30)),  # then the largest that fits
        ([80, 20, 25, 25], 30, (2, 25)),  # the older of two
        ([80, 20, 225, 99], 30, (2, 30)),  # a long one whose odd part fits fills the row
        ([80, 20, 215, 99], 30, (1, 20)),  # unless a whole one uses more of the room than it must
        ([100, 200, 31], 30, (1, 30)),  # nothing fits: the longest is cut
        ([100, 200, 31], 3, None),  # or the row is padded, if little is lost
        ([100, 200, 31, 2], 3, (3, 2)),
        ([100, 200, 31, 4], 4, (3, 4)),
        ([100, 200, 31, 5], 4, (1, 4)),
    ],
)
def test_choices(lengths, room, choice):
    assert choose(np.array(lengths), room, 100) == choice


def test_one_token_of_room_is_always_padded():
    """It would have no target, and cost the next token its own."""
    assert choose(np.array([5, 6]), 1, 8) is None
    assert choose(np.array([5, 6]), 2, 8) == (1, 2)


def test_what_is_left_goes_to_the_back():
    packer = Packer(pieces_of([7, 3, 12]), 3)
    assert places(packer.row(5)) == [(0, 0, 5)]
    assert [(piece.document, piece.begin, piece.end) for piece in packer.pieces] == [(1, 0, 3), (2, 0, 12), (0, 5, 7)]
    assert places(packer.row(5)) == [(1, 0, 3), (2, 0, 2)]  # 12 is two rows of 5 and these 2
    assert places(packer.row(5)) == [(0, 5, 2), (2, 2, 3)]


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@given(lengths=LENGTHS, sequences=st.lists(st.sampled_from([5, 8, 33, 64]), min_size=1), capacity=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_every_token_once_and_in_order_whatever_the_rows(lengths, sequences, capacity):
    packer = Packer(pieces_of(lengths), capacity)
    delivered = defaultdict(list)
    while row := packer.row(sequences[0]):
        sequence, sequences = sequences[0], sequences[1:] + sequences[:1]
        assert len(packer.pieces) <= capacity
        padding = sequence - sum(map(len, row))
        assert padding >= 0
        assert padding <= max(1, sequence // PADDED_SHARE) or not packer.pieces
        for document, begin, length in places(row):
            assert begin == len(delivered[document])
            delivered[document] += range(begin, begin + length)
        # Only the last is cut; so no document stands beside itself.
        assert all(len(delivered[document]) == lengths[document] for document, _, _ in places(row)[:-1])
    assert delivered == {document: [*range(length)] for document, length in enumerate(lengths)}


@given(lengths=st.lists(st.integers(1, 40), min_size=60, max_size=60), capacity=st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_nothing_waits_longer_than_the_buffer_is_long(lengths, capacity):
    packer = Packer(pieces_of(lengths), capacity)
    waiting = {}
    while packer.row(16):
        now = {
            (piece.document, piece.begin): waiting.get((piece.document, piece.begin), 0) + 1 for piece in packer.pieces
        }
        waiting = now
        assert all(rows <= capacity for rows in waiting.values())


def test_a_document_of_many_rows_is_spread_among_the_others():
    rows = all_rows([1000] + [10] * 90, 10, capacity=10)
    taken = [index for index, row in enumerate(rows) if places(row)[0][0] == 0]
    assert taken[:10] == [*range(0, 100, 10)]


@pytest.mark.parametrize("capacity", [1, 3, 50])
def test_few_documents_do_not_mean_padding(capacity):
    """A packer that chooses among a fixed few leaves most of a long row empty; here more come as some go."""
    generator = np.random.default_rng(4)
    rows = all_rows(generator.integers(5, 60, 3000), 512, capacity)
    assert all(sum(map(len, row)) >= 512 * (1 - 1 / PADDED_SHARE) for row in rows[:-1])
    assert len(rows) > 150


@pytest.mark.parametrize(
    ("sequence", "utilisation", "spared", "concatenated"),
    [(128, 0.999, 0.06, 0.50), (1024, 0.996, 0.08, 0.40), (4096, 0.998, 0.001, 0.20)],
)
def test_rows_are_full_and_few_documents_are_cut_that_would_fit(sequence, utilisation, spared, concatenated):
    """The figures in the docstring of ``pack``, and what cutting one long line of documents would give."""
    lengths = web_lengths()
    rows = all_rows(lengths, sequence, capacity=256)
    assert sum(lengths) / (len(rows) * sequence) > utilisation
    needed = num_needed(lengths, sequence)
    assert (num_cuts(rows, lengths) - needed) / len(lengths) < spared
    assert (sum(lengths) // sequence - needed) / len(lengths) > concatenated


def web_lengths():
    return np.maximum(2, np.random.default_rng(6).lognormal(np.log(600), 1.1, 4000).astype(int)).tolist()


def test_a_packer_goes_on_from_its_pieces():
    lengths = [7, 30, 3, 12, 9, 50, 4, 4, 21]
    first = Packer(pieces_of(lengths), 3)
    first.row(11)
    drawn = 1 + max(piece.document for piece in first.pieces)
    second = Packer(pieces_of(lengths[drawn:], start=drawn), 3)
    second.replace(first.pieces)
    assert len(first.pieces) == 3
    for _ in range(8):
        assert places(first.row(11)) == places(second.row(11))
