"""Recall: how many of the teacher's best entries the indexer picked, against loops and in plain cases."""

import itertools
import math

import pytest
import torch

from dsv4.ops.attend import Entries
from dsv4.ops.indexer_kl import portable, recall
from dsv4.testing.compare import assert_backends_agree

BACKENDS = ["reference", "portable"]
SMALL_SLICES = [{"SCORES_HELD": 1}, {"SCORES_HELD": 300}]
SCALE = 0.7


def case(B, T, C, P, H, K):
    """Queries and their log-sum-exp, entries by intervals, and P picks among these, ascending, -1 last."""
    begin = torch.randint(0, max(1, C), (B, T))
    end = (begin + torch.randint(0, C + 1, (B, T))).clamp(max=C)
    entry = torch.arange(C)
    order = torch.rand(B, T, C).masked_fill((entry < begin[..., None]) | (entry >= end[..., None]), -1)
    best = order.sort(dim=-1, descending=True)
    picked = best.indices.masked_fill(best.values < 0, C)[..., :P].sort(dim=-1).values
    vectors = {"q": torch.randn(B, T, H, K).double(), "log_sum_exp": torch.randn(B, T, H).double()}
    entries = Entries(torch.randn(B, C, K).double(), begin=begin, end=end)
    return vectors, entries, picked.masked_fill(picked == C, -1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recall_in_plain_loops(backend):
    B, T, C, P, H, K = 2, 9, 8, 3, 3, 4
    vectors, entries, picked = case(B, T, C, P, H, K)

    def mass(b, t, c):
        total, value = 0.0, entries.values[b, c].tolist()
        for query, log_total in zip(vectors["q"][b, t].tolist(), vectors["log_sum_exp"][b, t].tolist(), strict=True):
            total += math.exp(SCALE * sum(x * y for x, y in zip(query, value, strict=True)) - log_total)
        return total

    wanted = []
    for b, t in itertools.product(range(B), range(T)):
        visible = range(int(entries.begin[b, t]), int(entries.end[b, t]))
        best = sorted(visible, key=lambda c, b=b, t=t: -mass(b, t, c))[:P]
        held = len(set(best) & set(picked[b, t].tolist())) / P
        wanted.append(held if len(visible) > P else math.nan)
    shares = recall(**vectors, entries=entries, picked=picked, scale=SCALE, backend=backend)
    assert shares.flatten().tolist() == pytest.approx(wanted, nan_ok=True)
    known = [one for one in wanted if not math.isnan(one)]
    assert 1 < len(known) < B * T
    assert len(set(known)) > 1


@pytest.mark.parametrize("held", [{}, *SMALL_SLICES])
@pytest.mark.parametrize("sizes", [(2, 30, 17, 4), (1, 1, 6, 2), (3, 5, 9, 1), (2, 3, 0, 0), (2, 0, 6, 3)])
def test_backends_agree(monkeypatch, held, sizes):
    for name, value in held.items():
        monkeypatch.setattr(portable, name, value)
    vectors, entries, picked = case(*sizes, 2, 5)
    assert_backends_agree(
        lambda backend, **given: recall(
            **given, entries=entries, picked=picked, scale=SCALE, backend=backend
        ).nan_to_num(-1.0),
        **vectors,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lost", [0.0, 200.0])
def test_the_best_the_worst_and_half(backend, lost):
    # One head that likes later entries more; with ``lost`` no mass is a float32 other than 0.
    end = torch.tensor([[2, 6, 6, 6]])  # the first query has nothing to choose
    entries = Entries(torch.arange(6.0).view(1, 6, 1), begin=torch.zeros_like(end), end=end)
    picked = torch.tensor([[[0, 1], [4, 5], [0, 1], [1, 5]]])
    given = (torch.ones(1, 4, 1, 1), entries, torch.full((1, 4, 1), lost), picked)
    found = recall(*given, scale=1.0, backend=backend)
    assert found[0].tolist() == pytest.approx([math.nan, 1.0, 0.0, 0.5], nan_ok=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_is_to_choose(backend):
    vectors, entries, _ = case(2, 5, 3, 3, 2, 4)
    vectors["q"].requires_grad_()
    picked = torch.arange(3).expand(2, 5, 3)
    shares = recall(**vectors, entries=entries, picked=picked, scale=SCALE, backend=backend)
    assert shares.shape == (2, 5)
    assert shares.isnan().all()
    assert not shares.requires_grad


# Errors

BOUND = torch.zeros(2, 3).long()
ENTRIES = Entries(torch.zeros(2, 6, 5), begin=BOUND, end=BOUND)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(3, 4, 5)}, r"q has shape \[3, 4, 5\]; expected \[B, T, H, K\]"),
        ({"log_sum_exp": torch.zeros(2, 3, 7)}, r"log_sum_exp has shape \[2, 3, 7\]; expected .*H = 4"),
        ({"picked": torch.zeros(2, 4, 2).long()}, r"picked has shape \[2, 4, 2\]; expected \[B, T, P\] with .*T = 3"),
        ({"picked": torch.zeros(2, 3, 2)}, r"picked has dtype torch\.float32; expected torch\.int64"),
        ({"entries": Entries(ENTRIES.values, picked=BOUND[..., None])}, "entries give picked; expected begin and end"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    fitting = {"q": torch.zeros(2, 3, 4, 5), "entries": ENTRIES, "log_sum_exp": torch.zeros(2, 3, 4)}
    with pytest.raises(ValueError, match=message):
        recall(**fitting | {"picked": torch.zeros(2, 3, 2).long(), "scale": 1.0} | changed)
