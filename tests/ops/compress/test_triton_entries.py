"""Entries of training in one kernel a direction: against the operations one by one, values and every gradient."""

import pytest
import torch
from torch.nn.functional import pad

from dsv4.ops.compress import entries, triton_entries
from dsv4.testing.compare import evaluate
from tests.ops.triton_lane import DEVICE, assert_near, poisoned

EPS = 1e-2
# B, C, m, overlapped, K, R: tokens a power of two and not, chunks of one token and of all, odd and even places of pairs
SIZES = [
    (2, 3, 4, True, 16, 6),
    (1, 4, 3, True, 13, 8),
    (2, 2, 5, False, 12, 4),
    (1, 1, 2, True, 6, 2),
    (1, 2, 16, False, 32, 32),
]


def case(B, C, m, overlap, K, R):
    """Leaves, and what else the operation takes: blocks that are first, of which block 0 always is one."""
    E = 2 * K if overlap else K
    is_first = torch.rand(B, C) < 0.3
    is_first[:, 0] = True
    angle = torch.randn(B, C, R // 2)
    leaves = {
        "kv": torch.randn(B, C, m, E) * 10.0 ** torch.randint(-1, 2, (E,)),
        "gate": 2 * torch.randn(B, C, m, E) + 30 * torch.randn(B, 1, 1, 1),
        "position_bias": torch.randn(m, E),
        "norm_weight": 1 + 0.3 * torch.randn(K),
    }
    rest = {"cos": angle.cos().to(DEVICE), "sin": angle.sin().to(DEVICE), "is_first": is_first.to(DEVICE)}
    return {name: x.to(DEVICE) for name, x in leaves.items()}, rest | {"overlap": overlap, "eps": EPS}


def run(rest, backend="unproved", **given):
    rest = {"dtype": torch.float32} | rest | given
    return lambda **leaves: entries(**leaves, **rest, backend=backend)


def exactly(leaves, rest):
    """In float64, by the reference."""
    rest = {n: x.double() if n in ("cos", "sin") else x for n, x in rest.items()} | {"dtype": torch.float64}
    return evaluate(run(rest, "reference"), **{name: x.double() for name, x in leaves.items()})


@pytest.mark.parametrize(
    ("sizes", "elements"), [(SIZES[0], triton_entries.ELEMENTS), *((sizes, 16) for sizes in SIZES)]
)
def test_entries_and_their_gradients(monkeypatch, sizes, elements):
    monkeypatch.setattr(triton_entries, "ELEMENTS", elements)
    leaves, rest = case(*sizes)
    wanted = exactly(leaves, rest)
    with poisoned():
        found = evaluate(run(rest), **leaves)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_near(found[name], value, torch.float32, factor=4)


@pytest.mark.parametrize(("sizes", "dtype"), [*zip(SIZES, [torch.bfloat16, torch.float16], strict=False)])
def test_each_step_rounds(sizes, dtype):
    """As the operations one by one do, but where sums in another order tip a rounding."""
    leaves, rest = case(*sizes)
    with poisoned():
        found = evaluate(run(rest, dtype=dtype), **leaves)
    wanted, exact = evaluate(run(rest, "portable", dtype=dtype), **leaves), exactly(leaves, rest)
    assert found["output 0"].dtype == dtype
    assert (found["output 0"] == wanted["output 0"]).float().mean() > 0.95
    for name, value in exact.items():
        assert found[name].dtype == wanted[name].dtype
        assert_near(found[name].double(), wanted[name].double(), dtype)
        assert_near(found[name].double(), value, dtype, factor=4)
    for name in ("gradient of kv", "gradient of gate"):  # float32, from an entry that is not yet rounded
        far = (found[name] - wanted[name]).abs() > 1e-5 * wanted[name].abs().max()
        assert far.float().mean() < 0.05


@pytest.mark.parametrize("is_index", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_rounded_as_released_and_gradients_pass_through(is_index, dtype):
    leaves, rest = case(2, 3, 4, True, 128, 20)
    given = {"is_index": is_index, "rounds": True, "dtype": dtype}
    with poisoned():
        found = evaluate(run(rest, **given), **leaves)
    wanted = evaluate(run(rest, "portable", **given), **leaves)
    same = (found["output 0"] == wanted["output 0"])[..., : 128 if is_index else 108]
    assert same.float().mean() > 0.95
    for name, value in wanted.items():
        if name != "output 0":
            assert_near(found[name].double(), value.double(), dtype)
    plain = run(rest, dtype=dtype)(**leaves)
    assert (plain != found["output 0"])[..., :108].float().mean() > 0.5
    assert is_index or torch.equal(plain[..., 108:], found["output 0"][..., 108:])


def test_an_entry_that_is_first_gives_nothing_to_the_block_before():
    leaves, rest = case(1, 4, 2, True, 6, 2)
    rest["is_first"] = torch.tensor([[True, False, True, False]], device=DEVICE)
    leaves["kv"][0, 1, :, :6] = torch.nan  # the first halves of block 1 are nobody's
    found = evaluate(run(rest), **leaves)
    for name in ("kv", "gate"):
        gradient = found[f"gradient of {name}"]
        assert gradient.isfinite().all()
        assert not gradient[0, [1, 3], :, :6].any()
        assert gradient[0, [0, 2], :, :6].all()


@pytest.mark.parametrize("overlap", [False, True])
def test_strided_inputs_and_neighbours_leave_the_same_bits(overlap):
    leaves, rest = case(2, 4, 3, overlap, 12, 4)
    rest["is_first"] = torch.arange(4, device=DEVICE).expand(2, 4) == 0
    wanted, again = (evaluate(run(rest), **leaves) for _ in range(2))
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)
    apart = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in leaves.items()}
    more = {"kv": [0, 1] * 3, "gate": [0, 2] * 3}  # cut off again, so that numbers lie apart, each kind its own way
    longer = {
        n: pad(x, more[n], value=torch.nan)[:, :4, :3, : x.shape[3]] if n in more else x for n, x in leaves.items()
    }
    turned = rest | {name: rest[name].mT.contiguous().mT for name in ("cos", "sin", "is_first")}
    for given, others in ((apart, turned), (longer, rest)):
        assert not given["kv"].is_contiguous()
        made = run(others)(**given)
        assert torch.equal(made, wanted["output 0"])
    few = {n: x[1:2, 2:4] if n in ("kv", "gate") else x for n, x in leaves.items()}
    some = rest | {n: rest[n][1:2, 2:4] for n in ("cos", "sin")} | {"is_first": rest["is_first"][1:2, :2]}
    one = run(some)(**few)[0, 1]
    assert torch.equal(one, wanted["output 0"][1, 3])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_entries(shape):
    leaves, rest = case(*shape, 4, True, 6, 2) if shape[1] else case(2, 1, 4, True, 6, 2)
    for name in ("kv", "gate"):
        leaves[name] = leaves[name][:, : shape[1]]
    rest |= {name: rest[name][:, : shape[1]] for name in ("cos", "sin", "is_first")}
    with poisoned():
        found = evaluate(run(rest), **leaves)
    assert found["output 0"].shape == (*shape, 6)
    assert not any(found[f"gradient of {name}"].any() for name in leaves)


def test_block_0_has_none_before_it_whatever_is_said():
    leaves, rest = case(2, 3, 4, True, 6, 2)
    rest["is_first"] = torch.arange(3, device=DEVICE).expand(2, 3) == 0
    none = torch.zeros_like(rest["is_first"])
    wanted, found = (evaluate(run(rest | {"is_first": x}), **leaves) for x in (rest["is_first"], none))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_block_0_is_first_unless_it_is_said_otherwise_and_float64_goes_step_by_step():
    leaves, rest = case(2, 3, 4, True, 6, 2)
    rest["is_first"] = torch.arange(3, device=DEVICE).expand(2, 3) == 0
    assert torch.equal(run(rest)(**leaves), run(rest | {"is_first": None})(**leaves))
    wide = {name: x.double() for name, x in leaves.items()}
    rest = {n: x.double() if n in ("cos", "sin") else x for n, x in rest.items()} | {"dtype": torch.float64}
    assert torch.equal(run(rest)(**wide), run(rest, "portable")(**wide))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm_weight": torch.ones(5)}, r"kv has 12 channels; expected 10, 2 x norm_weight's"),
        ({"cos": torch.zeros(2, 2, 1)}, r"cos has shape \[2, 2, 1\]; expected \[B, C, r\] with .*C = 3"),
        ({"sin": torch.zeros(2, 3, 2)}, r"sin has shape \[2, 3, 2\]; expected \[B, C, r\] with .*r = 1"),
        ({"gate": torch.zeros(2, 3, 4, 9)}, r"gate has shape \[2, 3, 4, 9\]"),
        ({"position_bias": torch.zeros(3, 12)}, r"position_bias has shape \[3, 12\]"),
        ({"is_first": torch.zeros(2, 2, dtype=torch.bool)}, r"is_first has shape \[2, 2\]"),
        ({"backend": "numpy"}, "backend is 'numpy'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    leaves, rest = case(2, 3, 4, True, 6, 2)
    for backend in ("portable", "unproved"):
        given = {"backend": backend, "dtype": torch.float32} | leaves | rest | changed
        with pytest.raises(ValueError, match=message):
            entries(**given)
