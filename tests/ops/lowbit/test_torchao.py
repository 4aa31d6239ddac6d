"""Against torchao's microscaling formats, in the mode whose rule is the released one: the scale rounded up.

They differ in one thing: a group of zeros has the least scale there (code 0, 2^-127), and that of the floor here.
"""

import warnings

import pytest
import torch

from dsv4.ops.lowbit import quantise_fp4, quantise_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says which of its kernels this machine has not
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx


@pytest.fixture
def numbers():
    """Rows of sizes from 2^-20 to 2^20, in bfloat16 as activations are, with ties, powers of two, zeros."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(96, 256, generator=draw) * 2.0 ** torch.randint(-20, 21, (96, 1), generator=draw)
    x[1] = 2.0 ** torch.randint(-6, 7, (256,), generator=draw)
    x[2] = torch.randint(-24, 25, (256,), generator=draw) / 4
    x[3, :128] = 0
    return x.bfloat16().float()


def theirs(x, dtype, group, mode):
    scales, codes = to_mx(x, dtype, group, mode)
    return scales.view(torch.uint8).view(len(x), -1), codes.view(torch.uint8).view(len(x), -1)


def test_fp4(numbers):
    scales, codes = theirs(numbers, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)
    packed = quantise_fp4(numbers)
    is_zero = (numbers.unflatten(1, (-1, 32)) == 0).all(dim=2)
    assert is_zero.sum() == 4
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.scales[~is_zero], scales[~is_zero])
    assert (scales[is_zero] == 0).all()
    assert (packed.scales[is_zero] == 1).all()


def test_fp8_in_groups_of_a_row(numbers):
    large = numbers[numbers.abs().amax(dim=1) > 2**-6]  # no group below the floor, which they do not have
    scales, codes = theirs(large, torch.float8_e4m3fn, 128, ScaleCalculationMode.RCEIL)
    found, own_scales = quantise_rows(large)
    is_zero = (large.unflatten(1, (-1, 128)) == 0).all(dim=2)
    assert torch.equal(found, codes)
    assert torch.equal(own_scales[~is_zero], scales[~is_zero])


@pytest.mark.parametrize("mode", ["FLOOR", "CEIL", "EVEN"])
def test_their_other_rules_give_other_scales(numbers, mode):
    scales, _ = theirs(numbers, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[mode])
    assert (quantise_fp4(numbers).scales != scales).float().mean() > 0.1
