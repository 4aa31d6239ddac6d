"""Experts whose inputs are rounded, with a gradient: against the codes they stand for and against loops."""

import pytest
import torch

from dsv4.ops.experts import experts_with_shared, rounded_experts
from dsv4.ops.experts.store import Matrices
from dsv4.ops.lowbit import dequantise, quantise_blocks, quantise_fp4, round_rows

T, A, E, D, F, LIMIT = 11, 2, 5, 160, 96, 1.5


@pytest.fixture
def given():
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(T, D, generator=draw)
    chosen = torch.stack([torch.randperm(E - 1, generator=draw)[:A] for _ in range(T)])  # nobody takes the last one
    weights = torch.rand(T, A, generator=draw)
    shapes = ((E, F, D), (E, D, F), (E, F, D))
    return x, chosen, weights, [torch.randn(shape, generator=draw) / shape[2] ** 0.5 for shape in shapes]


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("quantise", [quantise_fp4, quantise_blocks])
def test_values_are_those_of_the_codes(given, quantise, backend):
    x, chosen, weights, matrices = given
    codes = tuple(quantise(w) for w in matrices)
    values = Matrices(tuple(dequantise(w, torch.float32) for w in codes))
    shared = Matrices.of_codes(*(quantise_blocks(torch.zeros(w.shape[1:])) for w in matrices))  # adds nothing
    found = rounded_experts(x, chosen, weights, values, LIMIT, backend=backend)
    wanted = experts_with_shared(x, chosen, weights, Matrices.of_codes(*codes), shared, LIMIT)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)  # a hidden row near a tie rounds the other way
    assert (found - wanted).abs().mean() < 1e-3


def by_loops(x, chosen, weights, w1, w2, w3):
    """Token by token in float64; rounding is a constant added to what it rounds."""

    def rounded(row):
        return row + (round_rows(row.detach().float()).double() - row.detach())

    rows = []
    for t in range(T):
        total = torch.zeros(D, dtype=torch.float64)
        for expert, weight in zip(chosen[t].tolist(), weights[t], strict=True):
            gate = (w1[expert] @ rounded(x[t])).clamp(max=LIMIT)
            up = (w3[expert] @ rounded(x[t])).clamp(-LIMIT, LIMIT)
            total = total + w2[expert] @ rounded(gate * gate.sigmoid() * up * weight)
        rows.append(total)
    return torch.stack(rows)


def test_gradients_pass_straight_through(given):
    x, chosen, weights, matrices = given
    cotangent = torch.randn(T, D, generator=torch.Generator().manual_seed(6))
    results = []

    def ours(x, chosen, weights, *routed):
        return rounded_experts(x, chosen, weights, Matrices(routed), LIMIT)

    for run, dtype in ((ours, torch.float32), (by_loops, torch.float64)):
        leaves = [v.detach().to(dtype).requires_grad_() for v in (x, weights, *matrices)]
        out = run(leaves[0], chosen, leaves[1], *leaves[2:])
        results.append((out, torch.autograd.grad((out * cotangent.to(dtype)).sum(), leaves)))
    (found, grads), (wanted, exact) = results
    assert (found - wanted).abs().mean() < 1e-3
    for grad, other in zip(grads, exact, strict=True):
        assert (grad - other).norm() < 0.02 * other.norm()
    assert (grads[2][E - 1] == 0).all()
