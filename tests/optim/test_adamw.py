"""AdamW's step: plain loops, torch's own, and an epsilon of 1e-20."""

import math

import pytest
import torch

from dsv4.optim.adamw import Moments, step_

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-20, "weight_decay": 0.1}
SHAPES = [(5,), (4, 7), (1,)]


def fresh(shapes, dtype):
    return [(torch.randn(shape, dtype=dtype), *(torch.zeros(shape, dtype=dtype) for _ in range(2))) for shape in shapes]


def moments(tensors, grads, counts):
    return [Moments(w, g, m, v, t) for (w, m, v), g, t in zip(tensors, grads, counts, strict=True)]


def test_steps_in_plain_loops_each_parameter_with_its_own_count():
    tensors = fresh(SHAPES, torch.float64)
    wanted = [[[w, 0.0, 0.0] for w in weight.flatten().tolist()] for weight, _, _ in tensors]
    counts = [0, 0, 0]
    for present in ([0, 1, 2], [1], [0, 1]):
        grads = {i: torch.randn(SHAPES[i], dtype=torch.float64) for i in present}
        for i in present:
            counts[i] += 1
            for element, g in zip(wanted[i], grads[i].flatten().tolist(), strict=True):
                w, m, v = element
                m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g * g
                mean, root = m / (1 - 0.8 ** counts[i]), math.sqrt(v / (1 - 0.7 ** counts[i]))
                element[:] = w * (1 - 0.05 * 0.3) - 0.05 * mean / (root + 0.01), m, v
        given = moments([tensors[i] for i in present], grads.values(), [counts[i] for i in present])
        step_(given, 0.05, betas=(0.8, 0.7), eps=0.01, weight_decay=0.3)
    for state, elements in zip(tensors, wanted, strict=True):
        for tensor, column in zip(state, zip(*elements, strict=True), strict=True):
            torch.testing.assert_close(tensor.flatten(), torch.tensor(column, dtype=torch.float64))


@pytest.mark.parametrize("eps", [1e-20, 1e-8])
def test_torchs_adamw(eps):
    tensors = fresh(SHAPES, torch.float32)
    theirs = [torch.nn.Parameter(weight.clone()) for weight, _, _ in tensors]
    optimizer = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=eps, weight_decay=0.1, foreach=False)
    for count in range(1, 6):
        for parameter in theirs:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        grads = [parameter.grad for parameter in theirs]
        step_(moments(tensors, grads, [count] * 3), 0.01, **SETTINGS | {"eps": eps})
    for (weight, mean, square), parameter in zip(tensors, theirs, strict=True):
        assert torch.equal(weight, parameter)
        assert torch.equal(mean, optimizer.state[parameter]["exp_avg"])
        assert torch.equal(square, optimizer.state[parameter]["exp_avg_sq"])


def test_a_zero_gradient_moves_nothing_but_by_decay():
    (weight, mean, square), = tensors = fresh([(4, 7)], torch.float32)  # fmt: skip
    before = weight.clone()
    step_(moments(tensors, [torch.zeros(4, 7)], [1]), 0.01, **SETTINGS)
    assert torch.tensor(1e-20).item() > 0  # a float32 number: 0 / (0 + eps) is 0
    assert torch.equal(weight, before * (1 - 0.01 * 0.1))
    assert not mean.any()
    assert not square.any()
    step_(moments(tensors, [torch.zeros(4, 7)], [2]), 0.01, **SETTINGS | {"weight_decay": 0.0, "eps": 0.0})
    assert weight.isnan().all()  # without the epsilon it would not be


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-20, 1e-15, 1e-3, 1e10])
def test_an_epsilon_of_1e_20_lets_no_update_explode(size):
    # The first update is learning_rate g / (|g| + eps). Where squares vanish, below 1e-22, only epsilon is left.
    tensors = fresh([(50,)], torch.float32)
    tensors[0][0].zero_()
    step_(moments(tensors, [size * torch.randn(50).sign()], [1]), 0.01, **SETTINGS)
    largest = tensors[0][0].abs().max().item()
    assert largest <= 0.0105
    if size >= 1e-15:
        assert largest == pytest.approx(0.01, rel=1e-4)


def test_gradients_stay_and_nothing_is_nothing():
    grad = torch.randn(5)
    before = grad.clone()
    step_(moments(fresh([(5,)], torch.float32), [grad], [1]), 0.1, **SETTINGS)
    assert torch.equal(grad, before)
    step_([], 0.1, **SETTINGS)
