"""Bits per byte against the model's own logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from dsv4.eval.bits import bits_per_byte
from dsv4.testing.toys import flash_like, toy_model, toy_token_ids


@dataclass(frozen=True)
class Rows:
    token_ids: torch.Tensor
    segment_ids: torch.Tensor
    targets: torch.Tensor
    num_bytes: int


def rows(batch_size: int, num_tokens: int, num_bytes: int) -> Rows:
    """Two documents a row and some padding, which have no targets at their ends."""
    token_ids = toy_token_ids(flash_like(), batch_size, num_tokens)
    segment_ids = torch.zeros_like(token_ids)
    segment_ids[:, num_tokens // 3 :] = 1
    segment_ids[:, -5:] = -1
    targets = torch.full_like(token_ids, -1)
    goes_on = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] >= 0)
    targets[:, :-1][goes_on] = token_ids[:, 1:][goes_on]
    return Rows(token_ids, segment_ids, targets, num_bytes)


BATCHES = [rows(2, 90, 171), rows(3, 61, 203)]


@pytest.mark.parametrize("dense", [True, False])
def test_the_loss_is_that_of_the_logits(dense):
    model = toy_model(flash_like())
    nats, count = 0.0, 0
    for batch in BATCHES:
        logits = model(batch.token_ids, segment_ids=batch.segment_ids, dense=dense).logits
        for b, t in (batch.targets >= 0).nonzero().tolist():
            nats -= logits[b, t].double().log_softmax(dim=0)[batch.targets[b, t]].item()
            count += 1
    loss, bits = bits_per_byte(model, iter(BATCHES), dense=dense)
    assert loss == pytest.approx(nats / count, rel=1e-6)  # float32 logits
    assert bits == pytest.approx(nats / math.log(2) / (171 + 203), rel=1e-6)


def test_dense_and_sparse_differ_and_leave_no_gradient():
    model = toy_model(flash_like())
    assert bits_per_byte(model, BATCHES, dense=True) != bits_per_byte(model, BATCHES, dense=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_nothing_to_predict_is_refused():
    empty = Rows(*(torch.zeros(1, 30, dtype=torch.int64),) * 2, torch.full((1, 30), -1), 0)
    with pytest.raises(ValueError, match="batches hold 0 targets of 0 bytes; expected at least one of each"):
        bits_per_byte(toy_model(flash_like()), [empty], dense=True)
