"""The kernels of the indexer's loss against float64: divergences, gradients, tiles, slices, what a query depends on."""

import pytest
import torch

from dsv4.ops.attend import Entries, attend
from dsv4.ops.indexer_kl import indexer_kl, portable, reference, triton, triton_gradients
from tests.ops.triton_lane import DEVICE, DTYPES, assert_near, poisoned

KINDS = ["interval", "picked"]
# B, T, C, I, J, H, K: tiles of 16 that are full and not, one and several of heads and of entries; one of everything
SIZES = [(2, 5, 7, 3, 4, 2, 6), (1, 4, 37, 17, 20, 18, 33), (1, 1, 1, 1, 1, 1, 1)]
SCALE = 0.7
LEARN = ("index_q", "index_k", "index_weights")


def seen(kind, B, T, C):
    """What queries see, the last of them nothing where there are several."""
    if kind == "picked":
        picked = torch.rand(B, T, C).argsort(dim=-1)[..., : max(1, 2 * C // 3)].sort(dim=-1).values
        picked = picked.masked_fill(torch.rand(picked.shape) < 0.2, -1)
        picked[:, 1:][:, -1:] = -1
        return {"picked": picked}
    begin = torch.randint(0, max(1, C // 2), (B, T)) - (torch.arange(T) % 3 == 2).long() * C  # below 0 now and then
    end = torch.randint(C // 2 + 1, C + 9, (B, T))
    end[:, 1:][:, -1:] = begin[:, 1:][:, -1:]
    return {"begin": begin, "end": end}


def case(kind, B, T, C, I, J, H, K, dtype=torch.float32, which=None):  # noqa: E741
    """All that the operation takes, teachers with a log-sum-exp of attention; queries of magnitudes that differ."""
    sizes = 10.0 ** torch.randint(-1, 2, (B, T, 1, 1))
    which = {name: x.to(DEVICE) for name, x in (which or seen(kind, B, T, C)).items()}
    q, values = (sizes * torch.randn(B, T, H, K)).to(DEVICE, dtype), torch.randn(B, C, K).to(DEVICE, dtype)
    given = {
        "index_q": torch.randn(B, T, I, J).to(DEVICE, dtype),
        "index_k": torch.randn(B, C, J).to(DEVICE, dtype),
        "index_weights": torch.randn(B, T, I).to(DEVICE, dtype),
        "q": q,
        "entries": Entries(values, **which),
    }
    kv, sink = torch.randn(B, T, K, device=DEVICE).double(), torch.randn(H, device=DEVICE)
    begin, doubles = torch.zeros(B, T, device=DEVICE).long(), given["entries"]._replace(values=values.double())
    _, log_sum_exp = attend(q.double(), kv, sink, begin, doubles, window=3, scale=SCALE, backend="reference")
    query_weights = (torch.rand(B, T) * (torch.rand(B, T) < 0.8)).to(DEVICE)
    return given | {"log_sum_exp": log_sum_exp.float(), "query_weights": query_weights}


def doubled(given):
    """In float64, but for products, which a reference of float64 does not round."""
    entries = given["entries"]._replace(values=given["entries"].values.double())
    return {n: x.double() for n, x in given.items() if n != "entries"} | {"entries": entries}


def with_gradients(operation, given, factor=1.0):
    leaves = {name: given[name].detach().requires_grad_() for name in LEARN}
    results = operation(**given | leaves, scale=SCALE)
    return *(x.detach() for x in results), *torch.autograd.grad(factor * results[0], leaves.values())


def check(given, dtype, factor=1.0):
    """All that is computed, over memory full of NaN. Rounded products are the reference's own."""
    wanted = with_gradients(rounding_reference, given, factor)
    with poisoned():
        found = with_gradients(triton.indexer_kl, given, factor)
    for mine, name in zip(found[3:], LEARN, strict=True):
        assert mine.dtype == given[name].dtype
    for mine, other in zip(found, wanted, strict=True):
        assert_near(mine, other.double(), dtype, factor=2)


def rounding_reference(scale, **given):
    """The reference in float64, its products rounded as the dtype of the student has it."""
    dtype, exact = given["index_q"].dtype, doubled(given)

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.to(dtype).double()

        @staticmethod
        def backward(ctx, grad):
            return grad

    def all_scores(q, k, weights):
        dots = Rounded.apply(torch.einsum("btij,bcj->btic", q, k))
        return torch.einsum("bti,btic->btc", weights, dots.relu())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "all_scores", all_scores)
        return reference.indexer_kl(**exact, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_divergences_and_gradients(kind, sizes, dtype):
    check(case(kind, *sizes, dtype), dtype, factor=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_chunks_and_parts(monkeypatch, kind):
    """Slices of two queries or four, parts of two, a program for each 16 columns; two tiles of compared columns."""
    monkeypatch.setattr(triton, "COLUMNS", 16)
    monkeypatch.setattr(triton, "BLOCK", 32)
    monkeypatch.setattr(triton, "SCORES_HELD", 4 * 27)
    for module in (triton, triton_gradients):
        monkeypatch.setattr(module, "QUERIES", 2)
    check(case(kind, 2, 7, 40, 2, 3, 2, 5), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs_give_the_same_bits(kind):
    given = case(kind, 2, 5, 7, 3, 4, 2, 6)
    wanted = with_gradients(triton.indexer_kl, given)
    apart = {n: x.mT.contiguous().mT for n, x in given.items() if n not in ("entries", "query_weights")}
    entries = Entries(*(None if x is None else x.mT.contiguous().mT for x in given["entries"]))
    cut = given | apart | {"entries": entries, "query_weights": given["query_weights"].T.contiguous().T}
    assert not any(x.is_contiguous() for n, x in cut.items() if n != "entries")
    assert all(torch.equal(x, y) for x, y in zip(with_gradients(triton.indexer_kl, cut), wanted, strict=True))


def part_of(given, row, queries):
    """Some queries of a row, with all of its entries."""
    per_query = {n: x[row : row + 1, queries] for n, x in given.items() if n not in ("entries", "index_k")}
    values, *which = given["entries"]
    entries = Entries(values[row : row + 1], *(None if x is None else x[row : row + 1, queries] for x in which))
    return given | per_query | {"entries": entries, "index_k": given["index_k"][row : row + 1]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_query_has_the_same_bits_whatever_stands_beside_it(monkeypatch, kind, dtype):
    given = case(kind, 2, 4, 18, 3, 4, 2, 6, dtype)
    whole, again = (with_gradients(triton.indexer_kl, given) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    for row, queries in ((1, slice(2, 3)), (0, slice(1, 3))):
        part = with_gradients(triton.indexer_kl, part_of(given, row, queries))
        for i in (1, 2, 3, 5):  # divergences, and the gradients of queries and weights
            assert torch.equal(part[i], whole[i][row : row + 1, queries])
    monkeypatch.setattr(triton, "SCORES_HELD", 1)
    for module in (triton, triton_gradients):
        monkeypatch.setattr(module, "QUERIES", 1)
    sliced = with_gradients(triton.indexer_kl, given)
    assert all(torch.equal(sliced[i], whole[i]) for i in (1, 2, 3, 5))


def test_all_entries_picked_is_dense():
    entry = torch.arange(18)
    end = torch.tensor([[1, 18]])
    dense = case("interval", 1, 2, 18, 2, 4, 3, 5, which={"begin": torch.zeros_like(end), "end": end})
    picks = {"picked": entry.masked_fill(entry >= end[..., None], -1).to(DEVICE)}
    sparse = dense | {"entries": Entries(dense["entries"].values, **picks)}
    for mine, other in zip(
        with_gradients(triton.indexer_kl, sparse), with_gradients(triton.indexer_kl, dense), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_far_apart_and_far_from_zero(kind):
    given = case(kind, 1, 4, 20, 2, 4, 3, 5)
    given["index_weights"] *= 1e3
    given["q"] = given["q"] * 30
    check(given, torch.float32)
    _, kl, _ = triton.indexer_kl(**given, scale=SCALE)
    assert kl.max() > 100


def test_a_query_that_sees_nothing_has_no_divergence_and_no_gradient():
    for kind in KINDS:
        given = case(kind, 2, 5, 7, 3, 4, 2, 6)
        given["query_weights"].fill_(1)
        _, kl, uniform, grad_q, _, grad_weights = with_gradients(triton.indexer_kl, given)
        for x in (kl[:, :, None], uniform[:, :, None], grad_q.flatten(2), grad_weights):
            assert (x != 0).any(dim=-1).tolist() == [[True] * 4 + [False]] * 2


@pytest.mark.parametrize("sizes", [(2, 3, 0, 2, 4, 3, 5), (2, 0, 6, 2, 4, 3, 5), (0, 3, 6, 2, 4, 3, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_entries_and_no_queries(kind, sizes):
    B, T, C, *_ = sizes
    which = {"begin": torch.zeros(B, T).long(), "end": torch.full((B, T), C)}
    if kind == "picked":
        which = {"picked": torch.zeros(B, T, min(C, 2)).long()}
    given = case(kind, *sizes, which=which)
    with poisoned():
        found = with_gradients(triton.indexer_kl, given)
    assert [x.shape for x in found] == [(), (B, T), (B, T), *(given[name].shape for name in LEARN)]
    assert not any(x.any() for x in found)


def test_only_the_loss_carries_a_gradient_and_nothing_is_kept_without():
    given = case("picked", 2, 5, 7, 3, 4, 2, 6)
    given["index_k"].requires_grad_()
    loss, kl, uniform = triton.indexer_kl(**given, scale=SCALE)
    assert [x.requires_grad for x in (loss, kl, uniform)] == [True, False, False]
    with torch.no_grad():
        still = triton.indexer_kl(**given, scale=SCALE)
    assert not still[0].requires_grad
    assert all(torch.equal(x.detach(), y) for x, y in zip((loss, kl, uniform), still, strict=True))


def test_the_operation_takes_the_kernels_and_what_they_do_not_serve_is_portables():
    given = case("interval", 2, 5, 7, 3, 4, 2, 6)
    taken = indexer_kl(**given, scale=SCALE, backend="unproved")
    assert all(torch.equal(x, y) for x, y in zip(taken, triton.indexer_kl(**given, scale=SCALE), strict=True))
    exact = doubled(given)
    for mine, other in zip(
        triton.indexer_kl(**exact, scale=SCALE), portable.indexer_kl(**exact, scale=SCALE), strict=True
    ):
        assert torch.equal(mine, other)


# Recall


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [64, 3])
def test_recall(monkeypatch, queries, dtype):
    """Some queries choose among more entries than they pick, some do not; begin is below 0 now and then."""
    monkeypatch.setattr(triton, "SCORES_HELD", 1)
    monkeypatch.setattr(triton, "QUERIES", queries)
    B, T, C, P = 2, 7, 20, 4
    given = case("interval", B, T, C, 2, 4, 3, 5, dtype)
    given["entries"].end[0, :2] = given["entries"].begin[0, :2].clamp(min=0) + 3
    values, _, begin, end = given["entries"]
    entry = torch.arange(C, device=DEVICE)
    order = torch.rand(B, T, C, device=DEVICE)
    order = order.masked_fill((entry < begin[..., None]) | (entry >= end[..., None]), -1)
    best = order.sort(dim=-1, descending=True)
    picked = best.indices.masked_fill(best.values < 0, C)[..., :P].sort(dim=-1).values
    picked = picked.masked_fill(picked == C, -1)
    q, norm = given["q"], given["log_sum_exp"]
    wanted = reference.recall(q.double(), Entries(values.double(), None, begin, end), norm.double(), picked, SCALE)
    with poisoned():
        found = triton.recall(q, given["entries"], norm, picked, SCALE)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-6, equal_nan=True)
    known = wanted[~wanted.isnan()]
    assert 1 < len(known) < B * T
    assert len(set(known.tolist())) > 1
    everything = torch.arange(C, device=DEVICE).expand(B, T, C)
    assert triton.recall(q, given["entries"], norm, everything, SCALE).isnan().all()
    exact = q.double(), Entries(values.double(), None, begin, end), norm.double(), picked, SCALE
    assert torch.equal(triton.recall(*exact).nan_to_num(-1), portable.recall(*exact).nan_to_num(-1))
