"""The kernels of linear maps: codes against the released rule and to the bit over neighbours, and wide maps."""

import pytest
import torch

from dsv4.ops.linear import linear, linears, portable
from dsv4.ops.linear import triton as kernels
from dsv4.ops.linear.triton_product import as_read, rows_of_codes
from dsv4.ops.lowbit import Packed, dequantise, quantise_blocks, quantise_fp4, round_rows
from tests.ops.triton_lane import DEVICE, DTYPES, assert_near, poisoned

KINDS = ["fp4", "fp8", "fp8 float32"]
# M, N, K: several tiles of each, steps of 128 columns whole and cut off, one of everything
SIZES = [(1, 1, 32), (3, 17, 160), (18, 130, 256), (2, 40, 96)]


def packed(kind, rows, columns, scale=1.0):
    w = (scale * torch.randn(rows, columns)).to(DEVICE)
    return quantise_fp4(w) if kind == "fp4" else quantise_blocks(w, torch.float32 if "float" in kind else torch.uint8)


def tokens(*shape, dtype=torch.float32):
    """Of sizes that differ by row and by channel."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-2, 3, shape[-1:])
    return (x * 2.0 ** torch.randint(-3, 4, (*shape[:-1], 1))).to(DEVICE, dtype)


def run(x, w, wide=False):
    return linear(x, w, wide=wide, backend="unproved")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_as_the_released_rule(kind, sizes, dtype):
    M, N, K = sizes
    x, w = tokens(M, K, dtype=dtype), packed(kind, N, K)
    exact = round_rows(x).double() @ dequantise(w, torch.float32).double().T
    with poisoned():
        wide, narrow = run(x, w, True), run(x, w)
    assert (wide.dtype, narrow.dtype) == (torch.float32, dtype)
    assert_near(wide, exact, torch.float32)
    assert_near(narrow, exact, dtype)


@pytest.mark.parametrize("kind", ["fp8", "fp8 float32"])
def test_any_number_of_columns_of_fp8(kind):
    x, w = tokens(2, 131), packed(kind, 5, 131)
    assert_near(run(x, w), round_rows(x).double() @ dequantise(w, torch.float32).double().T, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(kind, dtype):
    x, w = tokens(70, 288, dtype=dtype), packed(kind, 33, 288)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LEAST", 128)
        parts = []  # of 288 columns three: by a program each, or all by one
        patch.setattr(kernels, "_part", lambda N, K, of=kernels._part: parts.append(of(N, K)) or parts[-1])
        alone = {m: run(x[m : m + 1], w)[0] for m in (0, 9, 69)}
        with poisoned():
            few = run(x[:20], w)
        patch.setattr(kernels, "_part", lambda N, K: 128)
        patch.setattr(kernels, "PROGRAMS", 1)  # 16-bit tokens in tiles of 128, of 64 and of 16
        whole, again, part = run(x, w), run(x, w), run(x[:40], w)
    assert parts == [128] * 4
    assert torch.equal(whole, again)
    assert torch.equal(whole[:40], part)
    assert torch.equal(whole[:20], few)
    assert all(torch.equal(row, whole[m]) for m, row in alone.items())


def test_parts_are_by_the_shape_alone():
    """Of 64 rows a program, so many parts that there are about 100; of at least 512 columns, all whole blocks."""
    assert [kernels._part(*size) for size in ((512, 4096), (2048, 4096), (4096, 8192), (32768, 1024), (9, 100))] == [
        512, 1408, 8192, 1024, 512,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_every_code_is_its_value(kind):
    """One channel of 2 at a time: the map is the column of that channel, twice."""
    if kind == "fp4":
        codes, scales = torch.arange(256).view(16, 16), torch.arange(96, 112).view(16, 1)  # 32 columns
    else:
        codes, scales = torch.arange(256).view(8, 32), torch.tensor([[93]])
    w = Packed(codes.to(DEVICE, torch.uint8), scales.to(DEVICE, torch.uint8), kind)
    x = 2 * torch.eye(32, device=DEVICE)
    found, wanted = run(x, w).T, 2 * dequantise(w, torch.float32)
    if kind == "fp4":
        assert torch.equal(found, wanted)
    else:  # 127 and 255 are no numbers, and neither is a sum that they are in
        has_none = wanted.isnan().any(dim=1)
        assert has_none.tolist() == [False, False, False, True, False, False, False, True]
        assert torch.equal(found[~has_none], wanted[~has_none])
        assert found[has_none].isnan().all()


@pytest.mark.parametrize("shift", [-118, -60, 100, 119])
@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_far_scales(kind, shift):
    w = packed(kind, 33, 64)
    w = Packed(w.codes, (w.scales.int() + shift).clamp(1, 250).to(torch.uint8), w.kind)
    x = torch.randn(4, 64, device=DEVICE) * 2.0 ** min(-shift, 100)
    assert_near(run(x, w), round_rows(x).double() @ dequantise(w, torch.float32).double().T, torch.float32)


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_a_scale_that_is_no_number_makes_none(kind):
    w = packed(kind, 140, 160)
    w.scales[-1, -1] = 255
    is_nan = run(tokens(2, 160), w).isnan()
    first = 139 if kind == "fp4" else 128
    assert is_nan[:, first:].all()
    assert not is_nan[:, :first].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "apart", "K"), [("fp4", 2, 32), ("fp4", 2, 288), ("fp8", 4, 131), ("fp8", 4, 256)])
def test_rows_are_rounded_into_the_order_of_words_and_filled_up(kind, apart, K, dtype):
    x = tokens(5, K, dtype=dtype)
    with poisoned():
        found = rows_of_codes(x, kind)
    back = found.view(5, -1, apart, 16).transpose(2, 3).reshape(5, -1)
    assert torch.equal(back[:, :K], round_rows(x))
    assert back.shape[1] == -(-K // 128) * 128
    assert not back[:, K:].any()


def test_maps_of_one_input_round_it_once_for_each_order(monkeypatch):
    made = []
    monkeypatch.setattr(
        "dsv4.ops.linear.triton.rows_of_codes", lambda x, kind: made.append(kind) or rows_of_codes(x, kind)
    )
    x, plain = tokens(2, 3, 64), torch.randn(7, 64, device=DEVICE)
    weights = [packed("fp4", 5, 64), packed("fp8", 6, 64), plain, packed("fp8", 4, 64)]
    found = linears(x, weights, wide=[False, True, False, False], backend="unproved")
    assert made == ["fp4", "fp8"]
    assert [y.shape for y in found] == [(2, 3, 5), (2, 3, 6), (2, 3, 7), (2, 3, 4)]
    for y, w, wide in zip(found, weights, [False, True, False, False], strict=True):
        assert torch.equal(y, run(x, w, wide))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(shape):
    x = torch.zeros(shape, device=DEVICE)
    assert run(x, packed("fp4", 5, 64)).shape == (*shape[:-1], 5)
    half = x.half().requires_grad_()
    out = run(half, torch.zeros(3, 64, dtype=torch.float16, device=DEVICE), True)
    assert out.shape == (*shape[:-1], 3)
    assert torch.autograd.grad(out.sum(), half)[0].shape == shape


def test_strided_rows_give_the_same_bits():
    x, w = tokens(6, 160), packed("fp4", 9, 160)
    assert torch.equal(run(x.T.contiguous().T, w), run(x, w))
    cut = Packed(w.codes.repeat(1, 2)[:, :80], w.scales.T.contiguous().T, "fp4")
    assert torch.equal(run(x, cut), run(x, w))


def test_where_a_gradient_passes_codes_it_is_that_of_portable():
    x, w = tokens(3, 64).requires_grad_(), packed("fp8", 5, 64)
    found, wanted = (torch.autograd.grad(linear(x, w, backend=b).sum(), x)[0] for b in ("unproved", "portable"))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_not_copied(kind):
    w = packed(kind, 5, 256)
    read = as_read(w)
    assert (read.numbers.data_ptr(), read.scales.data_ptr()) == (w.codes.data_ptr(), w.scales.data_ptr())


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_codes_that_begin_inside_of_a_word(kind):
    x, w = tokens(2, 256), packed(kind, 5, 256)
    codes, scales = (
        torch.cat([part.new_zeros(3), part.flatten()])[3:].view(part.shape) for part in (w.codes, w.scales)
    )
    assert torch.equal(run(x, Packed(codes, scales, kind)), run(x, w))


# Numbers


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_wide_maps_of_16_bits(dtype, is_whole):
    """Their products are exact, of a float32 weight too, and their gradients those of ``portable``."""
    x = torch.randn(2, 9, 70).to(DEVICE, dtype).requires_grad_()
    w = torch.randn(33, 70).to(DEVICE, torch.float32 if is_whole else dtype).requires_grad_()
    grad = torch.randn(2, 9, 33, device=DEVICE)
    with poisoned():
        out = run(x, w, True)
    assert out.dtype == torch.float32
    assert_near(out.detach(), x.detach().double() @ w.detach().double().T, torch.float32)
    found = torch.autograd.grad(out, (x, w), grad)
    wanted = torch.autograd.grad(portable.linear(x, w, True), (x, w), grad)
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))
    row = x.detach()[1, 4:5]
    assert torch.equal(run(row, w.detach(), True)[0], out[1, 4])


def test_nothing_is_read_behind_the_last_row():
    """Where a row of K goes on in the memory there is no number."""
    x, w = torch.randn(3, 70), torch.randn(5, 70)
    x, w = (torch.cat([part, torch.full((9, 70), torch.nan)]).to(DEVICE, torch.float16)[: len(part)] for part in (x, w))
    assert_near(run(x, w, True), x.double() @ w.double().T, torch.float32)
    for kind in ("fp4", "fp8"):
        coded = packed(kind, 5, 160)
        rows = torch.cat([torch.randn(2, 160), torch.full((2, 160), torch.nan)]).to(DEVICE)[:2]
        assert run(rows, coded).isfinite().all()


@pytest.mark.parametrize("wide", [False, True])
def test_other_maps_are_torchs(wide):
    x, w = torch.randn(3, 20, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    assert torch.equal(run(x, w, wide), portable.linear(x, w, wide))
    assert wide or torch.equal(run(x.half(), w), portable.linear(x.half(), w, False))
    assert torch.equal(run(x.double(), w.double(), wide), portable.linear(x.double(), w.double(), wide))
