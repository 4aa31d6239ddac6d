"""Scores of picked entries and their gradients by Triton kernels, against the reference in float64."""

import pytest
import torch

from dsv4.ops.index import reference, triton, triton_picked
from tests.ops.index.test_paged import small_integers
from tests.ops.index.test_triton import NARROW, inputs
from tests.ops.triton_lane import DEVICE, DTYPES, assert_near, poisoned


def random_picks(B, T, C, P):
    picks = torch.rand(B, T, C).argsort(dim=-1)[..., :P].sort(dim=-1).values
    return picks.masked_fill(torch.rand(B, T, P) < 0.3, -1).to(DEVICE)


def scored(score, given, picked, grad):
    """Scores, and gradients under that of the scores."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    scores = score(**leaves, picked=picked)
    return {"scores": scores.detach()} | dict(
        zip(leaves, torch.autograd.grad(scores, list(leaves.values()), grad.to(scores.dtype)), strict=True)
    )


def check_score(given, picked):
    """Compare with float64. The factor: a gradient adds the rounding of what is weighed to that of the way out."""
    grad = torch.randn(picked.shape, device=DEVICE)
    with poisoned():
        found = scored(triton.score, given, picked, grad)
    wanted = scored(reference.score, {name: value.double() for name, value in given.items()}, picked, grad)
    assert found["scores"].dtype == torch.float32
    assert (found["scores"] == -torch.inf).equal(picked < 0)
    for name in wanted:
        found[name], wanted[name] = (x.masked_fill(x == -torch.inf, 0) for x in (found[name], wanted[name]))
        if name != "scores":
            assert found[name].dtype == given[name].dtype
        assert_near(found[name], wanted[name], given["q"].dtype, 2.0)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_gradients(dtype):
    check_score(inputs(2, 3, 20, 3, 24, dtype), random_picks(2, 3, 20, 18))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (1, 3, 50, 17, 16, 16), (2, 2, 20, 2, 33, 17)])
def test_scores_of_odd_sizes(sizes):
    *shape, num_picks = sizes
    check_score(inputs(*shape), random_picks(*shape[:3], num_picks))


def test_a_product_of_zero_has_no_gradient():
    check_score(inputs(1, 3, 10, 3, 4, make=small_integers), random_picks(1, 3, 10, 9))


@pytest.mark.parametrize("name", ["wide", "shared"])
def test_scores_of_several_tiles_of_16_bits(name, monkeypatch):
    if name == "shared":
        monkeypatch.setitem(triton_picked.GRADIENT_CONFIGS, "wide", triton_picked.GRADIENT_CONFIGS[name])
    check_score(inputs(1, 2, 150, 2, 16, NARROW), random_picks(1, 2, 150, 140))


@pytest.mark.parametrize("held", [1, 9 * 24 * 2 + 1])
def test_gradients_in_parts(held, monkeypatch):
    monkeypatch.setattr(triton_picked, "PARTS_HELD", held)
    check_score(inputs(2, 3, 10, 3, 24), random_picks(2, 3, 10, 9))


def test_an_entry_that_all_pick_and_those_that_none_picks():
    given = inputs(1, 5, 7, 2, 16)
    picked = torch.tensor([0, 1, 3, -1, 6], device=DEVICE).repeat(1, 5, 1)
    found = check_score(given, picked)
    assert found["k"][:, [2, 4, 5]].count_nonzero() == 0
    assert (found["k"][:, [0, 1, 3, 6]] != 0).any(dim=2).all()


def test_a_gradient_of_nothing_picked_is_not_read():
    given, picked = inputs(1, 2, 9, 2, 16), torch.tensor([[[0, -1, 8], [-1, 2, 3]]], device=DEVICE)
    grad = torch.ones(1, 2, 3, device=DEVICE)
    wanted = scored(triton.score, given, picked, grad)
    found = scored(triton.score, given, picked, grad.masked_fill(picked < 0, torch.nan))
    assert all(found[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize("sizes", [(2, 0, 9, 4), (0, 3, 9, 4), (2, 3, 9, 0), (2, 3, 0, 0)])
def test_scores_of_nothing(sizes):
    B, T, C, P = sizes
    given, picked = inputs(B, T, C, 3, 8), torch.zeros(B, T, P, dtype=torch.int64, device=DEVICE)
    with poisoned():
        found = scored(triton.score, given, picked, torch.zeros(B, T, P, device=DEVICE))
    assert found["scores"].shape == (B, T, P)
    assert all(found[name].shape == given[name].shape and found[name].count_nonzero() == 0 for name in given)


def test_strided_scores():
    given, picked = inputs(2, 2, 9, 3, 8), random_picks(2, 2, 9, 6)
    grad = torch.randn(2, 2, 1, device=DEVICE).expand(2, 2, 6)
    wanted = scored(triton.score, given, picked, grad)
    strided = {name: torch.stack([x, x + 1], dim=-1)[..., 0] for name, x in given.items()}
    strided["q"] = given["q"].transpose(1, 2).contiguous().transpose(1, 2)
    found = scored(triton.score, strided, torch.stack([picked, picked], dim=-1)[..., 0], grad)
    assert all(found[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_a_query_have_the_same_bits(dtype):
    given, picked = inputs(2, 3, 20, 3, 16, dtype), random_picks(2, 3, 20, 18)
    grad = torch.randn(picked.shape, device=DEVICE)
    whole = scored(triton.score, given, picked, grad)
    again = scored(triton.score, given, picked, grad)
    assert all(again[name].equal(whole[name]) for name in whole)
    for row, now in ((0, slice(0, 3)), (1, slice(1, 2))):
        part = {"k": given["k"][row : row + 1]}
        part |= {name: given[name][row : row + 1, now] for name in ("q", "weights")}
        found = scored(triton.score, part, picked[row : row + 1, now], grad[row : row + 1, now])
        for name in ("scores", "q", "weights"):
            assert found[name].equal(whole[name][row : row + 1, now])
    assert (whole["k"][0] != 0).any()
