"""Linear maps of weights in codes: against the released rule written out, and to the bit where order is fixed."""

import pytest
import torch

from dsv4 import native
from dsv4.ops.linear import linear, linears
from dsv4.ops.lowbit import Packed, dequantise, quantise_blocks, quantise_fp4, round_rows

KINDS = ["fp4", "fp8", "fp8 float32"]
needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")


def packed(kind, rows, columns, scale=1.0):
    w = scale * torch.randn(rows, columns)
    return quantise_fp4(w) if kind == "fp4" else quantise_blocks(w, torch.float32 if "float" in kind else torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 5, 32), (3, 17, 160), (30, 130, 288), (2, 40, 96)])
@pytest.mark.parametrize("backend", ["portable", pytest.param("native", marks=needs_kernels)])
def test_as_the_released_rule(kind, dtype, sizes, backend):
    M, N, K = sizes
    x, w = torch.randn(M, K).to(dtype), packed(kind, N, K)
    wanted = linear(x, w, wide=True, backend="reference")
    got = linear(x, w, wide=True, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()) + 1e-6)
    narrow = linear(x, w, backend=backend)
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.float(), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=1e-4)


def test_the_rule_in_float64():
    x, w = torch.randn(2, 160), packed("fp4", 3, 160)
    exact = round_rows(x).double() @ dequantise(w, torch.float32).double().T
    torch.testing.assert_close(linear(x, w, backend="reference").double(), exact, rtol=0, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("kind", ["fp4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_give_the_bits_of_their_values(kind, dtype):
    """What a training forward multiplies, rounded values, and what is served, codes, are the same numbers."""
    x, w = torch.randn(9, 192).to(dtype), packed(kind, 150, 192, scale=1e-2)
    values = dequantise(w, dtype)
    assert torch.equal(linear(x, w, backend="native"), linear(round_rows(x), values, backend="native"))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_on_any_number_of_threads(kind):
    x, w = torch.randn(40, 256).bfloat16(), packed(kind, 300, 256)
    before = torch.get_num_threads()
    together = linear(x, w, backend="native")
    torch.set_num_threads(3 - min(before, 2))
    try:
        alone = torch.cat([linear(row[None], w, backend="native") for row in x])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


@needs_kernels
@pytest.mark.parametrize("shift", [-118, -60, 100, 119])
@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_far_scales(kind, shift):
    """Products stay finite; bfloat16's smallest numbers go the long way."""
    w = packed(kind, 33, 64)
    w = Packed(w.codes, (w.scales.int() + shift).clamp(1, 250).to(torch.uint8), w.kind)
    x = torch.randn(4, 64) * 2.0 ** min(-shift, 100)
    wanted = round_rows(x).double() @ dequantise(w, torch.float32).double().T
    got = linear(x, w, backend="native")
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@needs_kernels
def test_codes_beside_plain_weights():
    x, w, plain = torch.randn(3, 128).bfloat16(), packed("fp8", 20, 128), torch.randn(7, 128).bfloat16()
    one, other = linears(x, [w, plain], wide=[False, True], backend="native")
    assert torch.equal(one, linear(x, w, backend="native"))
    assert torch.equal(other, linear(x, plain, wide=True, backend="native"))


def test_bad_input():
    with pytest.raises(ValueError, match=r"weight has shape \[4, 64\]; expected \[N, 96\], as x has channels"):
        linear(torch.randn(2, 96), packed("fp4", 4, 64))
