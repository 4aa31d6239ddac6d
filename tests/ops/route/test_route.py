"""Affinities, choices and weights of experts against their formulas."""

import math

import pytest
import torch

from dsv4.ops.route import affinity, choose, weigh
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, evaluate

BACKENDS = ["reference", "portable"]
SCALE = 2.5


def root_of_softplus(x):
    return math.sqrt(x if x > 20 else math.log1p(math.exp(x)))


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_affinity_in_plain_loops(backend):
    logits = 8 * float64(3, 7)
    wanted = [[root_of_softplus(x) for x in row] for row in logits.tolist()]
    torch.testing.assert_close(affinity(logits, backend=backend), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_softplus_is_the_identity_strictly_above_twenty(backend):
    logits = torch.tensor([20.0, 20.0625, 25.0], dtype=torch.float64)
    at_twenty = math.sqrt(math.log1p(math.exp(20.0)))  # 20 + 2e-9, to 1e-9 of it below
    wanted = torch.tensor([at_twenty, math.sqrt(20.0625), 5.0], dtype=torch.float64)
    torch.testing.assert_close(affinity(logits, backend=backend), wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_affinities_keep_the_order_of_logits_and_stay_finite(backend):
    scores = affinity(torch.linspace(-80, 300, 96), backend=backend)
    assert scores.isfinite().all()
    assert (scores.diff() > 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (0, 3)])
def test_backends_agree(shape):
    assert_backends_agree(affinity, logits=12 * float64(*shape))


def test_affinity_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(affinity, (4 * float64(3, 5).requires_grad_(),))


def test_two_runs_give_the_same_bits():
    assert_repeatable(affinity, logits=torch.randn(50, 16))


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_logits_far_below_zero_have_finite_weights_and_gradients(backend):
    logits = torch.tensor([[-200.0, -120.0, -90.0]], requires_grad=True)
    weights = weigh(affinity(logits, backend=backend), torch.tensor([[0, 1]]), 1.5)
    (weights * torch.tensor([1.0, 2.0])).sum().backward()
    assert weights.tolist() == [[0.75, 0.75]]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_more_experts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="experts_per_token is 4; expected at most the 3 experts"):
        choose(torch.rand(2, 3), torch.zeros(3), 4)


def test_the_largest_of_affinity_plus_bias_are_chosen():
    scores, bias = float64(6, 9).abs(), float64(9)
    for t, chosen in enumerate(choose(scores, bias, 4).tolist()):
        biased = [scores[t, e].item() + bias[e].item() for e in range(9)]
        assert sorted(chosen) == sorted(sorted(range(9), key=lambda e: -biased[e])[:4])


def test_the_bias_moves_the_choice_and_never_the_weight():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    moved = choose(scores, torch.tensor([0.0, -10.0, 0.0, 0.0]), 2)
    assert sorted(choose(scores, torch.zeros(4), 2)[0].tolist()) == [0, 1]
    assert moved.tolist() == [[0, 2]]
    assert weigh(scores, moved, 1.5).tolist() == [[1.0, 0.5]]


@pytest.mark.parametrize("experts_per_token", [1, 3, 7])
def test_weights_add_up_to_the_routed_scale(experts_per_token):
    scores = affinity(3 * float64(5, 7))
    weights = weigh(scores, choose(scores, float64(7), experts_per_token), SCALE)
    torch.testing.assert_close(weights.sum(dim=-1), torch.full((5,), SCALE, dtype=torch.float64))


def test_weights_in_plain_loops():
    scores, experts = float64(4, 6).abs(), torch.tensor([[5, 0, 3], [1, 2, 0], [3, 4, 5], [0, 5, 1]])
    for t, chosen in enumerate(experts.tolist()):
        total = sum(scores[t, e].item() for e in chosen)
        wanted = [SCALE * scores[t, e].item() / total for e in chosen]
        assert weigh(scores, experts, SCALE)[t].tolist() == pytest.approx(wanted, rel=1e-14)


def test_weights_follow_the_order_of_the_experts_given():
    scores, experts = float64(4, 6).abs(), torch.stack([torch.randperm(6)[:3] for _ in range(4)])
    torch.testing.assert_close(weigh(scores, experts.flip(-1), SCALE), weigh(scores, experts, SCALE).flip(-1))


def test_weight_gradients_are_those_of_finite_differences():
    experts = torch.tensor([[2, 0], [1, 3]])
    scores = (float64(2, 4).abs() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: weigh(scores, experts, SCALE), (scores,))


def test_no_gradient_passes_through_the_choice():
    result = evaluate(lambda scores, bias: choose(scores, bias, 2), scores=float64(3, 5), bias=float64(5))
    assert list(result) == ["output 0"]
    assert not result["output 0"].requires_grad


def test_a_bias_of_another_length_is_an_error():
    with pytest.raises(ValueError, match=r"bias has shape \[4\]; expected \[E\] with E = 5 \(from affinities\)"):
        choose(torch.zeros(3, 5), torch.zeros(4), 2)


@pytest.mark.parametrize("shape", [(4, 2), (3,)])
def test_experts_of_other_tokens_are_an_error(shape):
    with pytest.raises(ValueError, match=r"experts has shape .*; expected \[T, A\]"):
        weigh(torch.zeros(3, 5), torch.zeros(shape, dtype=torch.int64), SCALE)


def test_affinities_without_tokens_and_experts_are_an_error():
    with pytest.raises(ValueError, match=r"affinities has shape \[5\]; expected \[T, E\]"):
        choose(torch.zeros(5), torch.zeros(5), 2)
    with pytest.raises(ValueError, match=r"affinities has shape \[5\]; expected \[T, E\]"):
        weigh(torch.zeros(5), torch.zeros(5, 2, dtype=torch.int64), SCALE)


def test_experts_are_int64():
    with pytest.raises(ValueError, match=r"experts has dtype torch\.int32; expected torch\.int64"):
        weigh(torch.zeros(3, 5), torch.zeros(3, 2, dtype=torch.int32), SCALE)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend is 'numpy'; expected one of reference, portable"):
        affinity(torch.zeros(3), backend="numpy")
