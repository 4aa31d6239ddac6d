"""Rounding and back: the values of the codes, unbiased, each group by itself, gradients straight through."""

import pytest
import torch
import torch.nn.functional as F

from dsv4 import native
from dsv4.ops import rows
from dsv4.ops.hadamard import hadamard
from dsv4.ops.lowbit import (
    dequantise,
    quantise_blocks,
    quantise_fp4,
    quantise_rows,
    reference,
    round_blocks,
    round_fp4,
    round_index,
    round_rows,
)

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler here")
BACKENDS = ["reference", "portable", pytest.param("native", marks=needs_compiler)]
FAST = ["portable", pytest.param("native", marks=needs_compiler)]
ALL = ("reference", "portable", "native")
DTYPES = [torch.float32, torch.bfloat16]


def bits(x):
    return x.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()])


def rough(*shape):
    """Numbers of all magnitudes, subnormal ones and zeros of both signs among them."""
    x = torch.randn(shape) * 2.0 ** torch.randint(-140, 120, (*shape[:-1], 1)).float()
    x = torch.where(torch.rand(shape) < 0.1, x * 2.0 ** torch.randint(-30, 4, shape), x)
    return torch.where(torch.rand(shape) < 0.03, 0.0 * x, x)


# Activations


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "group", "channels"), [(128, 128, None), (200, 128, None), (72, 64, 56), (9, 4, 1)])
def test_rows_are_the_values_of_their_codes(backend, dtype, width, group, channels):
    x = (torch.randn(3, 5, width) * 2.0 ** torch.randint(-20, 20, (3, 5, width))).to(dtype)
    y = round_rows(x, group, channels, backend=backend)
    channels = width if channels is None else channels
    codes, scales = quantise_rows(x[..., :channels], group)
    numbers = codes.contiguous().view(torch.float8_e4m3fn).double()
    wanted = numbers * torch.exp2(scales.double() - 127).repeat_interleave(group, -1)[..., :channels]
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert y[..., :channels].double().equal(wanted)
    assert bits(y[..., channels:]).equal(bits(x[..., channels:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_the_cache_then_lose_nothing_by_being_packed(backend):
    x = rough(40, 136).bfloat16()
    y = round_rows(x, 64, 128, backend=backend)
    packed = rows.pack(y, row_format="packed", rotary_dims=8)
    stored = rows.unpack(packed, row_format="packed", channels=136, rotary_dims=8, dtype=torch.bfloat16)
    assert bits(stored).equal(bits(y))
    assert rows.pack(x, row_format="packed", rotary_dims=8)[:, :128].equal(quantise_rows(x[:, :128], 64)[0])
    straight = rows.pack(x, row_format="packed", rotary_dims=8)
    stored = rows.unpack(straight, row_format="packed", channels=136, rotary_dims=8, dtype=torch.bfloat16)
    assert bits(stored).equal(bits(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_index_rows_written_out(backend):
    """Sums 6, 2, 4, 0 and halves of them; a quarter of the largest is a tie."""
    x = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.75, 0.5, 0.25, 0.0]])
    assert hadamard(x)[0].tolist() == [3, 1, 2, 0]
    assert round_index(x, backend=backend).tolist() == [[3, 1, 2, 0], [0.75, 0.25, 0.5, 0]]
    x = torch.tensor([[5.0, 0.5, -0.25, 0.125]])  # transformed 2.6875, 2.0625, 2.8125, 2.4375, of scale 2^-1
    assert hadamard(x)[0].tolist() == [2.6875, 2.0625, 2.8125, 2.4375]
    assert round_index(x, backend=backend).tolist() == [[3, 2, 3, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 32, 128])
def test_index_rows_are_what_the_cache_keeps(backend, dtype, width):
    x = torch.randn(30, 2, width).to(dtype)
    y = round_index(x, backend=backend)
    turned = hadamard(x)  # the same order of sums
    kept = rows.pack_index(turned, row_format="packed")
    wanted = rows.unpack_index(kept, row_format="packed", channels=width, dtype=dtype)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert bits(y).equal(bits(wanted))
    again = rows.unpack_index(rows.pack_index(y, row_format="packed"), row_format="packed", channels=width, dtype=dtype)
    assert bits(again).equal(bits(y))


def test_the_sums_of_the_reference_are_the_hadamard_transform():
    x = torch.randint(-99, 99, (5, 64)).double()  # exact sums
    assert (reference.hadamard(x) / 8).equal(hadamard(x, backend="reference"))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 4, 16, 64, 256])
def test_backends_agree_on_rows_to_the_bit(dtype, width):
    x = rough(50, width).to(dtype)
    for operation in (
        lambda backend: round_rows(x, 48, backend=backend),
        lambda backend: round_rows(x, 128, -(-width // 3), backend=backend),
        lambda backend: round_index(x, backend=backend),
    ):
        wanted, *others = (operation(backend) for backend in ALL)
        assert wanted.dtype == dtype
        assert all(bits(other).equal(bits(wanted)) for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_so(backend, dtype):
    x = torch.ones(2, 70, dtype=dtype)
    x[0, 3], x[0, 68], x[1, 2] = torch.nan, -torch.nan, torch.inf
    y = round_rows(x, 64, backend=backend)
    assert y.isnan().equal(x.isnan())
    assert y[1, 2].isposinf()  # as the largest code of its scale, 448 x 2^120, is in float32
    w = torch.ones(1, 96, dtype=dtype)
    w[0, 40] = torch.nan
    assert round_fp4(w, backend=backend)[0].isnan().tolist() == [False] * 32 + [True] * 32 + [False] * 32
    assert round_blocks(w, backend=backend).isnan().equal(w.isnan())
    assert round_index(w[:, 32:64], backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_nan_stays_one(backend):
    """Those whose bits are near the ends of what is no number, too."""
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
    x = patterns.view(torch.float32)
    assert x.isnan().all()
    assert round_rows(x, backend=backend).isnan().all()
    assert round_index(x[:1], backend=backend).isnan().all()


# Weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 32), (130, 64), (2, 3, 96)])
def test_weights_are_what_is_read_from_their_codes(backend, dtype, shape):
    w = torch.randn(shape) * 2.0 ** torch.randint(-9, 9, shape)
    y = round_fp4(w, dtype=dtype, backend=backend)
    assert bits(y).equal(bits(dequantise(quantise_fp4(w), dtype)))
    y = round_blocks(w, dtype=dtype, backend=backend)
    assert bits(y).equal(bits(dequantise(quantise_blocks(w), dtype)))
    assert (y.dtype, y.shape) == (dtype, shape)


@needs_compiler
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_backends_agree_on_weights_to_the_bit(given, dtype):
    w = rough(131, 160).to(given)
    for operation in (round_fp4, round_blocks):
        wanted, *others = (operation(w, dtype=dtype, backend=backend) for backend in ALL)
        assert wanted.dtype == dtype
        assert all(bits(other).equal(bits(wanted)) for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", [round_fp4, round_blocks, round_rows])
def test_rounding_twice_is_rounding_once(backend, operation):
    x = rough(40, 64)
    once = operation(x, backend=backend)
    assert bits(operation(once, backend=backend)).equal(bits(once))


# Bias


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["rows", "fp4", "blocks"])
def test_rounding_has_no_bias(backend, name):
    """Numbers spread evenly up to the largest, with which each group begins, so that its scale is 1.

    An error is even about 0 between any two neighbouring codes, so the mean of n of them has the deviation
    of one over sqrt(n): 4.5 of it is passed by chance once in 150,000. Cutting off in place of rounding gives hundreds.
    """
    largest = {"rows": 448.0, "fp4": 6.0, "blocks": 448.0}[name]
    operation = {"rows": round_rows, "fp4": round_fp4, "blocks": round_blocks}[name]
    x = torch.rand(1024, 128) * largest
    x[:, ::32] = largest
    signed = x * torch.where(torch.rand(len(x), 1) < 0.5, -1.0, 1.0)
    error = (operation(signed, backend=backend) - signed).double() * signed.sign()
    assert error.abs().max() > largest / 64
    n = (error != 0).sum()
    assert abs(error.sum()) < 4.5 * n.sqrt() * error[error != 0].std()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("operation", [round_rows, round_fp4, round_blocks])
def test_ties_go_up_as_often_as_down(backend, operation):
    """All midpoints of two neighbouring codes within one binade: half the spacing, one way and then the other."""
    is_fp4 = operation is round_fp4
    largest, codes = (6.0, 2) if is_fp4 else (448.0, 8)
    starts = [1.0, 2.0] if is_fp4 else [2.0**e for e in range(-6, 8)]
    for start in starts:
        ties = start * (1 + (torch.arange(codes) + 0.5) / codes)
        x = F.pad(torch.cat([torch.tensor([largest]), ties]), (0, 31 - codes))[None]
        error = (operation(x, backend=backend) - x)[0, 1 : 1 + codes]
        assert error.abs().tolist() == [start / codes / 2] * codes
        assert error.sum() == 0


# Independence


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(backend, threads):
    x = torch.randn(300, 128).bfloat16()  # enough for several threads
    alone = {
        operation: torch.cat([operation(x[i : i + 1], backend=backend) for i in (0, 7, 299)])
        for operation in (round_rows, round_index)
    }
    codes, scales = zip(*(quantise_rows(x[i], backend=backend) for i in (0, 7, 299)), strict=True)
    torch.set_num_threads(threads)
    for operation, wanted in alone.items():
        assert bits(operation(x, backend=backend)[[0, 7, 299]]).equal(bits(wanted))
    got = quantise_rows(x, backend=backend)
    assert got[0][[0, 7, 299]].equal(torch.stack(codes))
    assert got[1][[0, 7, 299]].equal(torch.stack(scales))


@pytest.mark.parametrize("backend", FAST)
def test_threads_change_no_weight(backend):
    w = torch.randn(3, 140, 160)
    calls = (
        lambda: round_fp4(w, backend=backend),
        lambda: round_blocks(w, backend=backend),
        lambda: dequantise(quantise_fp4(w, backend=backend), torch.float32, backend=backend),
        lambda: dequantise(quantise_blocks(w, backend=backend), torch.float32, backend=backend),
    )
    alone = [call() for call in calls]
    torch.set_num_threads(3)
    for call, wanted in zip(calls, alone, strict=True):
        assert bits(call()).equal(bits(wanted))
    assert bits(alone[1][1]).equal(bits(round_blocks(w[1], backend=backend)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_and_no_rows(backend):
    x = torch.randn(32, 5, 6).permute(2, 1, 0)[::2]  # [3, 5, 32]
    kept = x.clone()
    for operation in (round_rows, round_index, round_fp4, round_blocks):
        assert operation(x, backend=backend).equal(operation(x.contiguous(), backend=backend))
    assert x.equal(kept)
    for operation in (round_rows, round_index):
        assert operation(torch.zeros(0, 7, 16), backend=backend).shape == (0, 7, 16)


# Gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_go_straight_through(backend, dtype):
    x = torch.randn(3, 64).to(dtype).requires_grad_()
    grad = torch.randn(3, 64).to(dtype)
    for y in (round_rows(x, 32, 40, backend=backend), round_fp4(x, dtype=dtype, backend=backend)):
        assert torch.autograd.grad(y, x, grad)[0].equal(grad)
    y = round_index(x, backend=backend)
    assert torch.autograd.grad(y, x, grad)[0].equal(hadamard(grad, backend=backend))
    for operation in (round_rows, round_index, round_fp4, round_blocks):
        plain = operation(x.detach(), backend=backend)
        watched = operation(x, backend=backend)
        assert not plain.requires_grad
        assert watched.requires_grad
        assert bits(watched.detach()).equal(bits(plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", [round_fp4, round_blocks])
def test_master_weights_get_their_gradient_in_float32(backend, operation):
    w = torch.randn(3, 32, requires_grad=True)
    grad = torch.randn(3, 32).bfloat16()
    y = operation(w, dtype=torch.bfloat16, backend=backend)
    (got,) = torch.autograd.grad(y, w, grad)
    assert (y.dtype, got.dtype) == (torch.bfloat16, torch.float32)
    assert got.equal(grad.float())


@pytest.mark.parametrize("operation", [round_fp4, round_blocks])
def test_the_backward_pass_multiplies_by_the_same_rounded_values(operation):
    """Not by ones rounded anew in groups along the other axis, as kernels do that want a transposed weight."""
    x, w, grad = torch.randn(5, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True), torch.randn(5, 96)
    F.linear(round_rows(x), operation(w)).backward(grad)
    assert x.grad.equal(grad @ operation(w.detach()))
    assert w.grad.equal(grad.T @ round_rows(x.detach()))
    if operation is round_fp4:
        assert not operation(w.detach()).equal(operation(w.detach().T).T)


# Errors

X = torch.ones(2, 48)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: round_rows(X, 64, 0), "channels is 0; expected 1 to 48, those of x"),
        (lambda: round_rows(X, 64, 49), "channels is 49; expected 1 to 48, those of x"),
        (lambda: round_rows(X, 0), "group is 0; expected at least 1"),
        (lambda: round_rows(X.long()), r"x has dtype torch\.int64; expected a floating-point dtype"),
        (lambda: round_index(X), "x has 48 channels; expected a power of two"),
        (lambda: round_index(torch.ones(2, 0)), r"x has shape \[2, 0\]; expected \[\.\.\., channels\], at least one"),
        (lambda: round_fp4(X), r"w has shape \[2, 48\]; expected .* I a multiple of 32"),
        (lambda: round_fp4(X[0]), r"w has shape \[48\]; expected \[\.\.\., O, I\]"),
        (lambda: round_blocks(X.long()), r"w has dtype torch\.int64; expected a floating-point dtype"),
        (lambda: round_rows(X, backend="cuda"), "backend is 'cuda'; expected one of reference, portable, native"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
