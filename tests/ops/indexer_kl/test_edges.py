"""The indexer's loss at its ends: nothing to see, hardly any mass, weights of 0, coarse numbers."""

import pytest
import torch

from dsv4.ops.attend import Entries
from dsv4.ops.indexer_kl import indexer_kl
from dsv4.testing.compare import evaluate, relative_distance

BACKENDS = ["reference", "portable"]
KINDS = ["interval", "picked"]
SCALE = 0.7


def case(kind, B, T, C, I, J, H, K, dtype=torch.float32):  # noqa: E741
    """What learns; and what teaches, about random picks or intervals of entries."""
    learns = {
        "index_q": torch.randn(B, T, I, J, dtype=dtype),
        "index_k": torch.randn(B, C, J, dtype=dtype),
        "index_weights": torch.randn(B, T, I, dtype=dtype),
    }
    begin = torch.randint(0, C, (B, T))
    seen = {"begin": begin, "end": begin + torch.randint(0, C + 1, (B, T))}
    if kind == "picked":
        picked = torch.rand(B, T, C).argsort(dim=-1)[..., : C // 2]
        seen = {"picked": picked.masked_fill(torch.rand(picked.shape) < 0.3, -1)}
    teaches = {
        "q": torch.randn(B, T, H, K, dtype=dtype),
        "entries": Entries(torch.randn(B, C, K, dtype=dtype), **seen),
        "log_sum_exp": torch.randn(B, T, H, dtype=dtype),
        "query_weights": torch.rand(B, T, dtype=dtype),
    }
    return learns, teaches


def operation(teaches):
    def run(backend="portable", **learns):
        return indexer_kl(**learns, **teaches, scale=SCALE, backend=backend)

    return run


# Nothing to see, and nearly nothing


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_a_query_without_entries_costs_exactly_nothing(backend, kind, size):
    learns, teaches = case(kind, 2, 6, 4, 3, 2, 3, 5)
    bare = torch.tensor([[1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    entries = teaches["entries"]
    if kind == "picked":
        entries = entries._replace(picked=torch.arange(4).expand(2, 6, 4).masked_fill(bare[..., None], -1))
    else:
        begin = torch.randint(0, 5, (2, 6))
        entries = entries._replace(begin=torch.where(bare, begin, 0), end=torch.where(bare, begin, 4))
    teaches |= {"entries": entries, "query_weights": torch.ones(2, 6), "q": size * teaches["q"]}
    result = evaluate(lambda **given: operation(teaches)(**given, backend=backend), **learns)
    assert all(value.isfinite().all() for value in result.values())
    for name in ("output 1", "output 2"):
        assert not result[name][bare].any()
    assert (result["output 1"][~bare] > 0).all()
    for name in ("gradient of index_q", "gradient of index_weights"):
        assert not result[name][bare].any()
        assert result[name][~bare].flatten(1).any(dim=1).all()
    assert result["gradient of index_k"].flatten(1).any(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", [30.0, 200.0, 1e4])
def test_a_tiny_mass_is_as_good_as_any(backend, kind, lost):
    # The window takes all but e^-lost of every head: in float32 exp gives 0 from 104 on.
    learns, teaches = case(kind, 2, 7, 5, 3, 4, 2, 6)
    run = operation(teaches)
    small = operation(teaches | {"log_sum_exp": teaches["log_sum_exp"] + lost})
    usual, tiny = (
        evaluate(lambda op=op, **given: op(**given, backend=backend), **learns) for op in (run, small)
    )  # fmt: skip
    for name, value in usual.items():
        assert relative_distance(tiny[name], value) < 2 * lost * 2**-23 + 1e-5, name  # adding ``lost`` rounds


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_entry_without_any_mass_is_no_trouble(backend):
    learns, teaches = case("interval", 1, 3, 4, 2, 3, 2, 5)
    every = {"begin": torch.zeros(1, 3, dtype=torch.int64), "end": torch.full((1, 3), 4)}
    values = teaches["entries"].values * torch.tensor([1e4, 1.0, -1e4, 1.0])[:, None]
    teaches |= {"entries": Entries(values, **every), "query_weights": torch.ones(1, 3)}
    learns["index_q"] *= 100  # and a student as sure of itself
    result = evaluate(lambda **given: operation(teaches)(**given, backend=backend), **learns)
    assert all(value.isfinite().all() for value in result.values())
    assert (result["output 1"] >= -1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_of_weight_zero_teaches_nothing(kind):
    learns, teaches = case(kind, 1, 3, 4, 2, 3, 2, 5)
    every = (
        {"picked": torch.arange(4).expand(1, 3, 4)}
        if kind == "picked"
        else {"begin": torch.zeros(1, 3).long(), "end": torch.tensor([[1, 2, 3]])}
    )
    teaches |= {"entries": Entries(teaches["entries"].values, **every)}
    teaches["query_weights"] = torch.tensor([[0.0, 0.0, 2.0]])
    result = evaluate(operation(teaches), **learns)
    assert result["gradient of index_q"].flatten(2).any(dim=-1).tolist() == [[False, False, True]]
    assert result["output 1"][0, 1] > 0  # but its divergence is told


# Precision


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_differs_by_the_rounding_of_products(backend, kind):
    learns, teaches = case(kind, 2, 20, 16, 6, 16, 3, 8)
    narrow = {name: value.bfloat16() for name, value in learns.items()}
    entries = teaches["entries"]._replace(values=teaches["entries"].values.bfloat16())
    rounded = operation(teaches | {"q": teaches["q"].bfloat16(), "entries": entries})
    exact = operation(
        teaches | {"q": teaches["q"].bfloat16().float(), "entries": entries._replace(values=entries.values.float())}
    )
    got = evaluate(lambda **given: rounded(**given, backend=backend), **narrow)
    wanted = evaluate(
        lambda **given: exact(**given, backend="reference"), **{name: value.float() for name, value in narrow.items()}
    )
    for name in ("output 0", "output 1", "output 2"):
        assert got[name].dtype == torch.float32
        assert relative_distance(got[name], wanted[name]) < 2**-8, name
    # Scores reach 30, where rounded products add up to an error of 0.1 and more: it moves the student.
    for name in narrow:
        assert got[f"gradient of {name}"].dtype == torch.bfloat16
        assert relative_distance(got[f"gradient of {name}"], wanted[f"gradient of {name}"]) < 0.03, name


def test_bfloat16_products_are_rounded_as_in_the_choice():
    # 1 + 2^-8 is no bfloat16: it becomes 1, and both entries score the same.
    index_q, index_k = torch.ones(1, 1, 1, 2).bfloat16(), torch.tensor([[[1.0, 2**-8], [1.0, 0.0]]]).bfloat16()
    weight, entries = (
        torch.full((1, 1, 1), 100.0).bfloat16(),
        Entries(torch.zeros(1, 2, 3), begin=torch.tensor([[0]]), end=torch.tensor([[2]])),
    )
    given = (torch.zeros(1, 1, 2, 3), entries, torch.zeros(1, 1, 2), torch.ones(1, 1))
    for backend in BACKENDS:
        _, kl, _ = indexer_kl(index_q, index_k, weight, *given, scale=1.0, backend=backend)
        assert kl.item() == pytest.approx(0, abs=1e-6)
        _, kl, _ = indexer_kl(
            index_q.float(), index_k.float(), weight.float(), *given, scale=1.0, backend=backend
        )  # fmt: skip
        assert kl.item() > 0.01
