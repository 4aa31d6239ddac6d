"""The balance loss against loops over documents, and what it must be at its ends."""

import pytest
import torch

from dsv4.ops.balance import balance
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, evaluate

BACKENDS = ["reference", "portable"]
# Lengths of the documents, E, A
SIZES = [([1], 1, 1), ([5, 1, 7], 6, 2), ([23], 4, 3), ([1, 1, 1], 5, 5)]


def case(lengths, E, A):
    """Affinities; the choice, documents and token weights, 0 for the whole of some documents."""
    T = sum(lengths)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    weights = torch.rand(T, dtype=torch.float64) * (torch.rand(len(lengths)) < 0.8)[documents]
    chosen = torch.rand(T, E).argsort(dim=-1)[:, :A]
    given = {"chosen": chosen, "documents": documents, "token_weights": weights}
    return torch.rand(T, E, dtype=torch.float64) + 0.05, given


def loop_balance(affinities, chosen):
    """The loss of one document."""
    E, A, n = len(affinities[0]), len(chosen[0]), len(affinities)
    total = 0.0
    for expert in range(E):
        f = E / (A * n) * sum(expert in token for token in chosen)
        p = sum(token[expert] / sum(token) for token in affinities) / n
        total += f * p
    return total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_formula_in_plain_loops(backend, sizes):
    affinities, given = case(*sizes)
    wanted, first = 0.0, 0
    for length in sizes[0]:
        inside = slice(first, first + length)
        loss = loop_balance(affinities[inside].tolist(), given["chosen"][inside].tolist())
        wanted, first = wanted + given["token_weights"][inside].sum().item() * loss, first + length
    assert balance(affinities, **given, backend=backend).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_even_use_costs_1_and_the_worst_costs_experts_over_chosen(backend):
    E, A, T = 6, 2, 9
    documents, weights = torch.zeros(T, dtype=torch.int64), torch.full((T,), 1 / T)
    even = torch.arange(T * A).view(T, A) % E
    assert balance(torch.ones(T, E), even, documents, weights, backend=backend).item() == pytest.approx(1)
    always = torch.tensor([4, 1]).expand(T, A)
    affinities = torch.zeros(T, E).scatter(1, always, 1.0)
    assert balance(affinities, always, documents, weights, backend=backend).item() == pytest.approx(E / A)


@pytest.mark.parametrize("sizes", SIZES)
def test_backends_agree(sizes):
    affinities, given = case(*sizes)
    assert_backends_agree(
        lambda affinities, backend: balance(affinities, **given, backend=backend), affinities=affinities
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES[1:])
def test_gradients_are_those_of_finite_differences(backend, sizes):
    affinities, given = case(*sizes)
    affinities.requires_grad_()
    assert torch.autograd.gradcheck(lambda affinities: balance(affinities, **given, backend=backend), affinities)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_lowers_the_affinity_of_what_is_used_too_much(backend):
    chosen, ones = torch.tensor([[2], [2], [0]]), torch.full((3,), 1 / 3)
    result = evaluate(
        lambda affinities: balance(affinities, chosen, torch.zeros(3).long(), ones, backend=backend),
        affinities=torch.ones(3, 4),
    )
    gradient = result["gradient of affinities"]
    # f = [4/3, 0, 8/3, 0], its mean 1: each token's gradient is (f - 1) / 4 of a third, times the cotangent.
    wanted = torch.tensor([1 / 3, -1, 5 / 3, -1]) / 12
    torch.testing.assert_close(gradient / gradient[0, 0] * wanted[0], wanted.expand(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_row_costs_what_its_documents_cost_apart(backend):
    affinities, given = case([5, 1, 7], 6, 2)
    weights = torch.full((13,), 1 / 13, dtype=torch.float64)
    packed = balance(affinities, given["chosen"], given["documents"], weights, backend=backend)
    parts = [affinities.split([5, 1, 7]), given["chosen"].split([5, 1, 7])]
    apart = [
        balance(a, c, torch.zeros(len(a)).long(), torch.full((len(a),), 1 / len(a)), backend=backend)
        for a, c in zip(*parts, strict=True)
    ]
    assert packed.item() == pytest.approx((5 * apart[0] + apart[1] + 7 * apart[2]).item() / 13, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_costs_nothing_and_learns_nothing(backend):
    affinities, given = case([4, 3], 6, 2)
    given["token_weights"] = torch.tensor([0.25] * 4 + [0.0] * 3)
    alone = {name: value[:4] for name, value in given.items()}
    result = evaluate(lambda affinities: balance(affinities, **given, backend=backend), affinities=affinities)
    assert result["output 0"].item() == pytest.approx(balance(affinities[:4], **alone, backend=backend).item())
    assert result["gradient of affinities"].any(dim=-1).tolist() == [True] * 4 + [False] * 3


def test_two_runs_give_the_same_bits():
    affinities, given = case([50, 31], 16, 4)
    assert_repeatable(lambda affinities: balance(affinities, **given), affinities=affinities.float())


# Errors

GIVEN = {
    "affinities": torch.zeros(5, 4),
    "chosen": torch.zeros(5, 2).long(),
    "documents": torch.zeros(5).long(),
    "token_weights": torch.zeros(5),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"affinities": torch.zeros(5)}, r"affinities has shape \[5\]; expected \[T, E\]"),
        ({"chosen": torch.zeros(6, 2).long()}, r"chosen has shape \[6, 2\]; expected \[T, A\] with T = 5"),
        ({"documents": torch.zeros(4).long()}, r"documents has shape \[4\]; expected \[T\] with T = 5"),
        ({"documents": torch.zeros(5)}, r"documents has dtype torch\.float32; expected torch\.int64"),
        ({"chosen": torch.zeros(5, 2)}, r"chosen has dtype torch\.float32; expected torch\.int64"),
        ({"token_weights": torch.zeros(4)}, r"token_weights has shape \[4\]; expected \[T\] with T = 5"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    with pytest.raises(ValueError, match=message):
        balance(**GIVEN | changed)
