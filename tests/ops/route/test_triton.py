"""The router's kernels against the portable path, float64, and to the bit over neighbours."""

import pytest
import torch

from dsv4.ops.route import affinity, portable, reference, route
from dsv4.ops.route import triton as kernels
from tests.ops.triton_lane import DEVICE, assert_near, poisoned

SCALE = 1.5


def run(logits, bias=None, chosen=None, num_choices=1):
    return route(logits, bias, chosen, num_choices, SCALE, backend="unproved")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 5, 3), (33, 19, 6), (5, 256, 6), (6, 8, 8), (0, 4, 2)])
def test_as_the_portable_path(sizes):
    T, E, A = sizes
    logits, bias = 8 * torch.randn(T, E, device=DEVICE), torch.randn(E, device=DEVICE)
    with poisoned():
        chosen, weights = run(logits, bias, None, A)
    wanted_chosen, wanted_weights = route(logits, bias, None, A, SCALE)
    assert torch.equal(chosen, wanted_chosen)
    torch.testing.assert_close(weights, wanted_weights, rtol=5e-6, atol=0)  # an exponential's last digits


def test_a_table_gives_the_choice():
    logits = torch.randn(5, 9, device=DEVICE)
    chosen = torch.tensor([[0, 8, 1], [3, 1, 2], [2, 7, 0], [8, 0, 3], [4, 5, 6]], device=DEVICE)
    got, weights = run(logits, None, chosen, 3)
    assert torch.equal(got, chosen)
    torch.testing.assert_close(weights, route(logits, None, chosen, 3, SCALE)[1], rtol=5e-6, atol=0)
    assert torch.equal(weights, run(logits.T.contiguous().T, None, chosen.T.contiguous().T, 3)[1])


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[-1e30, -80.0, 0.0, 20.0, 21.0, 3e38]], device=DEVICE)
    chosen, weights = run(logits, torch.zeros(6, device=DEVICE), None, 6)
    assert chosen.tolist() == [[5, 4, 3, 2, 0, 1]]
    assert weights.isfinite().all()


def test_equal_scores_go_to_the_smaller_expert():
    bias = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], device=DEVICE)
    assert run(torch.zeros(1, 5, device=DEVICE), bias, None, 4)[0].tolist() == [[1, 2, 4, 0]]


def test_scores_below_zero_and_ones_that_are_no_number():
    bias = torch.tensor([-9.0, -torch.inf, torch.nan, -7.0, -8.0], device=DEVICE)
    assert run(torch.zeros(1, 5, device=DEVICE), bias, None, 5)[0].tolist() == [[3, 4, 0, 1, 2]]


def test_a_token_is_the_same_alone():
    logits, bias = torch.randn(23, 17, device=DEVICE), torch.randn(17, device=DEVICE)
    together, again = (run(logits, bias, None, 4) for _ in range(2))
    alone = [run(row[None], bias, None, 4) for row in logits]
    for part in range(2):
        assert torch.equal(together[part], again[part])
        assert torch.equal(torch.cat([one[part] for one in alone]), together[part])


def test_more_choices_than_experts():
    with pytest.raises(ValueError, match="experts_per_token is 4; expected at most the 3 experts"):
        run(torch.zeros(2, 3, device=DEVICE), torch.zeros(3, device=DEVICE), None, 4)


# Affinity

POINTS = [-300.0, -80.1, -80.0, -79.0, -30.0, -16.7, -5.0, -0.5, 0.0, 0.5, 5.0, 16.0, 19.9, 20.0, 20.1, 300.0]


@pytest.mark.parametrize("shape", [(16,), (3, 5), (2, 700), (0, 4)])
def test_affinity_and_its_gradient(shape):
    logits = 10 * torch.randn(shape, device=DEVICE)
    if shape == (16,):
        logits = torch.tensor(POINTS, device=DEVICE)
    grad = torch.randn(shape, device=DEVICE)
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with poisoned():
        out = affinity(leaf, backend="unproved")
        (found,) = torch.autograd.grad(out, leaf, grad)
    wanted = reference.affinity(wide)
    torch.testing.assert_close(out.double(), wanted, rtol=5e-6, atol=0)
    torch.testing.assert_close(found.double(), torch.autograd.grad(wanted, wide, grad.double())[0], rtol=1e-5, atol=0)
    if out.numel():
        assert_near(out.detach(), wanted.detach(), torch.float32)


def test_nothing_passes_back_below_the_lowest_logit():
    logits = torch.tensor([-80.1, -80.0, -79.9], device=DEVICE, requires_grad=True)
    (found,) = torch.autograd.grad(kernels.affinity(logits).sum(), logits)
    assert (found != 0).tolist() == [False, True, True]


def test_strided_logits_and_other_dtypes():
    logits = torch.randn(4, 6, device=DEVICE)
    assert torch.equal(kernels.affinity(logits.T), kernels.affinity(logits).T)
    assert torch.equal(kernels.affinity(logits.double()), portable.affinity(logits.double()))
    chosen, weights = route(logits.double(), logits.double()[0], None, 2, SCALE, backend="unproved")
    assert torch.equal(chosen, route(logits.double(), logits.double()[0], None, 2, SCALE)[0])
    assert weights.dtype == torch.float64
