"""Muon's step: algorithm 1 in float64, torch's own Muon, the size of an update, batching."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4.ops.orthogonalize import HYBRID, orthogonalize
from dsv4.optim import muon
from dsv4.optim.muon import Stack, step_
from dsv4.testing.compare import relative_distance

SETTINGS = {"momentum": 0.9, "weight_decay": 0.2, "update_rms": 0.3, "dtype": torch.float64}
SHAPES = [(1, 4, 7), (3, 4, 7), (2, 7, 4), (5, 4, 7), (1, 6, 6)]  # number, rows, columns


def stacks(shapes, dtype=torch.float64, momentum=torch.randn):
    return [
        Stack(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), momentum(shape, dtype=dtype))
        for shape in shapes
    ]


def copied(given):
    return [Stack(*(tensor.clone() for tensor in stack)) for stack in given]


def algorithm_1(weight, grad, momentum, learning_rate, mu, decay, gamma):
    """One matrix, line by line; returns its new weight and momentum."""
    momentum = mu * momentum + grad
    direction = orthogonalize(mu * momentum + grad, dtype=torch.float64, backend="reference")
    update = direction * max(weight.shape) ** 0.5 * gamma
    return weight * (1 - learning_rate * decay) - learning_rate * update, momentum


def rms(tensor):
    return tensor.double().square().mean().sqrt().item()


def test_three_steps_of_algorithm_1():
    given = stacks(SHAPES)
    wanted = copied(given)
    for step in range(3):
        learning_rate = 0.1 / (step + 1)
        for stack, other in zip(given, wanted, strict=True):
            stack.grad.normal_()
            other.grad.copy_(stack.grad)
        step_(given, learning_rate, **SETTINGS)
        for stack in wanted:
            for i in range(len(stack.weight)):
                weight, momentum = algorithm_1(*(t[i] for t in stack), learning_rate, mu=0.9, decay=0.2, gamma=0.3)
                stack.weight[i], stack.momentum[i] = weight, momentum
    for stack, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(stack.weight, other.weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(stack.momentum, other.momentum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_has_the_rms_asked_for(dtype):
    given = stacks([(1, 128, 256), (3, 96, 48), (2, 64, 64), (1, 12, 512)], dtype=torch.float32)
    before = copied(given)
    step_(given, 1.0, momentum=0.95, weight_decay=0.0, update_rms=0.18, dtype=dtype)
    for stack, old in zip(given, before, strict=True):
        for weight, other in zip(stack.weight, old.weight, strict=True):
            # Singular values from 0.99 to 1.01 in bfloat16, 1.000 to 1.003 in float32.
            assert rms(weight - other) == pytest.approx(0.18, rel=0.01)


def test_weights_without_gradients_decay_and_nothing_else():
    given = stacks(SHAPES, momentum=torch.zeros)
    for stack in given:
        stack.grad.zero_()
    before = copied(given)
    step_(given, 0.5, **SETTINGS)
    for stack, old in zip(given, before, strict=True):
        torch.testing.assert_close(stack.weight, old.weight * (1 - 0.5 * 0.2))
        assert not stack.momentum.any()


def test_gradients_stay():
    given = stacks(SHAPES)
    before = copied(given)
    step_(given, 0.1, **SETTINGS)
    assert all(torch.equal(stack.grad, old.grad) for stack, old in zip(given, before, strict=True))


# torch.optim.Muon. It keeps (1 - momentum) M, a lerp where the report has a sum; orthogonalisation forgets the
# factor. It rounds the gradient to bfloat16 before it takes the norm, where we round the quotient. Its
# "match_rms_adamw" has the report's scale with 0.2 for 0.18. It takes one (a, b, c), five times.

TORCH_SHAPES = [(16, 64), (64, 16), (24, 40), (33, 33), (16, 64)]
QUINTIC = HYBRID[:5]


def run_both(gradients, steps, num_steps=4):
    """Return how far torch's optimiser and ours moved the same matrices."""
    ours = [Stack(torch.zeros(1, *s), torch.empty(1, *s), torch.zeros(1, *s)) for s in TORCH_SHAPES]
    theirs = [torch.nn.Parameter(torch.zeros(shape)) for shape in TORCH_SHAPES]
    optimizer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(num_steps):
        for stack, parameter in zip(ours, theirs, strict=True):
            parameter.grad = gradients(parameter.shape)
            stack.grad[0] = parameter.grad
        optimizer.step()
        step_(ours, 0.02, momentum=0.95, weight_decay=0.1, update_rms=0.2, dtype=torch.bfloat16, steps=steps)
    return [stack.weight[0] for stack in ours], [parameter.detach() for parameter in theirs]


def test_five_steps_are_torchs_muon():
    for ours, theirs in zip(*run_both(torch.randn, QUINTIC), strict=True):
        # Each product rounds to 2^-9, and five steps of slope 3.4 carry early roundings on.
        assert relative_distance(ours, theirs) < 0.03


def test_where_the_conventions_do_not_round_the_bits_are_torchs():
    def signs(shape):
        return (
            torch.randn(shape).sign() if shape in (torch.Size([16, 64]), torch.Size([64, 16])) else torch.zeros(shape)
        )

    # Rows of +-1 with a norm of 32: gradient, momentum, norm and quotient are exact in both conventions.
    for ours, theirs in zip(*run_both(signs, QUINTIC, num_steps=1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_the_reports_ten_steps_are_not_torchs():
    ours, theirs = run_both(torch.randn, HYBRID)
    assert all(relative_distance(one, other) > 0.05 for one, other in zip(ours, theirs, strict=True))


# Batching


class Products(TorchDispatchMode):
    """Counts batched products, and the matrices in them."""

    def __init__(self):
        super().__init__()
        self.calls, self.matrices, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.calls += 1
            self.matrices += args[-1].shape[0]
            self.largest = max(self.largest, args[-1].numel())
        return func(*args, **kwargs or {})


def test_equal_shapes_share_their_products():
    with Products() as products:
        step_(stacks(SHAPES), 0.1, **SETTINGS)
    assert products.calls == 3 * 30  # three shapes, ten steps of three products
    assert products.matrices == 30 * sum(number for number, _, _ in SHAPES)


@pytest.mark.parametrize("held", [1, 28, 60, 100, 250])
def test_slices_are_bounded_and_change_nothing(monkeypatch, held):
    given = stacks(SHAPES)
    wanted = copied(given)
    step_(wanted, 0.1, **SETTINGS)
    monkeypatch.setattr(muon, "ELEMENTS_AT_ONCE", held)
    with Products() as products:
        step_(given, 0.1, **SETTINGS)
    assert products.largest <= max(held, 36)  # a single matrix of 6 x 6 may be larger than a slice
    assert products.matrices == 30 * sum(number for number, _, _ in SHAPES)
    for stack, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(stack.weight, other.weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(stack.momentum, other.momentum, rtol=1e-12, atol=0)


def test_batches_hold_every_matrix_once_in_order(monkeypatch):
    monkeypatch.setattr(muon, "ELEMENTS_AT_ONCE", 60)  # two matrices of 4 x 7
    given = [Stack(*(torch.full((n, 4, 7), float(i)) for _ in range(3))) for i, n in enumerate((1, 3, 5))]
    batches = list(muon._batches(given))
    assert [[len(piece.weight) for piece in batch] for batch in batches] == [[1, 1], [2], [2], [2], [1]]
    seen = Counter(piece.weight[0, 0, 0].item() for batch in batches for piece in batch for _ in piece.weight)
    assert seen == {0.0: 1, 1.0: 3, 2.0: 5}


def test_nothing_to_do():
    step_([], 0.1, **SETTINGS)
