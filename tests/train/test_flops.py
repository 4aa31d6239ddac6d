"""FLOPs of a step: document by document, by the accounting."""

import random
from dataclasses import replace

import pytest
import torch

from dsv4.accounting.cost import total_flops
from dsv4.accounting.flops import prefill, training
from dsv4.config.presets import PRESETS
from dsv4.config.recipes import smoke
from dsv4.config.train import Phase
from dsv4.testing.batches import packed_batch, split, work_of
from dsv4.testing.toys import flash_like
from dsv4.train.flops import document_lengths, step_flops

V = 101
DENSE = Phase(name="dense", tokens=10**6, sequence=2, attention="dense")
WARM_UP = replace(DENSE, name="warm-up", train="indexer")
SPARSE = replace(DENSE, name="sparse", attention="sparse")


def plan_of(phase, batches):
    return work_of(phase, batches).plan


def runs_by_loops(rows):
    lengths = []
    for row in rows:
        start = 0
        for t in range(1, len(row) + 1):
            if t == len(row) or row[t] != row[start]:
                lengths.append(t - start)
                start = t
    return lengths


@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (1, 9), (2, 31), (5, 17)])
def test_lengths_are_the_runs_of_each_row(B, T):
    draw = random.Random(B * 100 + T)
    rows = [[draw.choice([0, 0, 0, 1, -1]) for _ in range(T)] for _ in range(B)]
    assert document_lengths(torch.tensor(rows)) == runs_by_loops(rows)


def test_a_run_ends_with_its_row():
    assert document_lengths(torch.tensor([[4, 4, 4], [4, 4, 5]])) == [3, 2, 1]


@pytest.mark.parametrize("length", [2, 37, 300])
@pytest.mark.parametrize("config", [flash_like(), PRESETS["nano"]()], ids=["toy", "nano"])
def test_a_row_of_one_document_costs_what_the_accounting_says(config, length):
    batches = [packed_batch(V, [[length]], length)]
    for phase, wanted in ((DENSE, training), (SPARSE, training), (WARM_UP, prefill)):
        assert step_flops(config, batches, plan_of(phase, batches)) == total_flops(wanted(config, length))


@pytest.mark.parametrize("phase", [SPARSE, WARM_UP], ids=lambda phase: phase.name)
def test_documents_add_up_whatever_rows_and_micro_batches_they_are_in(phase):
    config = flash_like()
    lengths = [[5, 37, 1, 3, 25], [50, 4, 17], [71], [2, 69], [5, 29, 37]]
    batch = packed_batch(V, lengths, 71)
    whole = step_flops(config, [batch], plan_of(phase, [batch]))
    parts = split(batch, [1, 3, 1])
    assert step_flops(config, parts, plan_of(phase, parts)) == whole
    apart = [packed_batch(V, [[n]], n) for row in lengths for n in row]
    assert sum(step_flops(config, [one], plan_of(phase, [one])) for one in apart) == whole
    uncut = [packed_batch(V, [[71]] * 5, 71)]
    assert step_flops(config, uncut, plan_of(phase, uncut)) > whole  # a document sees more of itself than its parts


def test_padding_counts_as_a_document():
    config = flash_like()
    padded, whole = packed_batch(V, [[40, 6]], 71), packed_batch(V, [[40, 6, 25]], 71)
    assert step_flops(config, [padded], plan_of(SPARSE, [padded])) == step_flops(
        config, [whole], plan_of(SPARSE, [whole])
    )


def test_the_smoke_recipe_is_mostly_three_forwards():
    """Forward and backward of the main model and its MTP block: between three and five prompts of the same tokens."""
    config, phase = PRESETS[smoke().model](), smoke().phases[-1]
    batches = [packed_batch(V, [[256]], 256)]
    ratio = step_flops(config, batches, plan_of(phase, batches)) / total_flops(prefill(config, 256))
    assert 3 < ratio < 5
