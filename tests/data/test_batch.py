"""Rows of pieces become tensors in which nothing of one document is a target of another."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.data.batch import Batch, batch_of

EOS = 1
TOKEN_BYTES = np.array([0, 0, 3, 1, 4, 1, 5, 9, 2, 6], dtype=np.int32)


@pytest.fixture
def batch():
    rows = [[np.array([0, 5, 7]), np.array([4]), np.array([8, 1])], [np.array([0, 2, 3, 1], dtype=np.uint16)]]
    return batch_of(rows, 7, padding_token=EOS, token_bytes=TOKEN_BYTES)


def test_rows_as_matrices(batch):
    assert batch.token_ids.tolist() == [[0, 5, 7, 4, 8, 1, 1], [0, 2, 3, 1, 1, 1, 1]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 2, 2, -1], [0, 0, 0, 0, -1, -1, -1]]
    assert batch.targets.tolist() == [[5, 7, -1, -1, 1, -1, -1], [2, 3, 1, -1, -1, -1, -1]]
    assert {tensor.dtype for tensor in (batch.token_ids, batch.segment_ids, batch.targets)} == {torch.int64}


def test_bytes_are_those_of_the_targets(batch):
    assert batch.num_bytes == 1 + 9 + 0 + 3 + 1 + 0  # tokens 5 7, 1, 2 3 1: eos has none, 4 and 8 are no targets


def test_counts(batch):
    assert (batch.num_tokens, batch.num_real, batch.num_targets) == (14, 10, 6)
    assert batch.utilisation == 10 / 14


def test_to_moves_every_tensor(batch):
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert {tensor.device.type for tensor in (moved.token_ids, moved.segment_ids, moved.targets)} == {"meta"}
    assert moved.num_bytes == batch.num_bytes


PIECE = st.lists(st.integers(0, len(TOKEN_BYTES) - 1), min_size=1, max_size=6).map(np.array)


@given(rows=st.lists(st.lists(PIECE, min_size=1, max_size=5), min_size=1, max_size=4), room=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_target_is_the_next_token_of_the_same_piece(rows, room):
    sequence = room + max(sum(len(piece) for piece in pieces) for pieces in rows)
    batch = batch_of(rows, sequence, padding_token=EOS, token_bytes=TOKEN_BYTES)
    for row, pieces in enumerate(rows):
        padding = sequence - sum(len(piece) for piece in pieces)
        assert batch.token_ids[row].tolist() == [*np.concatenate(pieces).tolist(), *[EOS] * padding]
        targets = [target for piece in pieces for target in [*piece[1:].tolist(), -1]]
        assert batch.targets[row].tolist() == targets + [-1] * padding
        changes = (batch.segment_ids[row].diff() != 0).sum().item()
        assert changes == len(pieces) - 1 + (padding > 0)
    assert batch.num_bytes == sum(TOKEN_BYTES[piece[1:]].sum() for pieces in rows for piece in pieces)


def test_what_is_not_to_be_predicted_has_no_target():
    """Asked piece by piece, so that what a piece's tokens say does not reach the next."""

    def is_target(tokens):
        return tokens > tokens[0]

    rows = [[np.array([4, 5, 3, 7]), np.array([8, 9, 2])], [np.array([2, 3])]]
    made = batch_of(rows, 7, padding_token=EOS, token_bytes=TOKEN_BYTES, is_target=is_target)
    assert made.targets.tolist() == [[5, -1, 7, -1, 9, -1, -1], [3, -1, -1, -1, -1, -1, -1]]
    assert made.num_bytes == 1 + 9 + 6 + 1
    plain = batch_of(rows, 7, padding_token=EOS, token_bytes=TOKEN_BYTES)
    assert torch.equal(made.token_ids, plain.token_ids)
    assert torch.equal(made.segment_ids, plain.segment_ids)
