"""The SwiGLU kernels against the reference in float64, beside the portable path."""

import pytest
import torch

from dsv4 import native
from dsv4.ops.experts import experts, swiglu
from dsv4.ops.experts.store import Matrices
from dsv4.testing.compare import assert_kernels_agree

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 5, 17), (70, 33)])
@pytest.mark.parametrize("limit", [0.5, 7.0])
def test_swiglu(shape, limit):
    def activation(gate, up, backend):
        return swiglu(gate, up, limit, backend=backend)

    assert_kernels_agree(activation, DTYPES, gate=4 * torch.randn(shape), up=4 * torch.randn(shape))


def test_nothing_passes_beyond_the_limits():
    gate = torch.tensor([-9.0, 2.0, 2.1, 0.3, 0.3, 0.3, 0.3]).requires_grad_()
    up = torch.tensor([0.7, 0.7, 0.7, 2.0, -2.0, 2.1, -2.1]).requires_grad_()
    swiglu(gate, up, 2.0, backend="native").sum().backward()
    assert (gate.grad != 0).tolist() == [True, True, False, True, True, True, True]
    assert (up.grad != 0).tolist() == [True, True, True, True, True, False, False]


def test_what_is_not_a_number_stays_so():
    x = torch.tensor([1.0, torch.nan, 3.0])
    for gate, up in ((x, torch.ones(3)), (torch.ones(3), x)):
        assert swiglu(gate, up, 2.0, backend="native").isnan().tolist() == [False, True, False]


# T, D, F, E, A: a few rows an expert, and whole groups of them
@pytest.mark.parametrize("sizes", [(5, 7, 9, 4, 2), (300, 6, 17, 3, 2)])
def test_experts(sizes):
    T, D, F, E, A = sizes
    chosen = torch.rand(T, E).argsort(dim=1)[:, :A]

    def run(backend, **leaves):
        routed = Matrices((leaves["w1"], leaves["w2"], leaves["w3"]))
        return experts(leaves["x"], chosen, leaves["weights"], routed, 1.5, backend=backend)

    given = {"x": torch.randn(T, D), "weights": torch.rand(T, A)}
    matrices = {"w1": torch.randn(E, F, D), "w2": torch.randn(E, D, F), "w3": torch.randn(E, F, D)}
    assert_kernels_agree(run, DTYPES, **given, **matrices)
