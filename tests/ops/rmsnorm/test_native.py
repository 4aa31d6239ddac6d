"""The C kernel of RMS normalisation against float64, to the bit over neighbours and threads."""

import pytest
import torch

from dsv4 import native
from dsv4.ops.rmsnorm import rmsnorm

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")

EPS = 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 70), (0, 5), (9, 513)])
def test_formula(shape, dtype, weight_dtype):
    x = torch.randn(shape).to(dtype)
    weight = None if weight_dtype is None else torch.randn(shape[-1]).to(weight_dtype)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    wanted = wanted if weight is None else wanted * weight.double()
    got = rmsnorm(x, weight, EPS, backend="native")
    assert got.dtype == dtype
    # One rounding to the dtype at the end; a few of float32 before it.
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=1e-30)


def test_a_row_is_the_same_alone():
    x, weight = torch.randn(23, 77).bfloat16(), torch.randn(77)
    together = rmsnorm(x, weight, EPS, backend="native")
    torch.set_num_threads(2)
    assert torch.equal(rmsnorm(x, weight, EPS, backend="native"), together)
    alone = torch.cat([rmsnorm(row[None], weight, EPS, backend="native") for row in x])
    assert torch.equal(alone, together)


def test_non_contiguous_input():
    x, weight = torch.randn(6, 5).T, torch.randn(12)[::2]
    torch.testing.assert_close(rmsnorm(x, weight, EPS, backend="native"), rmsnorm(x, weight, EPS))


def test_gradients_come_from_the_portable_path():
    x = torch.randn(3, 5, requires_grad=True)
    rmsnorm(x, None, EPS, backend="native").sum().backward()
    assert x.grad is not None
