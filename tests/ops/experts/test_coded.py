"""Experts in codes: the kernel against plain maps of codes, and to the bit over neighbours and threads."""

import pytest
import torch

from dsv4 import native
from dsv4.ops.experts import experts, experts_with_shared, rounded_experts
from dsv4.ops.experts.store import Matrices
from dsv4.ops.lowbit import dequantise, quantise_blocks, quantise_fp4, round_rows

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")
E, F, D, A, LIMIT = 5, 160, 96, 3, 7.0


def matrices(routed="fp4"):
    w1, w2, w3 = torch.randn(E, F, D), torch.randn(E, D, F), torch.randn(E, F, D)
    quantise = quantise_fp4 if routed == "fp4" else quantise_blocks
    own = torch.randn(F, D), torch.randn(D, F), torch.randn(F, D)
    many = Matrices.of_codes(*(quantise(0.2 * w) for w in (w1, w2, w3)))
    return many, Matrices.of_codes(*(quantise_blocks(0.2 * w) for w in own))


def inputs(tokens, dtype):
    chosen = torch.stack([torch.randperm(E)[:A] for _ in range(tokens)])
    return torch.randn(tokens, D).to(dtype), chosen, torch.rand(tokens, A)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routed", ["fp4", "fp8"])
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_as_maps_of_codes(dtype, routed, tokens):
    given, (many, own) = inputs(tokens, dtype), matrices(routed)
    wanted = experts_with_shared(*given, many, own, LIMIT, backend="portable").float()
    got = experts_with_shared(*given, many, own, LIMIT, backend="native")
    assert got.dtype == dtype
    # A last bit may move a hidden number to the next code, by a sixteenth of it: one such is small among all of a sum.
    distance = float((got.float() - wanted).norm() / wanted.norm())
    assert distance < (5e-3 if dtype == torch.bfloat16 else 2e-3)


def test_reference_and_portable_agree():
    given, (many, own) = inputs(6, torch.float32), matrices()
    one, other = (experts_with_shared(*given, many, own, LIMIT, backend=b) for b in ("reference", "portable"))
    assert float((one - other).norm() / one.norm()) < 2e-3


@needs_kernels
def test_inputs_are_rounded():
    """Far from what the same values give without rounding, and near what rounded inputs alone would change."""
    given, (many, own) = inputs(40, torch.float32), matrices()
    coded = experts_with_shared(*given, many, own, LIMIT, backend="native")
    values = [Matrices(tuple(dequantise(w, torch.float32) for w in part.weights)) for part in (many, own)]
    plain = experts_with_shared(*given, *values, LIMIT, backend="native")
    half = experts_with_shared(round_rows(given[0]), *given[1:], *values, LIMIT, backend="native")
    assert 5e-3 < float((coded - plain).norm() / plain.norm()) < 6e-2
    assert 5e-3 < float((coded - half).norm() / plain.norm()) < 6e-2


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_alone_and_on_any_number_of_threads(dtype):
    (x, chosen, weights), (many, own) = inputs(50, dtype), matrices()
    before = torch.get_num_threads()
    together = experts_with_shared(x, chosen, weights, many, own, LIMIT, backend="native")
    torch.set_num_threads(3 - min(before, 2))
    try:
        rows = zip(x.split(1), chosen.split(1), weights.split(1), strict=True)
        alone = torch.cat([experts_with_shared(*row, many, own, LIMIT, backend="native") for row in rows])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_bad_input():
    given, (many, own) = inputs(2, torch.float32), matrices()
    with pytest.raises(ValueError, match=r"do not fit matrices"):
        experts_with_shared(given[0][:, :32], *given[1:], many, own, LIMIT)
    values = Matrices(tuple(dequantise(w, torch.float32) for w in own.weights))
    with pytest.raises(ValueError, match=r"shared is in numbers and routed in fp4; expected both in codes"):
        experts_with_shared(*given, many, values, LIMIT)
    stacks = Matrices(tuple(dequantise(w, torch.float32) for w in many.weights))
    with pytest.raises(ValueError, match=r"shared is in fp8; expected numbers"):
        experts_with_shared(*given, stacks, own, LIMIT)
    for run in (experts, rounded_experts):
        with pytest.raises(ValueError, match=r"routed is in fp4; expected numbers"):
            run(*given, many, LIMIT)
