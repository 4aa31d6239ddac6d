"""The rotation kernels against the reference in float64, beside the portable path."""

import pytest
import torch

from dsv4 import native
from dsv4.ops import rope
from dsv4.testing.compare import assert_kernels_agree

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")
DTYPES = [torch.float32, torch.bfloat16]


def table(B, T, pairs):
    angle = 3 * torch.randn(B, T, pairs)
    return angle.cos(), angle.sin()


# B, T, H, K, R / 2: all channels, some of them, one pair, whole and broken vectors
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 2, 1), (2, 5, 3, 16, 8), (1, 9, 4, 37, 7), (2, 3, 5, 40, 4), (1, 0, 2, 8, 2)]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_rotate(sizes, inverse):
    B, T, H, K, pairs = sizes
    cos, sin = table(B, T, pairs)

    def turn(x, backend):
        wide = torch.promote_types(x.dtype, torch.float32)
        return rope.rotate(x, cos.to(wide), sin.to(wide), inverse=inverse, backend=backend)

    assert_kernels_agree(turn, DTYPES, x=torch.randn(B, T, H, K))
    assert_kernels_agree(turn, DTYPES, x=torch.randn(B, T, K))


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 2, 1), (2, 5, 3, 16, 8), (1, 9, 4, 37, 7), (2, 3, 5, 40, 4), (1, 0, 2, 8, 2)]
)
def test_rotate_unit(sizes):
    B, T, H, K, pairs = sizes
    cos, sin = table(B, T, pairs)

    def turn(x, backend):
        wide = torch.promote_types(x.dtype, torch.float32)
        return rope.rotate_unit(x, cos.to(wide), sin.to(wide), 1e-2, backend=backend)

    assert_kernels_agree(turn, DTYPES, x=torch.randn(B, T, H, K))


def test_strided_input():
    x = torch.randn(3, 7, 2, 12).transpose(0, 1)[..., ::2]  # [7, 3, 2, 6]
    cos, sin = table(7, 3, 2)

    def turn(x, backend):
        wide = torch.promote_types(x.dtype, torch.float32)
        return rope.rotate(x, cos.to(wide), sin.to(wide), backend=backend)

    assert_kernels_agree(turn, DTYPES, x=x)


def test_angles_are_those_of_float64_and_the_same_alone():
    frequency = rope.frequencies(14, 10000.0)
    positions = torch.tensor([[0, 1, 7, 1023, 65535, 1048575]])
    cos, sin = rope.angles(positions, frequency, backend="native")
    product = (positions.float()[..., None] * frequency).double()
    torch.testing.assert_close(cos.double(), product.cos(), rtol=0, atol=2**-24)
    torch.testing.assert_close(sin.double(), product.sin(), rtol=0, atol=2**-24)
    for i in range(positions.shape[1]):
        alone = rope.angles(positions[:, i : i + 1], frequency, backend="native")
        assert torch.equal(alone[0][0, 0], cos[0, i])
        assert torch.equal(alone[1][0, 0], sin[0, i])
