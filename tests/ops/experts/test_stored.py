"""Experts of a store give the bits of experts in memory, however few of them are there at a time."""

import pytest
import torch

from dsv4 import native
from dsv4.ops.experts import coded, experts, experts_with_shared, portable, stored_experts
from dsv4.ops.experts.store import CODES, Matrices, Table, needed
from dsv4.ops.lowbit import quantise_blocks, quantise_fp4

BACKENDS = [
    "reference",
    "portable",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="no C compiler here")),
]
DTYPES = [torch.float32, torch.bfloat16]
LIMIT = 1.5
# T, A, E, D, F: one token, a few, groups of more than a tile, and more columns than a thread takes at a time
SIZES = [(1, 1, 1, 1, 1), (1, 3, 7, 20, 9), (5, 2, 4, 33, 70), (40, 4, 6, 24, 17), (300, 2, 3, 16, 130)]
# The same in codes, whose rows of w1 and w3 a thread takes by 128
CODED_SIZES = [(1, 1, 1, 32, 32), (1, 3, 7, 96, 64), (5, 2, 4, 64, 160), (300, 2, 3, 96, 288)]
FORMS = {  # of routed and of shared experts in codes
    "fp4": (quantise_fp4, quantise_blocks),
    "fp8": (quantise_blocks, lambda w: quantise_blocks(w, torch.float32)),
    "fp8 with float32 scales": (lambda w: quantise_blocks(w, torch.float32), quantise_blocks),
}
GROUPS = [1, 2, 3, None]  # experts that are there at a time; None: all, in one table


class Store:
    """Copies of experts, so many at a time and then spoiled; ``asked`` lists the groups that were given.

    They lie as in the stack, since the bits of torch's products depend on places; ``apart``: each in its own memory.
    """

    def __init__(self, routed, group, apart=False):
        self.sizes, self.dtype, self.device = tuple(routed.shapes[0]), routed.parts[0].dtype, torch.device("cpu")
        self.group, self.asked, self.counts = group, [], None
        stacks = [part.clone() for part in routed.parts]
        self.held = {
            e: Matrices(tuple(part[e].clone() if apart else part[e] for part in stacks), routed.kind)
            for e in range(self.sizes[0])
        }
        self.whole = Table(self.sizes[0], self.held) if group is None else None

    def tables(self, counts, num_tokens):
        if self.whole is not None:
            yield self.whole
            return
        self.counts, order = (counts, num_tokens), sorted(counts, reverse=True)
        for begin in range(0, len(order), self.group):
            some = order[begin : begin + self.group]
            self.asked.append(some)
            yield Table(self.sizes[0], {e: self.held[e] for e in some})
            for e in some:
                for part in self.held[e].parts:
                    part.fill_(255 if part.dtype == CODES else torch.nan)  # a scale of 255 is no number


def case(T, A, E, D, F, x_dtype=torch.float32, w_dtype=torch.float32):
    """Tokens, choices and weights, the routed matrices, and the shared ones."""
    x, weights = torch.randn(T, D).to(x_dtype), torch.rand(T, A)
    chosen = torch.rand(T, E).argsort(dim=1)[:, :A]
    shapes = ((F, D), (D, F), (F, D))
    shared = tuple((torch.randn(shape) / 3).to(w_dtype) for shape in shapes)
    routed = tuple((torch.randn(E, *shape) / 3).to(w_dtype) for shape in shapes)
    return (x, chosen, weights), Matrices(routed), Matrices(shared)


def coded_case(form, *sizes, x_dtype=torch.float32):
    """The same with both in codes."""
    tokens, routed, shared = case(*sizes, x_dtype)
    many, one = FORMS[form]
    return tokens, Matrices.of_codes(*map(many, routed.parts)), Matrices.of_codes(*map(one, shared.parts))


def assert_same(got, wanted, backend):
    if backend == "reference":  # which copies the matrices to other places
        torch.testing.assert_close(got, wanted, rtol=2**-7 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    else:
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_experts_in_memory(backend, sizes, group, dtype):
    tokens, routed, shared = case(*sizes, dtype, dtype)
    got = stored_experts(*tokens, Store(routed, group), LIMIT, backend=backend)
    assert_same(got, experts(*tokens, routed, LIMIT, backend=backend), backend)
    store = Store(routed, group, apart=backend == "native")
    got = stored_experts(*tokens, store, LIMIT, shared=shared, backend=backend)
    wanted = experts_with_shared(*tokens, routed, shared, LIMIT, backend=backend)
    assert got.dtype == wanted.dtype == dtype
    assert_same(got, wanted, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [DTYPES, DTYPES[::-1]])
def test_stored_in_another_dtype_they_are_cast_where_they_are_used(backend, group, x_dtype, w_dtype):
    tokens, routed, shared = case(9, 3, 5, 20, 70, x_dtype, w_dtype)
    shared, cast = (Matrices(tuple(w.to(x_dtype) for w in ws.parts)) for ws in (shared, routed))
    got = stored_experts(*tokens, Store(routed, group), LIMIT, shared=shared, backend=backend)
    assert_same(got, experts_with_shared(*tokens, cast, shared, LIMIT, backend=backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", CODED_SIZES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_codes_in_memory(backend, sizes, form, group, dtype):
    T = min(sizes[0], 5) if backend == "reference" else sizes[0]  # which is slow
    tokens, routed, shared = coded_case(form, T, *sizes[1:], x_dtype=dtype)
    got = stored_experts(*tokens, Store(routed, group, apart=True), LIMIT, shared=shared, backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got, experts_with_shared(*tokens, routed, shared, LIMIT, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, None])
def test_codes_without_a_shared_expert(backend, group):
    """Beside one of zeros nothing is added to the sum, which is rounded then."""
    tokens, routed, _ = coded_case("fp4", 6, 2, 4, 96, 64)
    nothing = Matrices.of_codes(*(quantise_blocks(torch.zeros(shape)) for shape in ((64, 96), (96, 64), (64, 96))))
    got = stored_experts(*tokens, Store(routed, group), LIMIT, backend=backend)
    assert got.dtype == torch.float32
    wanted = coded.experts_with_shared(*tokens, routed, nothing, LIMIT, backend)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("in_codes", [False, True])
def test_each_expert_is_asked_for_once(backend, with_shared, in_codes):
    made = coded_case("fp8", 7, 2, 9, 6, 5) if in_codes else case(T=7, A=2, E=9, D=6, F=5)
    (x, _, weights), routed, shared = made
    chosen = torch.tensor([[1, 4], [4, 8], [8, 4], [1, 0], [4, 8], [0, 8], [4, 1]])
    store = Store(routed, 3)
    stored_experts(x, chosen, weights, store, LIMIT, shared=shared if with_shared else None, backend=backend)
    assert store.asked == [[8, 4, 1], [0]]
    assert store.counts == ({0: 2, 1: 3, 4: 5, 8: 4}, 7)


@pytest.mark.skipif(not native.available(), reason="no C compiler here")
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("in_codes", [False, True])
def test_the_kernel_runs_them_whatever_the_threads(group, in_codes, monkeypatch):
    tokens, routed, shared = coded_case("fp4", 40, 4, 6, 32, 160) if in_codes else case(40, 4, 6, 24, 170)
    monkeypatch.setattr(portable, "run_stored", lambda *_: pytest.fail("the portable path ran"))
    monkeypatch.setattr(coded, "stored_experts", lambda *_: pytest.fail("plain maps of codes ran"))
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(stored_experts(*tokens, Store(routed, group), LIMIT, shared=shared, backend="native"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, None])
def test_inputs_need_not_be_contiguous(backend, group):
    tokens, routed, shared = case(T=6, A=2, E=4, D=10, F=7)
    turned = [value.T.contiguous().T for value in tokens]
    flat = Matrices(tuple(w.T.contiguous().T for w in shared.parts))
    got = stored_experts(*turned, Store(routed, group), LIMIT, shared=flat, backend=backend)
    wanted = experts_with_shared(*tokens, routed, shared, LIMIT, backend=backend)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, None])
def test_a_shared_expert_in_codes_need_not_be_contiguous(backend, group):
    tokens, routed, shared = coded_case("fp8", 6, 2, 4, 160, 288)
    turned = Matrices(tuple(part.T.contiguous().T for part in shared.parts), shared.kind)
    got = stored_experts(*tokens, Store(routed, group), LIMIT, shared=turned, backend=backend)
    assert torch.equal(got, experts_with_shared(*tokens, routed, shared, LIMIT, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, None])
def test_no_tokens_give_no_rows(backend, group):
    for tokens, routed, shared in (case(T=0, A=2, E=4, D=32, F=7), coded_case("fp8", 0, 2, 4, 32, 7)):
        for own in (None, shared):
            assert stored_experts(*tokens, Store(routed, group), LIMIT, shared=own, backend=backend).shape == (0, 32)


@pytest.mark.parametrize("in_codes", [False, True])
def test_a_table_has_the_same_addresses_at_every_call(in_codes):
    _, routed, _ = coded_case("fp8", 1, 1, 4, 6, 5) if in_codes else case(T=1, A=1, E=4, D=6, F=5)
    own = tuple(range(7, 7 + len(routed.parts)))
    table = Table(4, {e: routed.one(e) for e in (0, 2)})
    first = table.addresses(own)
    assert len(first) == (6 if in_codes else 3)
    assert all(one is other for one, other in zip(first, table.addresses(own), strict=True))
    for array, part, shared in zip(first, routed.parts, own, strict=True):
        assert list(array) == [part[0].data_ptr(), None, part[2].data_ptr(), None, shared]
    assert [array[4] for array in table.addresses((0,) * len(own))] == [None] * len(own)
    assert [array[4] for array in first] == list(own)


def test_matrices_of_codes_are_of_one_form():
    (w1, w2, w3), other = (quantise_blocks(torch.randn(3, 130, 140)) for _ in range(3)), torch.float32
    made = Matrices.of_codes(w1, w2, w3)
    assert made.shapes == [[3, 130, 140]] * 3
    assert [part.data_ptr() for part in made.parts[1::3]] == [w2.codes.data_ptr(), w2.scales.data_ptr()]
    assert torch.equal(made.one(2).parts[5], w3.scales[2])
    with pytest.raises(ValueError, match=r"w1, w2 and w3 are codes and scales of .*float32.*; expected one kind"):
        Matrices.of_codes(w1, quantise_blocks(torch.randn(3, 130, 140), other), w3)
    with pytest.raises(ValueError, match=r"w1, w2 and w3 are codes and scales of .*fp4.*; expected one kind"):
        Matrices.of_codes(w1, w2, quantise_fp4(torch.randn(3, 130, 160)))


def test_needed_counts_tokens():
    assert needed(torch.tensor([[3, 1], [1, 0], [1, 3]]), 4) == {0: 1, 1: 3, 3: 2}
    assert needed(torch.zeros(0, 2, dtype=torch.int64), 4) == {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [2, None])
@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.parametrize("with_shared", [False, True])
def test_a_choice_of_no_expert_is_an_error(backend, group, wrong, with_shared):
    (x, chosen, weights), routed, shared = case(T=3, A=2, E=4, D=10, F=7)
    chosen[1, 1] = wrong
    lowest, highest = chosen.min(), chosen.max()
    with pytest.raises(ValueError, match=f"chosen holds {lowest} to {highest}; expected experts from 0 to 3"):
        stored_experts(
            x, chosen, weights, Store(routed, group), LIMIT, shared=shared if with_shared else None, backend=backend
        )


@pytest.mark.parametrize("leaf", range(3))
def test_a_gradient_is_refused(leaf):
    tokens, routed, shared = case(T=3, A=2, E=4, D=10, F=7)
    (tokens[0], tokens[2], shared.parts[1])[leaf].requires_grad_()
    store = Store(routed, 2)
    with pytest.raises(ValueError, match="asks for a gradient; expected none: experts of a store give none"):
        stored_experts(*tokens, store, LIMIT, shared=shared)
    with torch.no_grad():
        stored_experts(*tokens, store, LIMIT, shared=shared)


X, CHOSEN, WEIGHTS = torch.zeros(3, 4), torch.zeros(3, 2).long(), torch.zeros(3, 2)
W1, W2 = torch.zeros(5, 4), torch.zeros(4, 5)
CODES_OF = Matrices.of_codes(*(quantise_blocks(torch.ones(w.shape)) for w in (W1, W2, W1)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X[0]}, r"x has shape \[4\]; expected \[T, D\]"),
        ({"x": X[:, :3]}, r"x has shape \[3, 3\]; expected \[T, D\] with D = 4 \(from the store\)"),
        ({"x": X.to("meta")}, "x is on meta; expected cpu, where the store's experts are"),
        ({"chosen": CHOSEN[:2]}, r"chosen has shape \[2, 2\]; expected \[T, A\] with T = 3 \(from x\)"),
        ({"chosen": CHOSEN.int()}, r"chosen has dtype torch\.int32; expected torch\.int64"),
        ({"weights": WEIGHTS[:, :1]}, r"weights has shape \[3, 1\]; expected \[T, A\] with .*A = 2 \(from chosen\)"),
        (
            {"shared": Matrices((W2, W2, W1))},
            r"shared has shapes \[\[4, 5\], \[4, 5\], \[5, 4\]\]; expected \[F, D\], .* with F = 5 and D = 4",
        ),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of reference, portable"),
        ({"shared": CODES_OF}, "shared is in fp8; expected numbers, as the store has them"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    store = Store(Matrices((torch.zeros(6, 5, 4), torch.zeros(6, 4, 5), torch.zeros(6, 5, 4))), 2)
    shared = Matrices((W1, W2, W1))
    fitting = {"x": X, "chosen": CHOSEN, "weights": WEIGHTS, "store": store, "limit": LIMIT, "shared": shared}
    with pytest.raises(ValueError, match=message):
        stored_experts(**fitting | changed)
