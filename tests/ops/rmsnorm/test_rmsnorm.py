"""RMS normalisation against its formula, and the portable backward against autograd."""

import math

import pytest
import torch

from dsv4.ops.rmsnorm import rmsnorm
from dsv4.testing.compare import assert_backends_agree, assert_close, assert_repeatable, evaluate
from dsv4.testing.memory import saved_elements

EPS = 1e-3  # large enough that its place in the formula shows
SHAPES = [(1, 1), (1, 7), (3, 5), (2, 3, 4, 6), (0, 5), (2, 513)]
BACKENDS = ["reference", "portable"]


def normalise(x, weight, backend):
    return rmsnorm(x, weight, EPS, backend=backend)


def portable(x, weight):
    return rmsnorm(x, weight, EPS)


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1.0, 0.02, 0.0])
def test_formula_in_plain_loops(backend, size):
    x, weight = size * float64(3, 5), float64(5)
    roots = [math.sqrt(sum(v * v for v in row) / 5 + EPS) for row in x.tolist()]
    rows = [[x[i, d].item() / root * weight[d].item() for d in range(5)] for i, root in enumerate(roots)]
    torch.testing.assert_close(normalise(x, weight, backend), torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_weight_the_root_mean_square_is_one(backend):
    y = rmsnorm(float64(4, 9), None, 0.0, backend=backend)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_backends_agree(shape, weighted):
    weight = float64(shape[-1]) if weighted else None
    assert_backends_agree(normalise, x=float64(*shape), weight=weight)


def test_backends_agree_on_non_contiguous_input():
    assert_backends_agree(normalise, x=float64(3, 4, 5).transpose(0, 2), weight=float64(6)[::2])


def test_backends_agree_on_a_single_vector_without_a_weight():
    assert_backends_agree(normalise, x=float64(5), weight=None)


def test_backends_agree_on_a_single_vector():
    assert_backends_agree(normalise, x=float64(5), weight=float64(5))


def test_gradients_are_those_of_finite_differences():
    x, weight = float64(2, 3).requires_grad_(), float64(3).requires_grad_()
    assert torch.autograd.gradcheck(portable, (x, weight))
    assert torch.autograd.gradcheck(lambda x: portable(x, None), (x,))


def test_a_row_of_zeros_stays_zero_with_a_finite_gradient():
    result = evaluate(portable, x=torch.zeros(1, 4), weight=torch.ones(4))
    assert torch.equal(result["output 0"], torch.zeros(1, 4))
    assert result["gradient of x"].isfinite().all()


def test_bfloat16_rounds_once():
    x, weight = torch.randn(7, 96).bfloat16(), torch.randn(96).bfloat16()
    exact = evaluate(portable, x=x.float(), weight=weight.float())
    rounded = evaluate(portable, x=x, weight=weight)
    assert rounded["output 0"].dtype == torch.bfloat16
    # Inside is float32; one rounding to 8 bits moves a number by at most 2^-8 of itself.
    torch.testing.assert_close(rounded["output 0"].float(), exact["output 0"], rtol=2**-7.99, atol=0)
    # The incoming gradient is rounded too, in a sum of 96 terms: measured on the scale of the largest.
    assert_close({k: v.float() for k, v in rounded.items()}, exact, 2**-6)


def test_two_runs_give_the_same_bits():
    assert_repeatable(portable, x=torch.randn(50, 96), weight=torch.randn(96))


def test_backward_keeps_the_input_and_one_number_a_row():
    x, weight = torch.randn(40, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    assert saved_elements(lambda: portable(x, weight)) <= 40 * 64 + 64 + 40


def test_a_weight_of_another_width_is_an_error():
    with pytest.raises(ValueError, match=r"weight has shape \[4\]; expected \[D\] with D = 5 \(from x\)"):
        rmsnorm(torch.zeros(2, 5), torch.zeros(4), EPS)


def test_integers_are_an_error():
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64; expected a floating-point dtype"):
        rmsnorm(torch.zeros(2, 5, dtype=torch.int64), None, EPS)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of reference, portable"):
        rmsnorm(torch.zeros(2, 5), None, EPS, backend="cuda")
