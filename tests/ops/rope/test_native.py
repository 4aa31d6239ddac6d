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
