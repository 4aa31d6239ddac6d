"""The indexer's choice by Triton kernels against the reference: bit for bit where sums are exact."""

import math

import pytest
import torch

from dsv4.ops import index
from dsv4.ops.index import reference, triton, triton_choice, triton_scores
from tests.ops.index.test_paged import small_integers
from tests.ops.triton_lane import DEVICE, DTYPES, poisoned

NARROW = DTYPES[-1]
WAYS = ["few", "many"]


def shrink(monkeypatch):
    """Groups, parts and chunks of which these sizes fill several, and no more tiles than that takes."""
    monkeypatch.setitem(triton_scores.CONFIGS, "float32", triton_scores.Config(32, 4, 1, None))
    monkeypatch.setattr(triton_scores, "GROUP", 4)
    monkeypatch.setattr(triton_scores, "FEW_GROUP", 2)
    monkeypatch.setattr(triton_scores, "SPLITS", 3)
    monkeypatch.setattr(triton_choice, "CHUNK", 32)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink(monkeypatch)


def go(way, monkeypatch):
    """Score queries one by one, or in groups, however few or many they are."""
    monkeypatch.setattr(triton_scores, "FEW", 1 << 20 if way == "few" else 0)


def inputs(B, T, C, I, J, dtype=torch.float32, make=torch.randn):  # noqa: E741
    shapes = {"q": (B, T, I, J), "k": (B, C, J), "weights": (B, T, I)}
    return {name: make(*shape).to(DEVICE, dtype) for name, shape in shapes.items()}


def larger_integers(*shape):
    """Products that are rounded in 16 bits, and sums that are exact nevertheless."""
    return torch.randint(-40, 41, shape)


def intervals(B, T, C):
    """Bounds of documents: some empty, some of all entries, some beyond them."""
    begin = torch.randint(-2, C, (B, T)) * (torch.rand(B, T) < 0.7)
    return {"begin": begin.to(DEVICE), "end": (begin + torch.randint(0, C + 9, (B, T))).to(DEVICE)}


def seen(*bounds):
    begin, end = torch.tensor(bounds, device=DEVICE).T
    return {"begin": begin[None].contiguous(), "end": end[None].contiguous()}


def choose(given, seen, num_picks):
    with poisoned():
        picked = triton.select(**given, entry_begin=seen["begin"], entry_end=seen["end"], num_picks=num_picks)
    assert picked.dtype == torch.int64
    return picked


def check(given, seen, num_picks):
    picked = choose(given, seen, num_picks)
    exact = {name: value.float() for name, value in given.items()}
    if given["q"].dtype != torch.float32:
        exact = given
    wanted = reference.select(**exact, entry_begin=seen["begin"], entry_end=seen["end"], num_picks=num_picks)
    assert picked.tolist() == wanted.tolist()
    return picked


# Choices: sums of small integers are exact in any order, and equal ones are many


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3, 37, 3, 24), (1, 2, 70, 17, 16)])
def test_choices_and_their_ties(way, dtype, sizes, monkeypatch):
    go(way, monkeypatch)
    given, bounds = inputs(*sizes, dtype, small_integers), intervals(*sizes[:3])
    check(given, bounds, min(5, sizes[2]))


def test_numbers_of_picks():
    given, bounds = inputs(1, 3, 37, 3, 24, make=small_integers), seen((0, 37), (1, 36), (0, 33))
    for num_picks in (1, 16, 36, 37):
        check(given, bounds, num_picks)


@pytest.mark.parametrize("way", WAYS)
def test_several_tiles_of_16_bits(way, monkeypatch):
    go(way, monkeypatch)
    check(inputs(1, 2, 600, 3, 16, NARROW, small_integers), seen((0, 600), (130, 599)), 20)


def test_products_are_rounded_to_the_dtype_of_q():
    given, bounds = inputs(1, 3, 60, 5, 48, NARROW, larger_integers), seen((0, 60), (0, 55), (5, 60))
    check(given, bounds, 30)
    near = torch.tensor([[[40.0, 0], [40, 1], [0, 0]]])  # 2560 and 2561
    for dtype, wanted in ((torch.float32, 1), (NARROW, 0)):
        q, weights = torch.tensor([[[[64.0, 1]]]]), torch.ones(1, 1, 1)
        given = {"q": q.to(DEVICE, dtype), "k": near.to(DEVICE, dtype), "weights": weights.to(DEVICE)}
        assert check(given, seen((0, 3)), 1).item() == wanted


@pytest.mark.parametrize(
    ("num_picks", "make"), [(1, small_integers), (3, small_integers), (3, torch.randn), (8, torch.randn)]
)
def test_rows_of_many_folds(num_picks, make):
    """The best folds are listed first, but for queries that see few of them, or no more entries than they pick."""
    bounds = seen((0, 300), (17, 299), (250, 283), (31, 48), (0, 16 * num_picks + 1), (5, 5))
    check(inputs(1, 6, 300, 2, 8, make=make), bounds, num_picks)


@pytest.mark.parametrize(
    "order", ["rising", "neighbours", "falling", "equal", "waves", "negative", "vanishing", "extreme"]
)
def test_scores_in_any_order(order):
    n = 100
    rising = torch.arange(float(n))
    values = {
        "rising": rising,
        "neighbours": 1 + rising * 2**-23,
        "falling": n - rising,
        "equal": torch.ones(n),
        "waves": rising % 37,
        "negative": rising % 3,
        "vanishing": 1e-30 * (rising % 2),
        "extreme": torch.where(rising % 3 == 0, 2.0 ** (rising % 200 - 100), 2.0**127).where(rising % 7 > 0, 0),
    }
    weight = {"negative": -1.0, "vanishing": -1e-30}.get(order, 1.0)  # so near zero that a score is -0
    k = values[order][None, :, None].to(DEVICE)
    q, weights = torch.ones(1, 1, 1, 1, device=DEVICE), torch.full((1, 1, 1), weight, device=DEVICE)
    for num_picks in (1, 30):
        check({"q": q, "k": k, "weights": weights}, seen((0, n)), num_picks)


@pytest.mark.parametrize("way", WAYS)
def test_no_entry_left_out_scores_higher(way, monkeypatch):
    """Heads and channels of very different size."""
    go(way, monkeypatch)
    for dtype in DTYPES:
        given, bounds = inputs(1, 2, 150, 6, 20), seen((0, 150), (40, 133))
        given["q"] *= torch.logspace(-2, 2, 6, device=DEVICE)[:, None] * torch.logspace(1, -1, 20, device=DEVICE)
        given = {name: value.to(dtype) for name, value in given.items()}
        picked = choose(given, bounds, 9)[0]
        scores = reference.all_scores(**given)[0]
        entry = torch.arange(150, device=DEVICE)
        is_seen = (entry >= bounds["begin"][0, :, None]) & (entry < bounds["end"][0, :, None])
        is_picked = torch.zeros_like(is_seen).scatter(1, picked, value=True)
        assert (is_picked.sum(dim=1) == 9).all()
        assert not (is_picked & ~is_seen).any()
        sizes = reference.all_scores(*(given[name].float().abs() for name in ("q", "k", "weights")))[0].amax(dim=1)
        lowest = scores.masked_fill(~is_picked, torch.inf).amin(dim=1)
        highest = scores.masked_fill(~is_seen | is_picked, -torch.inf).amax(dim=1)
        assert (highest <= lowest + sizes * (2**-20 if dtype == torch.float32 else 2**-8)).all()


@pytest.mark.parametrize(("hidden", "sign"), [(100.0, 1), (torch.nan, 1), (100.0, -1)])
def test_entries_that_a_query_does_not_see_change_nothing(hidden, sign):
    """Not even by the largest score of their fold: there are eight, of which two are looked at.

    With negative weights, keys that were taken for zero would have the best scores.
    """
    given, bounds = inputs(1, 2, 160, 1, 1), seen((35, 150), (35, 150))
    given = {name: value.abs() * (sign if name == "weights" else 1) for name, value in given.items()}
    given["k"] = given["k"].clamp(min=0.1)
    given["k"][0, [40, 60]], given["k"][0, [70, 90]] = 0.05, 50.0
    wanted = check(given, bounds, 2)
    assert wanted[0, 0].tolist() == ([70, 90] if sign > 0 else [40, 60])
    given["k"][:, :35], given["k"][:, 150:] = hidden, hidden
    assert choose(given, bounds, 2).equal(wanted)


@pytest.mark.parametrize("way", WAYS)
def test_more_scores_than_are_held(way, monkeypatch):
    go(way, monkeypatch)
    given, bounds = inputs(1, 5, 40, 3, 8, make=small_integers), intervals(1, 5, 40)
    wanted = check(given, bounds, 4)
    for held in (1, 64 * 3 + 1):
        monkeypatch.setattr(triton, "SCORES_HELD", held)
        assert choose(given, bounds, 4).equal(wanted)


@pytest.mark.parametrize("num_entries", [20, 200])
def test_nothing_is_written_beyond_the_picks(num_entries):
    """All scores are zero, and one more of them would go to the next row."""
    given = {name: torch.zeros_like(x) for name, x in inputs(1, 1, num_entries, 1, 1).items()}
    begin, end = (torch.tensor([bound], device=DEVICE) for bound in (0, num_entries))
    queries = triton_scores.Queries(given["q"][0], given["weights"][0], begin, begin, end, 1, 0)
    picked = torch.full((3, 4), -7, device=DEVICE)
    triton.choose(queries, triton_scores.rows_of(given["k"]), picked[1:2])
    assert picked.tolist() == [[-7] * 4, [0, 1, 2, 3], [-7] * 4]


@pytest.mark.parametrize(("sizes", "num_picks"), [((2, 0, 30, 3, 8), 4), ((0, 3, 30, 3, 8), 4), ((2, 3, 0, 3, 8), 0)])
def test_nothing_to_choose(sizes, num_picks):
    picked = choose(inputs(*sizes), intervals(*sizes[:2], max(1, sizes[2])), num_picks)
    assert picked.shape == (*sizes[:2], num_picks)


def test_strided_inputs_and_weights_of_another_dtype():
    given, bounds = inputs(2, 3, 30, 3, 8, NARROW, small_integers), intervals(2, 3, 30)
    wanted = choose(given, bounds, 4)
    strided = {name: torch.stack([x, x + 1], dim=-1)[..., 0] for name, x in given.items()}
    strided["q"] = given["q"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["weights"] = strided["weights"].float()
    bounds = {name: torch.stack([x, x], dim=-1)[..., 0] for name, x in bounds.items()}
    assert choose(strided, bounds, 4).equal(wanted)


# The same bits


def ordered_scores(given, bounds, num_picks=0):
    """The integers that stand for scores, NOTHING for what is not seen, and of what is not written."""
    q, k, weights = given["q"].flatten(0, 1), given["k"], given["weights"].flatten(0, 1)
    begin, end = bounds["begin"].flatten(), bounds["end"].flatten()
    queries = triton_scores.Queries(q, weights, begin, begin, end, given["q"].shape[1], 0)
    keys = triton_scores.rows_of(k)
    tile = triton_scores.config_of(queries, keys).entries
    length = math.ceil(k.shape[1] / tile) * tile
    nothing = triton_scores.NOTHING.value
    scores = triton_scores.Scores(
        *(torch.full((len(q), n), nothing, dtype=torch.int32, device=DEVICE) for n in (length, length // 16))
    )
    triton_scores.score_into(scores, queries, keys, 0, len(q), num_picks)
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_have_the_same_bits_however_they_are_cut(dtype, monkeypatch):
    given, bounds = inputs(2, 3, 70, 5, 24, dtype), intervals(2, 3, 70)
    go("many", monkeypatch)
    wanted = ordered_scores(given, bounds)
    assert wanted.ordered.unique().numel() > 50
    assert wanted.peaks.equal(wanted.ordered.unflatten(1, (-1, 16)).amax(dim=2))
    for way, group, splits in [("many", 1, 1), ("few", 8, 2), ("few", 1, 64)]:
        go(way, monkeypatch)
        for name, value in (("GROUP", group), ("FEW_GROUP", group), ("SPLITS", splits)):
            monkeypatch.setattr(triton_scores, name, value)
        found = ordered_scores(given, bounds)
        assert found.ordered.equal(wanted.ordered)
        assert found.peaks.equal(wanted.peaks)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_does_not_depend_on_the_others(way, dtype, monkeypatch):
    go(way, monkeypatch)
    given, bounds = inputs(2, 3, 50, 3, 16, dtype), intervals(2, 3, 50)
    whole = choose(given, bounds, 5)
    for row, now in ((0, slice(0, 3)), (1, slice(1, 2))):
        part = {"k": given["k"][row : row + 1]}
        part |= {name: given[name][row : row + 1, now] for name in ("q", "weights")}
        found = choose(part, {name: x[row : row + 1, now] for name, x in bounds.items()}, 5)
        assert found.equal(whole[row : row + 1, now])


# Doors and errors


def test_the_public_door():
    given, bounds = inputs(1, 4, 40, 3, 8, make=small_integers), intervals(1, 4, 40)
    seen = {"entry_begin": bounds["begin"], "entry_end": bounds["end"]}
    wanted, picked = (index.select(**given, **seen, top_k=9, backend=name) for name in ("reference", "unproved"))
    assert picked.equal(wanted)
    wanted, scores = (index.score(**given, picked=picked, backend=name) for name in ("reference", "unproved"))
    assert scores.equal(wanted)


@pytest.mark.parametrize("operation", ["select", "score"])
@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("k", torch.float64, r"k has dtype torch\.float64; expected torch\.float32, that of q"),
        ("both", torch.float64, r"q has dtype torch\.float64; expected float32, float16 or bfloat16"),
    ],
)
def test_dtypes_that_are_not_served(operation, name, dtype, message):
    given, bounds = inputs(1, 2, 9, 2, 8), intervals(1, 2, 9)
    given |= {key: given[key].to(dtype) for key in (("q", "k") if name == "both" else (name,))}
    run = {
        "select": lambda: choose(given, bounds, 3),
        "score": lambda: triton.score(**given, picked=bounds["begin"][..., None]),
    }[operation]
    with pytest.raises(ValueError, match=message):
        run()
