"""Clamped SwiGLU experts against plain loops, and tokens grouped by expert against one token at a time."""

import math

import pytest
import torch

from dsv4.ops.experts import experts, portable, swiglu
from dsv4.ops.experts.store import Matrices
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, evaluate, relative_distance
from dsv4.testing.memory import saved_elements

BACKENDS = ["reference", "portable"]
LIMIT = 0.6  # of numbers around 1: both clamps bite
# T, A, E, D, F
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 2, 5, 4, 3),
    (7, 3, 6, 5, 4),
    (9, 4, 4, 3, 2),  # every expert of every token
    (100, 2, 3, 4, 5),  # 200 slots over 3 experts: groups filled up to whole rows
    (130, 1, 2, 3, 4),
]


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def case(T, A, E, D, F):
    """Tensors that carry gradients, and each token's distinct experts."""
    given = {"x": float64(T, D), "weights": torch.rand(T, A, dtype=torch.float64)}
    given |= {"w1": float64(E, F, D), "w2": float64(E, D, F), "w3": float64(E, F, D)}
    return given, torch.rand(T, E).argsort(dim=-1)[:, :A]


def operation(chosen, limit=LIMIT):
    def run(x, weights, w1, w2, w3, backend="portable"):
        return experts(x, chosen, weights, Matrices((w1, w2, w3)), limit, backend=backend)

    return run


def activate(gate, up, backend="portable"):
    return swiglu(gate, up, LIMIT, backend=backend)


def loop_swiglu(gate, up, limit):
    g, v = min(gate, limit), max(-limit, min(up, limit))
    return g / (1 + math.exp(-g)) * v


def product(matrix, vector):
    return [sum(w * v for w, v in zip(row, vector, strict=True)) for row in matrix]


def loop_expert(x, weight, w1, w2, w3, limit):
    hidden = [loop_swiglu(g, v, limit) * weight for g, v in zip(product(w1, x), product(w3, x), strict=True)]
    return product(w2, hidden)


# SwiGLU


@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu_in_plain_loops(backend):
    gate, up = float64(4, 5), float64(4, 5)
    pairs = zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)
    wanted = torch.tensor([loop_swiglu(g, v, LIMIT) for g, v in pairs], dtype=torch.float64).view(4, 5)
    torch.testing.assert_close(activate(gate, up, backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("gate", "up", "as_if"),
    [
        (12.0, 3.0, (10.0, 3.0)),
        (-12.0, 3.0, (-12.0, 3.0)),  # the gate has no lower limit
        (2.0, 12.0, (2.0, 10.0)),
        (2.0, -12.0, (2.0, -10.0)),
        (9.9, -9.9, (9.9, -9.9)),
    ],
)
def test_the_gate_is_cut_above_and_the_linear_part_on_both_sides(backend, gate, up, as_if):
    got = swiglu(torch.tensor([gate]), torch.tensor([up]), 10.0, backend=backend)
    g, v = as_if
    assert got.item() == pytest.approx(g / (1 + math.exp(-g)) * v, rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_exactly_at_a_limit_the_gradient_still_passes(backend):
    gate, up = torch.tensor([10.0, 1.0, 1.0], requires_grad=True), torch.tensor([1.0, 10.0, -10.0], requires_grad=True)
    swiglu(gate, up, 10.0, backend=backend).sum().backward()
    assert gate.grad is not None
    assert up.grad is not None
    assert (gate.grad != 0).all()
    assert (up.grad != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_passes_back_through_a_clamp(backend):
    gate, up = torch.tensor([12.0, 2.0, 2.0, -12.0]), torch.tensor([3.0, 12.0, -12.0, 3.0])
    result = evaluate(lambda gate, up: swiglu(gate, up, 10.0, backend=backend), gate=gate, up=up)
    assert (result["gradient of gate"] != 0).tolist() == [False, True, True, True]
    assert (result["gradient of up"] != 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("shape", [(1,), (3, 4), (2, 3, 5), (0, 4)])
def test_swiglu_backends_agree(shape):
    assert_backends_agree(activate, gate=float64(*shape), up=float64(*shape))


def test_swiglu_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(activate, (float64(3, 4).requires_grad_(), float64(3, 4).requires_grad_()))


def test_bfloat16_swiglu_rounds_once():
    gate, up = torch.randn(9, 64).bfloat16(), torch.randn(9, 64).bfloat16()
    rounded = activate(gate, up)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), activate(gate.float(), up.float()), rtol=2**-7.99, atol=1e-6)


# Experts


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_in_plain_loops(backend):
    given, chosen = case(T=5, A=3, E=6, D=4, F=2)
    x, weights, w1, w2, w3 = (value.tolist() for value in given.values())
    wanted = []
    for t, experts_of_t in enumerate(chosen.tolist()):
        parts = [loop_expert(x[t], weights[t][a], w1[e], w2[e], w3[e], LIMIT) for a, e in enumerate(experts_of_t)]
        wanted.append([sum(column) for column in zip(*parts, strict=True)])
    got = operation(chosen)(**given, backend=backend)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("limit", [LIMIT, 1e9])
def test_backends_agree(sizes, limit):
    given, chosen = case(*sizes)
    assert_backends_agree(operation(chosen, limit), **given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_rows(backend):
    given, chosen = case(T=0, A=2, E=5, D=4, F=3)
    assert operation(chosen)(**given, backend=backend).shape == (0, 4)


def test_no_tokens_leave_the_experts_a_gradient_of_zero():
    given, chosen = case(T=0, A=2, E=5, D=4, F=3)
    result = evaluate(operation(chosen), **given)
    assert not any(result[f"gradient of {name}"].any() for name in given)


@pytest.mark.parametrize("T", [3, 200])
def test_backends_agree_when_most_experts_have_no_tokens(T):
    given, _ = case(T, A=2, E=5, D=4, F=3)
    chosen = torch.tensor([[3, 1]]).expand(T, 2)
    assert_backends_agree(operation(chosen), **given)


@pytest.mark.parametrize("rows", [1, 2, 5, 1000])
def test_filling_groups_up_changes_nothing(monkeypatch, rows):
    monkeypatch.setattr(portable, "ROWS", rows)
    given, chosen = case(T=31, A=2, E=4, D=5, F=3)
    assert_backends_agree(operation(chosen), **given)


def test_backends_agree_on_non_contiguous_input():
    given, chosen = case(T=8, A=2, E=5, D=4, F=3)
    given |= {"x": float64(4, 8).T, "w1": float64(5, 4, 3).mT, "w2": float64(5, 3, 4).mT, "weights": float64(2, 8).T}
    assert_backends_agree(operation(chosen.T.contiguous().T), **given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_a_tokens_experts_does_not_matter(backend):
    given, chosen = case(T=12, A=3, E=6, D=4, F=2)
    turned = given | {"weights": given["weights"].flip(-1)}
    one, other = (
        operation(ids)(**vectors, backend=backend) for ids, vectors in ((chosen, given), (chosen.flip(-1), turned))
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_tokens_does_not_matter(backend):
    given, chosen = case(T=12, A=3, E=6, D=4, F=2)
    order = torch.randperm(12)
    moved = given | {name: given[name][order] for name in ("x", "weights")}
    torch.testing.assert_close(
        operation(chosen[order])(**moved, backend=backend), operation(chosen)(**given, backend=backend)[order]
    )


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    given, _ = case(T=4, A=1, E=3, D=4, F=2)
    result = evaluate(operation(torch.full((4, 1), 1)), **given)
    for name in ("w1", "w2", "w3"):
        touched = result[f"gradient of {name}"].flatten(1).any(dim=-1)
        assert touched.tolist() == [False, True, False]


def test_gradients_are_those_of_finite_differences():
    given, chosen = case(T=3, A=2, E=3, D=2, F=2)
    leaves = [value.requires_grad_() for value in given.values()]
    assert torch.autograd.gradcheck(operation(chosen), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_cast_to_the_tokens_and_the_sum_is_float32(backend):
    given, chosen = case(T=6, A=2, E=4, D=8, F=5)
    given = {name: value.float() for name, value in given.items()}
    given["x"] = given["x"].bfloat16()
    result = evaluate(lambda **given: operation(chosen)(**given, backend=backend), **given)
    assert result["output 0"].dtype == torch.float32
    assert all(result[f"gradient of {name}"].dtype == value.dtype for name, value in given.items())


@pytest.mark.parametrize("T", [9, 150])
def test_bfloat16_is_close_to_float32_on_the_same_numbers(T):
    given, chosen = case(T, A=2, E=4, D=32, F=24)
    # Small weights, so that few numbers lie where a rounding moves them across a clamp.
    narrow = {name: (value / 6 if name[0] == "w" else value).bfloat16() for name, value in given.items()}
    narrow["weights"] = narrow["weights"].float()
    run = operation(chosen, limit=5.0)
    rounded, exact = evaluate(run, **narrow), evaluate(run, **{name: value.float() for name, value in narrow.items()})
    # Gate, linear part, hidden and output are rounded to 8 bits in turn, 2^-8 at most and independent: 2 * 2^-8
    # in the norm; backward as many again.
    assert relative_distance(rounded["output 0"], exact["output 0"]) < 2 * 2**-8
    for name in narrow:
        assert relative_distance(rounded[f"gradient of {name}"], exact[f"gradient of {name}"]) < 3 * 2**-8


@pytest.mark.parametrize("T", [9, 300])
def test_two_runs_give_the_same_bits(T):
    given, chosen = case(T, A=2, E=4, D=16, F=8)
    assert_repeatable(operation(chosen), **{name: value.float() for name, value in given.items()})


def test_what_autograd_keeps_is_linear_in_the_slots():
    def keeps(T):
        given, chosen = case(T, A=2, E=4, D=16, F=8)
        weights = sum(given[name].numel() for name in ("w1", "w2", "w3"))
        leaves = {name: value.requires_grad_() for name, value in given.items()}
        return saved_elements(lambda: operation(chosen)(**leaves)) - weights

    filled = 4 * portable.ROWS * 2 * 8  # at most this many rows of gate and linear part are fillers
    assert keeps(600) <= 2 * keeps(300) + filled


# Errors

X, CHOSEN, WEIGHTS, W1, W2 = (
    torch.zeros(3, 4),
    torch.zeros(3, 2).long(),
    torch.zeros(3, 2),
    torch.zeros(6, 5, 4),
    torch.zeros(6, 4, 5),
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X[0]}, r"x has shape \[4\]; expected \[T, D\]"),
        ({"chosen": CHOSEN[:2]}, r"chosen has shape \[2, 2\]; expected \[T, A\] with T = 3 \(from x\)"),
        ({"weights": WEIGHTS[:, :1]}, r"weights has shape \[3, 1\]; expected \[T, A\] with .*A = 2 \(from chosen\)"),
        ({"routed": Matrices((W2, W2, W1))}, r"w1 has shape \[6, 4, 5\]; expected \[E, F, D\] with D = 4"),
        (
            {"routed": Matrices((W1, W2, W1[:5]))},
            r"w3 has shape \[5, 5, 4\]; expected \[E, F, D\] with E = 6 \(from w1\)",
        ),
        (
            {"routed": Matrices((W1, W1, W1))},
            r"w2 has shape \[6, 5, 4\]; expected \[E, D, F\] with .*D = 4 \(from x\), F = 5 \(from w1\)",
        ),
        ({"chosen": CHOSEN.int()}, r"chosen has dtype torch\.int32; expected torch\.int64"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    fitting = {"x": X, "chosen": CHOSEN, "weights": WEIGHTS, "routed": Matrices((W1, W2, W1)), "limit": LIMIT}
    with pytest.raises(ValueError, match=message):
        experts(**fitting | changed)


def test_gate_and_linear_part_of_different_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"up has shape \[4\]; expected that of gate, \[2, 4\]"):
        swiglu(torch.zeros(2, 4), torch.zeros(4), LIMIT)


def test_an_unknown_backend_of_swiglu_is_an_error():
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of reference, portable"):
        activate(torch.zeros(2), torch.zeros(2), backend="cuda")
