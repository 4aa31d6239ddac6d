"""Linear maps against plain loops, and torch's products against the specification."""

import pytest
import torch

from dsv4.ops.linear import linear, linear_groups, linears
from dsv4.testing.compare import assert_backends_agree, evaluate

BACKENDS = ["reference", "portable"]


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def product(matrix, vector):
    return [sum(w * v for w, v in zip(row, vector, strict=True)) for row in matrix]


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_plain_loops(backend):
    x, weight = float64(4, 5), float64(3, 5)
    wanted = torch.tensor([product(weight.tolist(), row) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(linear(x, weight, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_in_plain_loops(backend):
    x, weight = float64(4, 2, 5), float64(2, 3, 5)
    rows = [
        [y for group, channels in zip(weight, row, strict=True) for y in product(group.tolist(), channels.tolist())]
        for row in x
    ]
    wanted = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(linear_groups(x, weight, backend=backend), wanted)


@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("wide", [False, True])
def test_backends_agree(shape, wide):
    def run(x, weight, backend):
        return linear(x, weight, wide=wide, backend=backend)

    assert_backends_agree(run, x=float64(*shape), weight=float64(4, 5))


def test_backends_agree_on_several_maps():
    def run(x, one, other, backend):
        return linears(x, [one, other], wide=[True, False], backend=backend)

    assert_backends_agree(run, x=float64(2, 3, 5), one=float64(4, 5), other=float64(1, 5))


def test_backends_agree_on_groups():
    assert_backends_agree(linear_groups, x=float64(6, 2, 5), weight=float64(2, 3, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weight_is_cast_to_x_unless_the_map_is_wide(backend):
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(5, 64)
    narrow, wide = linears(x, [weight] * 2, wide=[False, True], backend=backend)
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    exact = x.double() @ weight.double().T
    rounded = x.double() @ weight.bfloat16().double().T
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-5 * 64)
    torch.testing.assert_close(narrow.double(), rounded, rtol=2**-8, atol=1e-5 * 64)


def test_gradients_of_a_wide_map_have_the_dtypes_of_its_inputs():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(5, 8)
    result = evaluate(lambda x, weight: linear(x, weight, wide=True), x=x, weight=weight)
    assert result["output 0"].dtype == torch.float32
    assert result["gradient of x"].dtype == torch.bfloat16
    assert result["gradient of weight"].dtype == torch.float32


# Errors

X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (X, torch.zeros(3, 5), r"weight has shape \[3, 5\]; expected \[N, K\] with K = 4 \(from x\)"),
        (X, torch.zeros(4), r"weight has shape \[4\]; expected \[N, K\]"),
        (X[0, 0], torch.zeros(3, 4), r"x has shape \[\]; expected \[\.\.\., K\]"),
    ],
)
def test_what_does_not_fit_is_an_error(x, weight, message):
    with pytest.raises(ValueError, match=message):
        linear(x, weight)


def test_groups_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"weight has shape \[3, 5, 4\]; expected \[G, N, K\] with .*G = 2 \(from x\)"):
        linear_groups(torch.zeros(6, 2, 4), torch.zeros(3, 5, 4))


def test_each_map_needs_to_be_wide_or_not():
    with pytest.raises(ValueError, match="wide has 1 values; expected one for each of 2 weights"):
        linears(X, [torch.zeros(3, 4)] * 2, wide=[True])


def test_an_unknown_backend_is_an_error():
    for run in (lambda: linear(X, X, backend="cuda"), lambda: linears(X, [X], wide=[True], backend="cuda")):
        with pytest.raises(ValueError, match="backend is 'cuda'; expected one of reference, portable"):
            run()
