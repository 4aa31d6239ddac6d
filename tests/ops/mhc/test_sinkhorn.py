"""The projection towards doubly stochastic matrices, against plain loops with every eps in its place."""

import math

import pytest
import torch

from dsv4.ops.mhc import sinkhorn
from dsv4.testing.compare import assert_backends_agree

BACKENDS = ["reference", "portable"]
EPS = 1e-3  # large enough that its places in the formula show
ITERATIONS = [1, 3, 20]


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def loop_sinkhorn(logits, eps, iterations):
    """One matrix as a list of rows."""
    n = range(len(logits))
    comb = [[math.exp(z) / sum(map(math.exp, row)) + eps for z in row] for row in logits]
    for round_ in range(iterations):
        if round_:
            comb = [[c / (sum(row) + eps) for c in row] for row in comb]
        totals = [sum(comb[j][k] for j in n) + eps for k in n]
        comb = [[comb[j][k] / totals[k] for k in n] for j in n]
    return comb


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [2, 4])
@pytest.mark.parametrize("iterations", [1, 3, 19, 20])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_sinkhorn_in_plain_loops(backend, N, iterations, eps):
    logits = 4 * float64(6, N, N)
    wanted = torch.tensor([loop_sinkhorn(one, eps, iterations) for one in logits.tolist()], dtype=torch.float64)
    got = sinkhorn(logits, eps=eps, iterations=iterations, backend=backend)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [3, 20])  # after one round the eps beside a small column still shows
def test_columns_end_at_one_and_nothing_is_negative(backend, iterations):
    comb = sinkhorn(4 * torch.randn(500, 4, 4), eps=1e-6, iterations=iterations, backend=backend)
    assert (comb >= 0).all()
    torch.testing.assert_close(comb.sum(dim=-2), torch.ones(500, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_come_closer_to_one_with_every_round(backend):
    logits = 4 * float64(500, 4, 4)
    off = [
        (sinkhorn(logits, eps=1e-6, iterations=n, backend=backend).sum(dim=-1) - 1).abs().mean()
        for n in (1, 3, 20, 200)
    ]
    assert off[0] > 2 * off[1] > 4 * off[2] > 8 * off[3]


@pytest.mark.parametrize("N", [2, 4])
@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
def test_sinkhorn_backends_agree(N, iterations, leading):
    def operation(logits, backend):
        return sinkhorn(logits, eps=EPS, iterations=iterations, backend=backend)

    assert_backends_agree(operation, logits=4 * float64(*leading, N, N))


@pytest.mark.parametrize("iterations", [1, 4])
def test_sinkhorn_gradients_are_those_of_finite_differences(iterations):
    logits = (2 * float64(2, 3, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: sinkhorn(logits, eps=EPS, iterations=iterations), (logits,))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_sinkhorn_of_what_is_no_square_is_an_error(shape):
    with pytest.raises(ValueError, match=r"logits has shape .*; expected \[\.\.\., N, N\]"):
        sinkhorn(torch.zeros(shape), eps=EPS, iterations=2)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend is 'numpy'; expected one of reference, portable"):
        sinkhorn(torch.zeros(4, 4), eps=EPS, iterations=2, backend="numpy")
