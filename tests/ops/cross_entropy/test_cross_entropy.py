"""The sliced loss against plain loops, and its memory."""

import math

import pytest
import torch

from dsv4.ops.cross_entropy import cross_entropy, portable
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, evaluate, relative_distance
from dsv4.testing.memory import largest_tensor, saved_elements

BACKENDS = ["reference", "portable"]
# T, V, D; the last takes more than one portable slice, and the second of these is not full
SIZES = [(1, 1, 1), (5, 7, 3), (3, 40, 2), (0, 7, 3), (11, 6, 5), (300, 9001, 2)]
SMALL_SLICES = [{"LOGITS_HELD": 1, "FEWEST_TOKENS": 1}, {"LOGITS_HELD": 40, "FEWEST_TOKENS": 3}]


def case(T, V, D, dtype=torch.float64):
    """Vectors that carry gradients; targets and token weights, some of them 0."""
    vectors = {"hidden": torch.randn(T, D, dtype=dtype), "weight": torch.randn(V, D, dtype=dtype)}
    token_weights = torch.rand(T, dtype=torch.float64) * (torch.rand(T) < 0.8)
    return vectors, torch.randint(0, V, (T,)), token_weights.to(torch.promote_types(dtype, torch.float32))


def operation(targets, token_weights):
    def run(hidden, weight, backend="portable"):
        return cross_entropy(hidden, weight, targets, token_weights, backend=backend)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_in_plain_loops(backend):
    vectors, targets, token_weights = case(5, 7, 3)
    wanted = []
    for token, target in zip(vectors["hidden"].tolist(), targets.tolist(), strict=True):
        logits = [sum(h * w for h, w in zip(token, row, strict=True)) for row in vectors["weight"].tolist()]
        wanted.append(math.log(sum(map(math.exp, logits))) - logits[target])
    loss, nll = operation(targets, token_weights)(**vectors, backend=backend)
    assert nll.tolist() == pytest.approx(wanted, rel=1e-12)
    weighted = sum(w * one for w, one in zip(token_weights.tolist(), wanted, strict=True))
    assert loss.item() == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_cost_the_logarithm_of_the_vocabulary(backend):
    weights = torch.full((4,), 1 / 4)
    loss, nll = cross_entropy(
        torch.zeros(4, 3), torch.randn(9, 3), torch.tensor([0, 8, 3, 5]), weights, backend=backend
    )
    torch.testing.assert_close(nll, torch.full((4,), math.log(9)))
    assert loss.item() == pytest.approx(math.log(9), rel=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_backends_agree(sizes):
    vectors, targets, token_weights = case(*sizes)
    assert_backends_agree(operation(targets, token_weights), **vectors)


@pytest.mark.parametrize("held", SMALL_SLICES)
@pytest.mark.parametrize("sizes", SIZES)
def test_backends_agree_in_small_slices(monkeypatch, held, sizes):
    for name, value in held.items():
        monkeypatch.setattr(portable, name, value)
    vectors, targets, token_weights = case(*sizes)
    assert_backends_agree(operation(targets, token_weights), **vectors)


def test_backends_agree_on_non_contiguous_input():
    _, targets, token_weights = case(5, 7, 3)
    vectors = {
        "hidden": torch.randn(3, 5, dtype=torch.float64).T,
        "weight": torch.randn(7, 6, dtype=torch.float64)[:, ::2],
    }
    assert_backends_agree(operation(targets, token_weights), **vectors)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_backends_agree_when_only_one_input_learns(frozen):
    vectors, targets, token_weights = case(5, 7, 3)
    fixed = vectors.pop(frozen)

    def run(backend, **learns):
        return operation(targets, token_weights)(**learns, **{frozen: fixed}, backend=backend)

    assert_backends_agree(run, **vectors)


def test_nothing_is_learned_and_nothing_kept_without_gradients():
    vectors, targets, token_weights = case(5, 7, 3)
    leaves = {name: value.requires_grad_() for name, value in vectors.items()}
    run = operation(targets, token_weights)
    learning, _ = run(**leaves)
    with torch.no_grad():
        still, _ = run(**leaves)
    assert not still.requires_grad
    assert torch.equal(still, learning.detach())


def test_gradients_are_those_of_finite_differences():
    vectors, targets, token_weights = case(4, 5, 3)
    leaves = [value.requires_grad_() for value in vectors.values()]
    assert torch.autograd.gradcheck(lambda *leaves: operation(targets, token_weights)(*leaves)[0], leaves)


def test_gradients_scale_with_the_gradient_of_the_loss():
    vectors, targets, token_weights = case(5, 7, 3)
    leaves = [value.requires_grad_() for value in vectors.values()]
    once, thrice = (
        torch.autograd.grad(factor * operation(targets, token_weights)(*leaves)[0], leaves) for factor in (1, 3)
    )
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one)


def test_a_token_of_weight_zero_teaches_nothing():
    vectors, targets, _ = case(3, 7, 4)
    result = evaluate(operation(targets, torch.tensor([1.0, 0.0, 1.0]).double()), **vectors)
    assert result["gradient of hidden"].any(dim=-1).tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_likelihoods_carry_no_gradient(backend):
    vectors, targets, token_weights = case(3, 7, 4)
    leaves = {name: value.requires_grad_() for name, value in vectors.items()}
    loss, nll = operation(targets, token_weights)(**leaves, backend=backend)
    assert loss.requires_grad
    assert not nll.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_thousand_stay_finite(backend):
    vectors, targets, token_weights = case(5, 7, 3, dtype=torch.float32)
    run = operation(targets, token_weights)
    result = evaluate(lambda **given: run(**given, backend=backend), **vectors | {"hidden": 1e3 * vectors["hidden"]})
    assert all(value.isfinite().all() for value in result.values())


def test_bfloat16_has_float32_logits():
    vectors, targets, token_weights = case(60, 90, 32, dtype=torch.float32)
    narrow = {name: value.bfloat16() for name, value in vectors.items()}
    run = operation(targets, token_weights)
    rounded, exact = evaluate(run, **narrow), evaluate(run, **{name: value.float() for name, value in narrow.items()})
    for name in ("output 0", "output 1"):
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], exact[name], rtol=1e-5, atol=1e-5)
    # The gradient of the logits is rounded to 8 bits, 2^-8 at most, and the result once more.
    for name in ("gradient of hidden", "gradient of weight"):
        assert rounded[name].dtype == torch.bfloat16
        assert relative_distance(rounded[name], exact[name]) < 2**0.5 * 2**-8


def test_two_runs_give_the_same_bits():
    vectors, targets, token_weights = case(700, 50, 16, dtype=torch.float32)
    assert_repeatable(operation(targets, token_weights), **vectors)


# Memory


def long_row(T, V, D):
    vectors, targets, token_weights = case(T, V, D, dtype=torch.float32)
    leaves = {name: value.requires_grad_() for name, value in vectors.items()}
    return lambda: operation(targets, token_weights)(**leaves)[0]


def test_the_logits_of_all_tokens_never_exist(monkeypatch):
    monkeypatch.setattr(portable, "LOGITS_HELD", 1 << 12)
    monkeypatch.setattr(portable, "FEWEST_TOKENS", 8)
    T, V, D = 2048, 512, 8
    assert largest_tensor(long_row(T, V, D)) <= T * D < T * V / 8


def test_what_autograd_keeps_is_two_gradients():
    assert saved_elements(long_row(T=600, V=50, D=8)) <= (600 + 50) * 8


# Errors

HIDDEN, WEIGHT, TARGETS, TOKEN_WEIGHTS = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3).long(), torch.zeros(3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": HIDDEN[None]}, r"hidden has shape \[1, 3, 4\]; expected \[T, D\]"),
        ({"weight": WEIGHT.T}, r"weight has shape \[4, 7\]; expected \[V, D\] with D = 4 \(from hidden\)"),
        ({"targets": TARGETS[:2]}, r"targets has shape \[2\]; expected \[T\] with T = 3"),
        ({"token_weights": TOKEN_WEIGHTS[:2]}, r"token_weights has shape \[2\]; expected \[T\] with T = 3"),
        ({"targets": TARGETS.int()}, r"targets has dtype torch\.int32; expected torch\.int64"),
        ({"backend": "numpy"}, "backend is 'numpy'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    fitting = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "token_weights": TOKEN_WEIGHTS}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**fitting | changed)
