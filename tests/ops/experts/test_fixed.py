"""The experts as one fixed-order kernel: as close as the portable path, and the same bits among any other tokens."""

import pytest
import torch

from dsv4 import native
from dsv4.ops.experts import experts, experts_with_shared, portable, swiglu
from dsv4.ops.experts.store import Matrices
from dsv4.ops.linear import linear
from dsv4.testing.compare import assert_backends_agree, relative_distance

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")
DTYPES = [torch.float32, torch.bfloat16]
TYPES = [(x, w) for x in DTYPES for w in DTYPES]
LIMIT = 1.5
# T, A, E, D, F: one token, a few, groups of more than a tile, and more columns than a thread takes at a time
SIZES = [(1, 1, 1, 1, 1), (1, 3, 7, 20, 9), (5, 2, 4, 33, 70), (40, 4, 6, 24, 17), (300, 2, 3, 16, 130)]


def case(T, A, E, D, F, types=(torch.float32, torch.float32)):
    """Tokens, choices and weights, the routed matrices, and the shared ones."""
    x, weights = torch.randn(T, D).to(types[0]), torch.rand(T, A)
    chosen = torch.rand(T, E).argsort(dim=1)[:, :A]
    shapes = ((F, D), (D, F), (F, D))
    shared = tuple((torch.randn(shape) / 3).to(types[1]) for shape in shapes)
    routed = tuple((torch.randn(E, *shape) / 3).to(types[1]) for shape in shapes)
    return (x, chosen, weights), routed, shared


def run(tokens, routed, shared=None, backend="native"):
    if shared is None:
        return experts(*tokens, Matrices(tuple(routed)), LIMIT, fixed_order=True, backend=backend)
    return experts_with_shared(*tokens, Matrices(tuple(routed)), Matrices(tuple(shared)), LIMIT, backend=backend)


@pytest.fixture
def no_other_path(monkeypatch):
    monkeypatch.setattr(portable, "run", lambda *_: pytest.fail("the portable path ran"))


@needs_kernels
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("with_shared", [False, True])
def test_as_close_to_float64_as_the_portable_path(sizes, types, with_shared):
    tokens, routed, shared = case(*sizes, types)
    shared = shared if with_shared else None
    got, other = run(tokens, routed, shared), run(tokens, routed, shared, "portable")
    assert got.dtype == other.dtype == (tokens[0].dtype if with_shared else torch.float32)
    if types[0] == torch.bfloat16:  # so that the reference meets the same numbers
        routed, shared = (None if ws is None else [w.bfloat16() for w in ws] for ws in (routed, shared))
    exact = run(
        (tokens[0].double(), tokens[1], tokens[2].double()),
        [w.double() for w in routed],
        None if shared is None else [w.double() for w in shared],
        "reference",
    )
    # Float32 sums of some 300 products, or six roundings by 2^-8 at most.
    bound = 1e-5 if types[0] == torch.float32 else 6 * 2**-8
    assert relative_distance(got, exact) <= max(2 * relative_distance(other, exact), bound / 4) <= bound


@needs_kernels
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("with_shared", [False, True])
def test_a_token_has_the_same_bits_among_any_others(no_other_path, sizes, types, with_shared):
    (x, chosen, weights), routed, shared = case(*sizes, types)
    shared = shared if with_shared else None
    together = run((x, chosen, weights), routed, shared)
    for T in (1, 2, 5, 33):
        for first in {0, sizes[0] // 2, sizes[0] - T}:
            if 0 <= first <= sizes[0] - T:
                some = slice(first, first + T)
                alone = run((x[some], chosen[some], weights[some]), routed, shared)
                assert torch.equal(alone, together[some])
    order = torch.randperm(sizes[0])
    assert torch.equal(run((x[order], chosen[order], weights[order]), routed, shared), together[order])


@needs_kernels
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_same_bits_on_any_number_of_threads(no_other_path, sizes, types):
    tokens, routed, shared = case(*sizes, types)
    one = run(tokens, routed), run(tokens, routed, shared)
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        more = run(tokens, routed), run(tokens, routed, shared)
        assert all(torch.equal(a, b) for a, b in zip(one, more, strict=True))


def composed(x, matrices):
    """One expert of every token, by the kernels of its parts."""
    w1, w2, w3 = matrices
    gate, up = (linear(x, w, backend="native") for w in (w1, w3))
    return linear(swiglu(gate, up, LIMIT, backend="native"), w2, backend="native")


@needs_kernels
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("T", [1, 40])
def test_the_same_bits_as_its_parts(types, T):
    (x, chosen, _), routed, shared = case(T, A=3, E=5, D=37, F=21, types=types)
    by_expert = torch.stack([composed(x, [w[expert] for w in routed]) for expert in range(5)]).float()  # [E, T, D]
    total = torch.zeros(T, 37)
    for choice in chosen.T:
        total += by_expert[choice, torch.arange(T)]
    tokens = x, chosen, torch.ones(T, 3)
    assert torch.equal(run(tokens, routed), total)
    assert torch.equal(run(tokens, routed, shared), (total + composed(x, shared)).to(x.dtype))


@needs_kernels
@pytest.mark.parametrize("with_shared", [False, True])
def test_inputs_need_not_be_contiguous(with_shared):
    (x, chosen, weights), routed, shared = case(T=6, A=2, E=4, D=10, F=7)
    shared = shared if with_shared else None
    wanted = run((x, chosen, weights), routed, shared)
    turned = [w.mT.contiguous().mT for w in routed]
    spread = [torch.stack([w, w], dim=1)[:, 0] for w in routed]  # experts lie apart, each in one piece
    flat = None if shared is None else [w.T.contiguous().T for w in shared]
    tokens = [value.T.contiguous().T for value in (x, chosen, weights)]
    for matrices in (turned, spread):
        assert torch.equal(run(tokens, matrices, flat), wanted)


@needs_kernels
def test_equal_rows_of_zeros_give_zeros(no_other_path):
    (x, chosen, weights), routed, shared = case(T=3, A=2, E=4, D=10, F=7)
    x[1] = 0
    assert not run((x, chosen, weights), routed)[1].any()
    assert not run((x, chosen, weights), routed, shared)[1].any()


@needs_kernels
def test_what_is_not_a_number_stays_in_its_token():
    (x, chosen, weights), routed, _ = case(T=4, A=2, E=3, D=10, F=7)
    x[2, 3] = torch.nan
    assert run((x, chosen, weights), routed).isnan().any(dim=1).tolist() == [False, False, True, False]


@needs_kernels
@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.parametrize("with_shared", [False, True])
def test_a_choice_of_no_expert_is_an_error(wrong, with_shared):
    (x, chosen, weights), routed, shared = case(T=3, A=2, E=4, D=10, F=7)
    chosen[1, 1] = wrong
    lowest, highest = chosen.min(), chosen.max()
    with pytest.raises(ValueError, match=f"chosen holds {lowest} to {highest}; expected experts from 0 to 3"):
        run((x, chosen, weights), routed, shared if with_shared else None)


@needs_kernels
@pytest.mark.parametrize("leaf", range(3))
def test_a_gradient_is_the_portable_paths(monkeypatch, leaf):
    tokens, routed, shared = case(T=3, A=2, E=4, D=10, F=7)
    wanted_by = (tokens[0], routed[1], shared[2])[leaf].requires_grad_()
    run(tokens, routed, shared).sum().backward()
    assert wanted_by.grad is not None
    assert wanted_by.grad.any()
    with torch.no_grad():
        monkeypatch.setattr(portable, "run", lambda *_: pytest.fail("the portable path ran"))
        run(tokens, routed, shared)


@needs_kernels
def test_no_tokens_give_no_rows():
    tokens, routed, shared = case(T=0, A=2, E=4, D=10, F=7)
    assert run(tokens, routed).shape == run(tokens, routed, shared).shape == (0, 10)


# The shared expert in the other backends


@pytest.mark.parametrize("T", [1, 9])
def test_backends_agree(T):
    (x, chosen, weights), routed, shared = case(T, A=2, E=4, D=6, F=5)

    def operation(x, weights, w1, w2, w3, s1, s2, s3, backend):
        return experts_with_shared(
            x, chosen, weights, Matrices((w1, w2, w3)), Matrices((s1, s2, s3)), LIMIT, backend=backend
        )

    names = ("x", "weights", "w1", "w2", "w3", "s1", "s2", "s3")
    given = zip(names, (x, weights, *routed, *shared), strict=True)
    assert_backends_agree(operation, **{name: value.double() for name, value in given})


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_the_shared_expert_is_one_that_every_token_chooses(backend):
    (x, chosen, weights), routed, shared = case(T=7, A=2, E=4, D=6, F=5)
    x, weights, routed, shared = (
        x.double(),
        weights.double(),
        [w.double() for w in routed],
        [w.double() for w in shared],
    )
    stacks = [torch.cat([w, one[None]]) for w, one in zip(routed, shared, strict=True)]
    all_chosen = torch.cat([chosen, torch.full((7, 1), 4)], dim=1)
    all_weights = torch.cat([weights, torch.ones(7, 1, dtype=torch.float64)], dim=1)
    wanted = experts(x, all_chosen, all_weights, Matrices(tuple(stacks)), LIMIT, fixed_order=True, backend=backend)
    torch.testing.assert_close(run((x, chosen, weights), routed, shared, backend), wanted)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (0, r"shared w1 has shape \[2, 2\]; expected \[F, D\] with .*D = 6 \(from x\)"),
        (1, r"shared w2 has shape \[2, 2\]; expected \[D, F\]"),
        (2, r"shared w3 has shape \[2, 2\]; expected \[F, D\]"),
    ],
)
def test_what_does_not_fit_is_an_error(matrix, message):
    tokens, routed, shared = case(T=3, A=2, E=4, D=6, F=5)
    changed = [torch.zeros(2, 2) if i == matrix else w for i, w in enumerate(shared)]
    with pytest.raises(ValueError, match=message):
        run(tokens, routed, changed, "portable")


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of reference, portable"):
        run(*case(T=3, A=2, E=4, D=6, F=5), backend="cuda")
