"""The Walsh-Hadamard transform against its explicit matrix."""

import pytest
import torch

from dsv4.ops.hadamard import hadamard
from dsv4.testing.compare import assert_backends_agree, assert_repeatable

BACKENDS = ["reference", "portable"]
WIDTHS = [1, 2, 4, 16, 128]


def explicit_matrix(width):
    """Entry (i, j) is (-1) to the number of ones that i and j share in binary, over sqrt(width)."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    return torch.tensor(signs, dtype=torch.float64) * width**-0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_channels_written_out(backend):
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])
    expected = torch.tensor([15.0, -5.0, -9.0, 3.0]) / 2
    assert torch.equal(hadamard(x, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_product_with_the_explicit_matrix(backend, width):
    x = torch.randn(3, width, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x, backend=backend), x @ explicit_matrix(width))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_its_own_inverse(backend, width):
    x = torch.randn(2, 3, width, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x, backend=backend), backend=backend), x)


def test_it_cancels_in_a_dot_product():
    q, k = torch.randn(2, 5, 128, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(hadamard(q) @ hadamard(k).T, q @ k.T)


@pytest.mark.parametrize("shape", [(8,), (0, 4), (2, 3, 5, 16)])
def test_backends_agree(shape):
    assert_backends_agree(hadamard, x=torch.randn(shape, dtype=torch.float64))


def test_backends_agree_on_non_contiguous_input():
    assert_backends_agree(hadamard, x=torch.randn(8, 3, 2, dtype=torch.float64).transpose(0, 2))


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(hadamard, (torch.randn(2, 8, dtype=torch.float64, requires_grad=True),))


def test_bfloat16_rounds_once():
    x = torch.randn(9, 128).bfloat16()
    y = hadamard(x)
    assert y.dtype == torch.bfloat16
    # 2^-8 of itself for the rounding; the float32 sums of 128 terms of order 1 are 1e-6 apart.
    torch.testing.assert_close(y.float(), hadamard(x.float()), rtol=2**-7.99, atol=1e-6)


def test_two_runs_give_the_same_bits():
    assert_repeatable(hadamard, x=torch.randn(9, 128))


@pytest.mark.parametrize("width", [0, 3, 6, 96])
def test_a_width_that_is_no_power_of_two_is_an_error(width):
    with pytest.raises(ValueError, match=f"x has {width} channels; expected a power of two"):
        hadamard(torch.zeros(2, width))


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of reference, portable"):
        hadamard(torch.zeros(2, 4), backend="cuda")
