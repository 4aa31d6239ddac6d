"""The sliced divergence against plain loops, and its memory."""

import math

import pytest
import torch

from dsv4.ops.vocabulary_kl import portable, vocabulary_kl
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, evaluate, relative_distance
from dsv4.testing.memory import largest_tensor, saved_elements

BACKENDS = ["reference", "portable"]
# T, V, D, E; the last takes more than one portable slice, and the second of these is not full
SIZES = [(1, 1, 1, 2), (5, 7, 3, 4), (3, 40, 2, 1), (0, 7, 3, 5), (11, 6, 5, 5), (300, 9001, 2, 3)]
SMALL_SLICES = [{"LOGITS_HELD": 1, "FEWEST_TOKENS": 1}, {"LOGITS_HELD": 240, "FEWEST_TOKENS": 2}]


def case(T, V, D, E, dtype=torch.float64):
    """The student's vectors, the teacher's, and token weights, some of them 0."""
    vectors = {"hidden": torch.randn(T, D, dtype=dtype), "weight": torch.randn(V, D, dtype=dtype)}
    teacher = {"teacher_hidden": torch.randn(T, E, dtype=dtype), "teacher_weight": torch.randn(V, E, dtype=dtype)}
    token_weights = torch.rand(T, dtype=torch.float64) * (torch.arange(T) % 4 != 2)
    return vectors, {**teacher, "token_weights": token_weights.to(torch.promote_types(dtype, torch.float32))}


def operation(given):
    def run(hidden, weight, backend="portable"):
        return vocabulary_kl(hidden, weight, **given, backend=backend)

    return run


def likelihoods(hidden, weight):
    """Of one token, by loops."""
    exponentials = [math.exp(sum(h * w for h, w in zip(hidden, row, strict=True))) for row in weight]
    return [one / sum(exponentials) for one in exponentials]


@pytest.mark.parametrize("backend", BACKENDS)
def test_formulas_in_plain_loops(backend):
    """Values, and the gradient of the logits, p (log p - log q - kl), gathered by hand."""
    vectors, given = case(5, 7, 3, 4)
    lists = {name: value.tolist() for name, value in (vectors | given).items()}
    wanted, grad_hidden = [], []
    grad_weight = [[0.0] * 3 for _ in range(7)]
    for token, taught, factor in zip(lists["hidden"], lists["teacher_hidden"], lists["token_weights"], strict=True):
        p, q = likelihoods(token, lists["weight"]), likelihoods(taught, lists["teacher_weight"])
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        logits = [factor * a * (math.log(a) - math.log(b) - kl) for a, b in zip(p, q, strict=True)]
        wanted.append(kl)
        grad_hidden.append([sum(g * row[d] for g, row in zip(logits, lists["weight"], strict=True)) for d in range(3)])
        for row, g in zip(grad_weight, logits, strict=True):
            for d in range(3):
                row[d] += g * token[d]
    leaves = [value.requires_grad_() for value in vectors.values()]
    loss, kl = operation(given)(*leaves, backend=backend)
    assert kl.tolist() == pytest.approx(wanted, rel=1e-11)
    weighted = sum(w * one for w, one in zip(lists["token_weights"], wanted, strict=True))
    assert loss.item() == pytest.approx(weighted, rel=1e-11)
    for grad, by_hand in zip(torch.autograd.grad(loss, leaves), (grad_hidden, grad_weight), strict=True):
        torch.testing.assert_close(grad, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(backend):
    vectors, given = case(5, 7, 3, 3, dtype=torch.float32)
    same = {"teacher_hidden": vectors["hidden"], "teacher_weight": vectors["weight"]}
    result = evaluate(lambda **v: operation(given | same)(**v, backend=backend), **vectors)
    assert not result["output 1"].any()
    # autograd of the reference leaves rounding; what is formed by hand is 0.
    largest = max(result[f"gradient of {name}"].abs().max() for name in vectors)
    assert largest == 0 if backend == "portable" else largest < 1e-6


@pytest.mark.parametrize("sizes", SIZES)
def test_backends_agree(sizes):
    vectors, given = case(*sizes)
    assert_backends_agree(operation(given), **vectors)


@pytest.mark.parametrize("held", SMALL_SLICES)
@pytest.mark.parametrize("sizes", SIZES[:5])
def test_backends_agree_in_small_slices(monkeypatch, held, sizes):
    for name, value in held.items():
        monkeypatch.setattr(portable, name, value)
    vectors, given = case(*sizes)
    assert_backends_agree(operation(given), **vectors)


def test_backends_agree_on_non_contiguous_input():
    _, given = case(5, 7, 3, 4)
    given["teacher_hidden"] = given["teacher_hidden"].T.contiguous().T
    vectors = {
        "hidden": torch.randn(3, 5, dtype=torch.float64).T,
        "weight": torch.randn(7, 6, dtype=torch.float64)[:, ::2],
    }
    assert_backends_agree(operation(given), **vectors)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_backends_agree_when_only_one_input_learns(frozen):
    vectors, given = case(5, 7, 3, 4)
    fixed = vectors.pop(frozen)

    def run(backend, **learns):
        return operation(given)(**learns, **{frozen: fixed}, backend=backend)

    assert_backends_agree(run, **vectors)


def test_gradients_are_those_of_finite_differences_and_scale_with_the_loss():
    vectors, given = case(4, 5, 3, 2)
    leaves = [value.requires_grad_() for value in vectors.values()]
    assert torch.autograd.gradcheck(lambda *leaves: 3 * operation(given)(*leaves)[0], leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_learns_nothing_and_divergences_carry_no_gradient(backend):
    vectors, given = case(3, 7, 4, 2)
    leaves = {name: value.requires_grad_() for name, value in (vectors | given).items() if name != "token_weights"}
    loss, kl = vocabulary_kl(**leaves, token_weights=given["token_weights"], backend=backend)
    assert not kl.requires_grad
    loss.backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == ["hidden", "weight"]
    with torch.no_grad():
        still = vocabulary_kl(**leaves, token_weights=given["token_weights"], backend=backend)
    assert not still[0].requires_grad
    assert torch.equal(still[0], loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_likelihood_that_is_0_as_a_number_costs_its_logarithm(backend):
    """A teacher that gives a word e^-2000, and a student that gives it half; then the other way round."""
    hidden, sure, torn = torch.ones(1, 1), torch.tensor([[0.0], [-2000.0]]), torch.zeros(2, 1)
    weights = torch.ones(1)
    result = evaluate(lambda weight: vocabulary_kl(hidden, weight, hidden, sure, weights, backend=backend), weight=torn)
    assert result["output 1"].tolist() == pytest.approx([1000 - math.log(2)])
    assert result["gradient of weight"].isfinite().all()
    assert result["gradient of weight"].abs().max() > 100
    result = evaluate(lambda weight: vocabulary_kl(hidden, weight, hidden, torn, weights, backend=backend), weight=sure)
    assert result["output 1"].tolist() == pytest.approx([math.log(2)])
    assert not result["gradient of weight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_thousands_stay_finite(backend):
    vectors, given = case(5, 7, 3, 4, dtype=torch.float32)
    vectors["hidden"] *= 1e3
    given["teacher_hidden"] *= 1e3
    result = evaluate(lambda **v: operation(given)(**v, backend=backend), **vectors)
    assert all(value.isfinite().all() for value in result.values())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_each_model_has_its_own_dtype_and_logits_are_float32(dtypes):
    vectors, given = case(60, 90, 32, 24, dtype=torch.float32)
    narrow = {name: value.to(dtypes[0]) for name, value in vectors.items()}
    taught = {n: v.to(dtypes[1]) if n.startswith("teacher") else v for n, v in given.items()}
    rounded = evaluate(operation(taught), **narrow)
    wide = {n: v.float() for n, v in taught.items()}
    exact = evaluate(operation(wide), **{n: v.float() for n, v in narrow.items()})
    for name in ("output 0", "output 1"):
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], exact[name], rtol=1e-5, atol=1e-5)
    # The gradient of the logits is rounded to 8 bits, 2^-8 at most, and the result once more.
    for name in ("gradient of hidden", "gradient of weight"):
        assert rounded[name].dtype == dtypes[0]
        assert relative_distance(rounded[name], exact[name]) < 2**0.5 * 2**-8


def test_two_runs_give_the_same_bits():
    vectors, given = case(300, 50, 16, 8, dtype=torch.float32)
    assert_repeatable(operation(given), **vectors)


# Memory


def long_row(T, V, D, E):
    vectors, given = case(T, V, D, E, dtype=torch.float32)
    leaves = {name: value.requires_grad_() for name, value in vectors.items()}
    return lambda: operation(given)(**leaves)[0]


def test_the_logits_of_all_tokens_never_exist(monkeypatch):
    monkeypatch.setattr(portable, "LOGITS_HELD", 1 << 12)
    monkeypatch.setattr(portable, "FEWEST_TOKENS", 4)
    T, V, D = 512, 512, 8
    assert largest_tensor(long_row(T, V, D, D)) <= T * D < T * V / 8


def test_what_autograd_keeps_is_two_gradients():
    assert saved_elements(long_row(T=600, V=50, D=8, E=4)) <= (600 + 50) * 8


# Errors

FITTING = {
    "hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "teacher_hidden": torch.zeros(3, 5),
    "teacher_weight": torch.zeros(7, 5), "token_weights": torch.zeros(3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 4)}, r"hidden has shape \[1, 3, 4\]; expected \[T, D\]"),
        ({"weight": torch.zeros(4, 7)}, r"weight has shape \[4, 7\]; expected \[V, D\] with D = 4 \(from hidden\)"),
        ({"teacher_hidden": torch.zeros(2, 5)}, r"teacher_hidden has shape \[2, 5\]; expected \[T, E\] with T = 3"),
        ({"teacher_weight": torch.zeros(8, 5)}, r"teacher_weight has shape \[8, 5\]; expected \[V, E\] with V = 7"),
        ({"teacher_weight": torch.zeros(7, 4)}, r"teacher_weight has shape \[7, 4\]; expected \[V, E\] with V = 7"),
        ({"token_weights": torch.zeros(2)}, r"token_weights has shape \[2\]; expected \[T\] with T = 3"),
        ({"backend": "numpy"}, "backend is 'numpy'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    with pytest.raises(ValueError, match=message):
        vocabulary_kl(**FITTING | changed)
