"""The kernel of the transform: the bits of ``portable``, whose sums it does in the same order."""

import pytest
import torch

from dsv4.ops.hadamard import portable, reference, triton
from tests.ops.triton_lane import DEVICE, DTYPES, assert_near, poisoned

SHAPES = [(1,), (3, 2), (5, 4), (2, 3, 16), (33, 128), (2, 512), (8,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_portable(shape, dtype):
    x = (torch.randn(shape) * 10.0 ** torch.randint(-2, 2, shape)).to(DEVICE, dtype)
    with poisoned():
        found = triton.hadamard(x)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert torch.equal(found, portable.hadamard(x))
    assert_near(found, reference.hadamard(x.cpu().double()).to(DEVICE), dtype)


def test_each_channel_alone():
    """Sylvester's order, by which the matrix of each power of two is told from every reordering of it."""
    for width in (2, 8, 32):
        ones = torch.eye(width, device=DEVICE)
        assert torch.equal(triton.hadamard(ones), reference.matrix(width).to(DEVICE) * width**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_transformed_too(dtype):
    x = torch.randn(3, 5, 16).to(DEVICE, dtype).requires_grad_()
    grad = torch.randn(16, 3, 5).to(DEVICE, dtype).permute(1, 2, 0)  # strided
    (found,) = torch.autograd.grad(triton.hadamard(x), x, grad)
    (wanted,) = torch.autograd.grad(portable.hadamard(x), x, grad)
    assert found.dtype == dtype
    assert_near(found, wanted, dtype)


def test_second_derivatives():
    x = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad((triton.hadamard(x) ** 2).sum() / 2, x, create_graph=True)
    assert_near(first.detach(), x.detach(), torch.float32)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_near(second, torch.ones_like(x), torch.float32)


def test_strided_input_and_no_rows():
    x = torch.randn(16, 3, 5, device=DEVICE).permute(2, 1, 0)[::2]
    assert torch.equal(triton.hadamard(x), portable.hadamard(x.contiguous()))
    assert triton.hadamard(torch.zeros(0, 3, 8, device=DEVICE)).shape == (0, 3, 8)


def test_a_row_has_the_same_bits_whatever_stands_beside_it():
    x = torch.randn(70, 128, device=DEVICE)
    whole = triton.hadamard(x)
    assert torch.equal(whole, triton.hadamard(x))
    for row in (0, 31, 32, 69):
        assert torch.equal(whole[row], triton.hadamard(x[row]))


def test_float64_is_what_portable_makes_of_it():
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    assert torch.equal(triton.hadamard(x), portable.hadamard(x))
