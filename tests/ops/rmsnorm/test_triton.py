"""The Triton kernels of RMS normalisation against float64, to the bit over neighbours and runs."""

import pytest
import torch

from dsv4.ops.rmsnorm import portable, reference
from dsv4.ops.rmsnorm import triton as kernels
from dsv4.testing.compare import evaluate
from tests.ops.triton_lane import DEVICE, DTYPES, assert_near, poisoned

EPS = 0.1  # with one channel the gradient is what eps leaves of it
# one channel, tails, more rows than one partial sum, a row wider than what rows share a program with, no rows
SHAPES = [(1, 1), (3, 5), (2, 3, 70), (19, 150), (3, 2100), (0, 5)]


def normalise(x, weight):
    return kernels.rmsnorm(x, weight, EPS)


def check(dtype, x, weight):
    x, weight = x.to(DEVICE, dtype), None if weight is None else weight.to(DEVICE)
    with poisoned():
        found = evaluate(normalise, x=x, weight=weight)
    wide = {"x": x.double(), "weight": None if weight is None else weight.double()}
    wanted = evaluate(lambda x, weight: reference.rmsnorm(x, weight, EPS), **wide)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.numel():
            assert_near(found[name], value, dtype)
        assert found[name].shape == value.shape
    assert found["output 0"].dtype == found["gradient of x"].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_formula(shape, dtype, weighted):
    check(dtype, torch.randn(shape), torch.randn(shape[-1]) if weighted else None)


def test_a_weight_of_another_dtype():
    check(torch.float16, torch.randn(5, 9), torch.randn(9))
    weight = torch.randn(9).half()
    grad = torch.autograd.grad(normalise(torch.randn(5, 9), weight.requires_grad_()).sum(), weight)[0]
    assert grad.dtype == torch.float16


def test_a_row_is_rounded_once():
    x, weight = torch.ones(1, 300, device=DEVICE).half(), 1 + torch.rand(300, device=DEVICE)
    wanted = reference.rmsnorm(x, weight, EPS)
    assert (normalise(x, weight) == wanted).float().mean() > 0.98  # all but what a last bit of the RMS tips


def test_rows_of_very_different_sizes():
    x, weight = torch.randn(20, 33) * torch.logspace(-6, 4, 20)[:, None], torch.randn(33)
    wanted = reference.rmsnorm(x.double(), weight.double(), EPS)
    found = normalise(x.to(DEVICE), weight.to(DEVICE)).cpu()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_non_contiguous_input():
    check(torch.float32, torch.randn(6, 5, 3).transpose(0, 2), torch.randn(12)[::2])


def test_a_gradient_that_is_expanded():
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    y = torch.randn(4, 6, device=DEVICE)
    found = torch.autograd.grad(normalise(x, None).sum(dim=0), x, torch.ones(1, device=DEVICE).expand(6))[0]
    wanted = torch.autograd.grad(portable.rmsnorm(x, None, EPS).sum(), x)[0]
    assert_near(found, wanted, torch.float32)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("D", [13, 64])
def test_a_row_is_the_same_alone(D):
    x, weight = torch.randn(39, D, device=DEVICE), torch.randn(D, device=DEVICE)
    grad = torch.randn_like(x)

    def both(rows):
        leaf = x[rows].clone().requires_grad_()
        y = normalise(leaf, weight)
        return y.detach(), torch.autograd.grad(y, leaf, grad[rows])[0]

    whole = both(slice(None))
    for rows in (slice(0, 1), slice(5, 6), slice(17, 38)):
        for all_rows, some in zip(whole, both(rows), strict=True):
            assert torch.equal(all_rows[rows], some)


def test_two_runs_give_the_same_bits():
    given = {"x": torch.randn(40, 24, device=DEVICE), "weight": torch.randn(24, device=DEVICE)}
    first, second = evaluate(normalise, **given), evaluate(normalise, **given)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_the_kernel_does_not_take_goes_to_the_portable_path(monkeypatch):
    monkeypatch.setattr(kernels._RMSNorm, "apply", lambda *_: pytest.fail("the kernel ran"))
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(normalise(x, None), portable.rmsnorm(x, None, EPS))
    wide = torch.randn(1, kernels.MOST_CHANNELS + 1)
    assert torch.equal(normalise(wide, None), portable.rmsnorm(wide, None, EPS))
