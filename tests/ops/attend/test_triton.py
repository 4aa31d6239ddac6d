"""The Triton kernels of attention against the reference in float64."""

import pytest
import torch

from dsv4.ops.attend import Entries, reference, triton, triton_backward, triton_keys
from tests.ops.triton_lane import DEVICE, DTYPES, assert_near, poisoned

KINDS = ["none", "interval", "picked"]
NARROW = [dtype for dtype in DTYPES if dtype != torch.float32]
SCALE = 0.3
WINDOW = 20  # more than a tile of 16 keys, and no multiple of it


def case(kind, dtype=torch.float32, B=2, T=6, H=3, K=24, history=16, C=21, P=18):
    """Vectors that carry gradients, in the dtype but for the sink, and the indices that go with them."""

    def random(*shape):
        return torch.randn(*shape).to(DEVICE, dtype)

    given = {"q": random(B, T, H, K), "kv": random(B, history + T, K), "sink": random(H).float()}
    own = history + torch.arange(T)
    starts = (torch.rand(B, history + T) < 0.05).long() * torch.arange(history + T)
    seen = {"raw_begin": torch.minimum(starts.cummax(dim=1).values[:, history:], own)}
    if kind != "none":
        given["values"] = random(B, C, K)
    if kind == "interval":
        seen["begin"] = torch.randint(0, C, (B, T))
        seen["end"] = seen["begin"] + torch.randint(0, C + 1, (B, T))  # beyond the last entry, too
    if kind == "picked":
        picked = torch.rand(B, T, C).argsort(dim=-1)[..., :P]
        seen["picked"] = picked.masked_fill(torch.rand(picked.shape) < 0.3, -1)
    return given, {name: index.to(DEVICE) for name, index in seen.items()}


def run(attend, given, seen, window=WINDOW):
    entries = None
    if "values" in given:
        entries = Entries(given["values"], **{name: index for name, index in seen.items() if name != "raw_begin"})
    return attend(given["q"], given["kv"], given["sink"], seen["raw_begin"], entries, window, SCALE)


def gradients(attend, given, seen, grad, window=WINDOW):
    """The output, the log-sum-exp, and the gradients of what is given under a gradient of the output."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    out, log_sum_exp = run(attend, leaves, seen, window)
    assert not log_sum_exp.requires_grad
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), "log_sum_exp": log_sum_exp} | dict(zip(leaves, found, strict=True))


def check(given, seen, window=WINDOW, factor=4.0):
    """Compare with float64. The factor: a gradient passes several roundings of 2^-11, of weights and differences."""
    grad = torch.randn_like(given["q"])
    with poisoned():
        found = gradients(triton.attend, given, seen, grad, window)
    exact = {name: value.double() for name, value in given.items()}
    wanted = gradients(reference.attend, exact, seen, grad, window)
    for name, value in found.items():
        dtype = given["q"].dtype
        assert value.dtype == (torch.float32 if name in ("log_sum_exp", "sink") else dtype), name
        assert_near(value, wanted[name], dtype, factor)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(kind, dtype):
    check(*case(kind, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("T", "window", "history", "H", "K"),
    [
        (1, 1, 0, 1, 1),
        (1, 33, 40, 17, 16),
        (5, 2, 0, 2, 33),
        (18, 16, 0, 1, 16),
        (7, 17, 60, 5, 8),
        (3, 9, 12, 16, 8),
        (2, 5, 3, 32, 8),  # a query of one block, or of two
    ],
)
def test_odd_sizes(kind, T, window, history, H, K):
    check(*case(kind, B=1, T=T, history=history, H=H, K=K), window=window)


@pytest.mark.parametrize("P", [1, 16, 17, 40])
def test_numbers_of_picks(P):
    check(*case("picked", T=5, C=40, P=P, K=16))


@pytest.mark.parametrize("C", [1, 16, 17, 40])
def test_numbers_of_entries(C):
    check(*case("interval", T=5, C=C, K=16))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", KINDS)
def test_several_tiles_of_16_bits(kind, dtype):
    check(*case(kind, dtype, B=1, T=3, history=70, C=90, P=80, H=2, K=16), window=71)


@pytest.mark.parametrize("kind", KINDS)
def test_other_configurations(kind, monkeypatch):
    for module, name in ((triton, "deep"), (triton_backward, "narrow"), (triton_keys, "flat")):
        monkeypatch.setattr(module, "NARROW", name)
    check(*case(kind, NARROW[0], B=1, T=3, history=40, C=70, P=66, H=33, K=16), window=41)


# In parts


def test_interval_gradients_in_parts(monkeypatch):
    """Parts of 4 queries, of which all, or one, or two fit in memory: the same sums in the same order."""
    monkeypatch.setattr(triton_keys, "QUERIES", 4)
    given, seen = case("interval", T=9)
    check(given, seen)
    grad = torch.randn_like(given["q"])
    wanted = gradients(triton.attend, given, seen, grad)
    for held in (1, 2 * 2 * 21 * 24 + 5):
        monkeypatch.setattr(triton_keys, "PARTS_HELD", held)
        found = gradients(triton.attend, given, seen, grad)
        assert all(found[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize("held", [1, 18 * 24 * 4 + 1])
def test_picked_gradients_in_parts(held, monkeypatch):
    monkeypatch.setattr(triton_backward, "PARTS_HELD", held)
    check(*case("picked"))


def test_an_entry_that_all_pick_and_one_that_none_picks():
    given, seen = case("picked", B=1, T=18, C=7, P=5, K=16, history=0)
    seen["picked"] = torch.tensor([3, -1, 6, 0, 1], device=DEVICE).repeat(1, 18, 1)
    found = check(given, seen)
    assert found["values"][:, [2, 4, 5]].count_nonzero() == 0
    assert (found["values"][:, [0, 1, 3, 6]] != 0).all()


def test_no_picks_at_all():
    given, seen = case("picked")
    seen["picked"].fill_(-1)
    found = gradients(triton.attend, given, seen, torch.ones_like(given["q"]))
    alone = {name: value for name, value in given.items() if name != "values"}
    wanted = gradients(triton.attend, alone, seen, torch.ones_like(given["q"]))
    assert found["values"].count_nonzero() == 0
    assert all(found[name].equal(value) for name, value in wanted.items())


# What queries see of the interval


def test_intervals_that_are_empty_or_reach_beyond():
    given, seen = case("interval", T=6, C=20)
    seen["begin"] = torch.tensor([[-3, 5, 9, 0, 25, 19], [0, 0, 16, 15, 17, 3]], device=DEVICE)
    seen["end"] = torch.tensor([[2, 5, 4, 99, 30, 20], [0, 1, 17, 16, 99, 18]], device=DEVICE)
    check(given, seen)


def test_documents_begin_at_raw_begin():
    given, seen = case("none", B=1, T=6, history=2)
    seen["raw_begin"] = torch.tensor([[-4, 1, 4, 4, 6, 7]], device=DEVICE)
    found = check(given, seen, window=3)
    assert (found["kv"][0, 0] != 0).all()


def test_a_token_that_no_query_sees_has_no_gradient():
    given, seen = case("none", B=1, T=2, history=70)
    found = check(given, seen, window=5)
    assert found["kv"][0, :66].count_nonzero() == 0


# The same bits


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_the_same_bits(kind):
    given, seen = case(kind, NARROW[-1])
    grad = torch.randn_like(given["q"])
    first, second = (gradients(triton.attend, given, seen, grad) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [(0, 1), (2, 5)])
def test_a_query_does_not_depend_on_the_others(kind, cut):
    given, seen = case(kind)
    grad = torch.randn_like(given["q"])
    whole = gradients(triton.attend, given, seen, grad)
    now = slice(*cut)
    part = given | {"q": given["q"][:, now], "kv": given["kv"][:, : 16 + cut[1]]}
    found = gradients(triton.attend, part, {name: x[:, now] for name, x in seen.items()}, grad[:, now])
    assert all(found[name].equal(whole[name][:, now]) for name in ("out", "log_sum_exp", "q"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind):
    given, seen = case(kind)
    grad = torch.randn_like(given["q"])
    whole = gradients(triton.attend, given, seen, grad)
    for row in range(2):
        own = {name: value if name == "sink" else value[row : row + 1] for name, value in given.items()}
        found = gradients(triton.attend, own, {name: x[row : row + 1] for name, x in seen.items()}, grad[row : row + 1])
        assert all(found[name].equal(whole[name][row : row + 1]) for name in whole if name != "sink")


# Layouts, sizes, magnitudes


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs(kind):
    given, seen = case(kind)
    grad = torch.randn(1, 6, 3, 1, device=DEVICE).expand_as(given["q"])
    wanted = gradients(triton.attend, given, seen, grad)
    strided = {name: torch.stack([x, x + 1], dim=-1)[..., 0] for name, x in given.items()}
    strided["q"] = given["q"].transpose(1, 2).contiguous().transpose(1, 2)
    found = gradients(triton.attend, strided, {n: torch.stack([x, x], dim=-1)[..., 0] for n, x in seen.items()}, grad)
    assert all(found[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{"T": 0}, {"B": 0}])
def test_without_queries(kind, sizes):
    given, seen = case(kind, **sizes)
    found = gradients(triton.attend, given, seen, torch.zeros_like(given["q"]))
    assert found["out"].shape == given["q"].shape
    assert found["log_sum_exp"].shape == given["q"].shape[:3]
    assert all(found[name].shape == given[name].shape for name in given)
    assert all(found[name].count_nonzero() == 0 for name in given)


@pytest.mark.parametrize(("kind", "sizes"), [("interval", {"C": 0}), ("picked", {"P": 0}), ("picked", {"C": 0})])
def test_without_entries(kind, sizes):
    given, seen = case("none")
    C = sizes.get("C", 5)
    more = {"begin": seen["raw_begin"], "end": seen["raw_begin"]}
    if kind == "picked":
        more = {"picked": torch.full((2, 6, sizes.get("P", 4)), -1, device=DEVICE)}
    grad = torch.randn_like(given["q"])
    found = gradients(triton.attend, given | {"values": torch.randn(2, C, 24, device=DEVICE)}, seen | more, grad)
    wanted = gradients(triton.attend, given, seen, grad)
    assert all(found[name].equal(value) for name, value in wanted.items())
    assert found["values"].shape == (2, C, 24)
    assert found["values"].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_ten_thousand_stay_finite(kind):
    given, seen = case(kind)
    given["q"] *= 1e4
    found = gradients(triton.attend, given, seen, torch.randn_like(given["q"]))
    assert all(value.isfinite().all() for value in found.values())


def test_channels_of_very_different_size():
    given, seen = case("picked")
    size = torch.logspace(-3, 1, 24, device=DEVICE)
    given |= {"q": given["q"] / size, "kv": given["kv"] * size, "values": given["values"] * size}
    check(given, seen)


@pytest.mark.parametrize("sink", [1e4, -1e4, -torch.inf])
def test_sinks_that_take_all_or_nothing(sink):
    given, seen = case("interval")
    given["sink"].fill_(sink)
    found = gradients(triton.attend, given, seen, torch.randn_like(given["q"]))
    assert all(value.isfinite().all() for value in found.values())
    exact = {name: value.double() for name, value in given.items()}
    wanted, log_sum_exp = run(reference.attend, exact, seen)
    torch.testing.assert_close(found["out"].double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["log_sum_exp"].double(), log_sum_exp, rtol=1e-5, atol=1e-5)


# Errors


@pytest.mark.parametrize("name", ["kv", "values"])
def test_keys_of_another_dtype_are_an_error(name):
    given, seen = case("picked")
    given[name] = given[name].half()
    with pytest.raises(ValueError, match=rf"{name} has dtype torch\.float16; expected torch\.float32, that of q"):
        run(triton.attend, given, seen)


def test_float64_is_an_error():
    given, seen = case("none")
    with pytest.raises(ValueError, match=r"q has dtype torch\.float64; expected float32, float16 or bfloat16"):
        run(triton.attend, given | {"q": given["q"].double()}, seen)
