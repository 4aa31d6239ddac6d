"""Codes and scales against the formats' own formulas, over every code, tie and power of two, on all backends."""

import math
from bisect import bisect_right

import pytest
import torch

from dsv4 import native
from dsv4.ops.lowbit import dequantise, quantise_blocks, quantise_fp4, quantise_rows

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler here")
BACKENDS = ["reference", "portable", pytest.param("native", marks=needs_compiler)]
ALL = ("reference", "portable", "native")
ONE = 127  # the E8M0 code of 1
LARGEST_FLOAT = 3.4028234663852886e38


def e4m3(code):
    """The value of an E4M3 code: 4 exponent bits with bias 7, 3 mantissa bits; only the last size is NaN."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = [e4m3(code) for code in range(127)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(size, table):
    """The code of the nearest value, by the midpoint of its two neighbours, the even code at a midpoint."""
    low = min(bisect_right(table, size), len(table) - 1) - 1
    middle = (table[low] + table[low + 1]) / 2
    return low + (size > middle or (size == middle and low % 2 == 1))


def single(x):
    """x in float32."""
    return torch.tensor(x, dtype=torch.float32).item()


def released_scale(most, largest, floor):
    """The E8M0 code as the released kernels reckon it: exponent bits in float32, one more if the mantissa is not 0."""
    ratio = most.clamp(min=floor) * torch.tensor(1 / largest, dtype=torch.float32)
    bits = ratio.view(torch.int32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).to(torch.uint8)


def neighbourhood(largest, exponents):
    """Powers of two times the largest value and one, each with its float32 neighbours."""
    sizes = torch.tensor([x * 2.0**e for e in exponents for x in (largest, 1.0)], dtype=torch.float32)
    sides = [torch.nextafter(sizes, torch.tensor(side)) for side in (0.0, torch.inf)]
    sizes = torch.cat([sizes, *sides])
    return sizes[sizes.isfinite()]


def ties(table):
    """Each midpoint of neighbouring values with the even code of the two, and what lies just beside it."""
    for low in range(len(table) - 1):
        middle = torch.tensor((table[low] + table[low + 1]) / 2)
        yield middle.item(), low + low % 2
        yield torch.nextafter(middle, torch.tensor(0.0)).item(), low
        yield torch.nextafter(middle, torch.tensor(torch.inf)).item(), low + 1


def nibbles(codes):
    """The codes of bytes, the low nibble first."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def rough(*shape):
    """Numbers of all magnitudes, subnormal ones and zeros of both signs among them, finite."""
    x = torch.randn(shape) * 2.0 ** torch.randint(-140, 120, (*shape[:-1], 1)).float()
    x = torch.where(torch.rand(shape) < 0.1, x * 2.0 ** torch.randint(-30, 4, shape), x)
    return torch.where(torch.rand(shape) < 0.03, 0.0 * x, x).clamp(-1e38, 1e38)


# Activations: E4M3 in groups of a row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [-22, -3, 0, 1, 17, 119])
def test_every_number_of_e4m3_keeps_its_code(backend, exponent):
    row = torch.tensor([448.0, *E4M3]) * 2.0**exponent  # a group of 128
    codes, scales = quantise_rows(torch.stack([row, -row]), backend=backend)
    assert codes.tolist() == [[126, *range(127)], [254, *range(128, 255)]]
    assert scales.tolist() == [[ONE + exponent]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_round_to_nearest_and_ties_to_the_even_code(backend):
    values, wanted = zip(*ties(E4M3), strict=True)
    row = torch.tensor([448.0, *values])
    codes, scales = quantise_rows(torch.stack([row, -row]), 512, backend=backend)
    assert codes[:, 1:].tolist() == [[*wanted], [128 + code for code in wanted]]
    assert scales.tolist() == [[ONE]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bfloat16_number_up_to_the_largest(backend):
    sizes = torch.arange(0x43E1, dtype=torch.int16).view(torch.bfloat16)
    assert sizes[-1] == 448
    codes, _ = quantise_rows(sizes, 1 << 15, backend=backend)
    assert codes.tolist() == [nearest(size, E4M3) for size in sizes.tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_of_activations_is_the_released_one(backend):
    sizes = neighbourhood(448.0, range(-30, 120))
    _, scales = quantise_rows(-sizes[:, None], backend=backend)
    assert scales[:, 0].equal(released_scale(sizes, 448, 1e-4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("largest", "exponent"),
    [
        (448.0, 0),
        (448 - 2.0**-15, 0),
        (448 + 2.0**-15, 1),  # its float32 neighbours
        (256.0, 0),
        (224.0, -1),
        (1e-4, -22),
        (1e-9, -22),
        (2.0**-149, -22),
        (0.0, -22),
        (LARGEST_FLOAT, 120),
    ],
)
def test_the_scale_of_activations_written_out(backend, largest, exponent):
    assert quantise_rows(torch.tensor([0.0, -largest, 0.0]), backend=backend)[1].tolist() == [ONE + exponent]


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_below_the_floor_still_round_to_the_grid_of_the_floor(backend):
    """The floor's scale is 2^-22: of 2^-9 of that, a half is a tie and goes to zero."""
    step = 2.0**-31
    row = torch.tensor([step, step / 2, 1.5 * step, 0.51 * step, -step / 2, 0.0, -0.0])
    assert quantise_rows(row, backend=backend)[0].tolist() == [1, 0, 2, 1, 128, 0, 128]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("width", "group"), [(1, 128), (127, 128), (129, 128), (64, 64), (75, 8), (5, 1)])
def test_each_group_of_a_row_has_its_scale_the_last_may_be_short(backend, width, group):
    x = rough(2, 3, width)
    codes, scales = quantise_rows(x, group, backend=backend)
    assert codes.shape == x.shape
    assert scales.shape == (2, 3, -(-width // group))
    for first in range(0, width, group):
        part = x[..., first : first + group]
        own = released_scale(part.abs().amax(-1), 448, 1e-4)
        assert scales[..., first // group].equal(own)
        scaled = part.double() / torch.exp2(own.double() - 127)[..., None]
        sizes = torch.tensor([nearest(size, E4M3) for size in scaled.abs().flatten().tolist()])
        assert codes[..., first : first + group].flatten().equal((sizes + 128 * part.signbit().flatten()).byte())


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_that_are_no_number_stay_so_and_infinite_ones_are_cut_off(backend):
    codes, scales = quantise_rows(
        torch.tensor([[1.0, torch.nan, 448.0], [torch.inf, -torch.inf, 1.0]]), backend=backend
    )
    assert (codes % 128).tolist() == [[0x38, 0x7F, 0x7E], [0x7E, 0x7E, 0]]
    assert scales.tolist() == [[ONE], [ONE + 120]]


# FP4 weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp4_byte_by_byte_the_low_nibble_first(backend):
    row = torch.tensor([*E2M1, *(-x for x in E2M1), 6.0, *[0.0] * 14, -1.0])
    packed = quantise_fp4(torch.stack([row, row / 4]), backend=backend)
    written = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, 0x07, *[0] * 6, 0xA0]
    assert packed.codes.tolist() == [written] * 2
    assert packed.scales.tolist() == [[ONE], [ONE - 2]]
    assert (packed.kind, packed.shape, packed.num_bytes) == ("fp4", (2, 32), 34)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [-126, -125, -3, 0, 1, 17, 125])
def test_every_number_of_e2m1_keeps_its_code(backend, exponent):
    row = torch.tensor([*E2M1, *(-x for x in E2M1)] * 2) * 2.0**exponent
    packed = quantise_fp4(row[None], backend=backend)
    assert nibbles(packed.codes).tolist() == [[*range(16)] * 2]
    assert packed.scales.tolist() == [[ONE + exponent]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp4_rounds_to_nearest_and_ties_to_the_even_code(backend):
    values, wanted = zip(*ties(E2M1), strict=True)
    row = torch.tensor([6.0, *values, *[0.0] * 10])
    packed = quantise_fp4(torch.stack([row, -row]), backend=backend)
    codes = nibbles(packed.codes)[:, 1:22]
    assert codes.tolist() == [[*wanted], [8 + code for code in wanted]]
    assert packed.scales.tolist() == [[ONE]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_of_fp4_is_the_released_one(backend):
    sizes = torch.cat([neighbourhood(6.0, range(-130, 126, 4)), torch.tensor([0.0, 2.0**-149, LARGEST_FLOAT])])
    rows = torch.zeros(len(sizes), 32)
    rows[:, 17] = -sizes
    wanted = released_scale(sizes, 6, 6 * 2.0**-126)
    assert quantise_fp4(rows, backend=backend).scales[:, 0].equal(wanted)
    assert (wanted.min(), wanted.max()) == (1, 253)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (2, 5, 64)])
def test_each_group_of_fp4_in_loops(backend, shape):
    w = rough(*shape)
    packed = quantise_fp4(w, backend=backend)
    groups = w.reshape(-1, 32)
    scales = released_scale(groups.abs().amax(-1), 6, 6 * 2.0**-126)
    assert packed.scales.flatten().equal(scales)
    scaled = (groups.double() / torch.exp2(scales.double() - 127)[:, None]).flatten().tolist()
    wanted = [nearest(abs(value), E2M1) + 8 * (math.copysign(1, value) < 0) for value in scaled]
    assert nibbles(packed.codes).flatten().tolist() == wanted


# FP8 weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 128), (130, 131), (2, 129, 10)])
def test_each_block_of_fp8_in_loops(backend, scale_dtype, shape):
    w = torch.randn(shape) * 2.0 ** torch.randint(-9, 9, shape)
    packed = quantise_blocks(w, scale_dtype, backend=backend)
    assert packed.codes.shape == w.shape
    flat, codes = w.reshape(-1, *shape[-2:]), packed.codes.reshape(-1, *shape[-2:])
    scales = packed.scales.reshape(-1, *packed.scales.shape[-2:])
    for i in range(len(flat)):
        for down in range(0, shape[-2], 128):
            for right in range(0, shape[-1], 128):
                block = flat[i, down : down + 128, right : right + 128].flatten()
                scale = scales[i, down // 128, right // 128]
                if scale_dtype == torch.uint8:
                    assert scale == released_scale(block.abs().max(), 448, 1e-4)
                    scaled = (block.double() / 2.0 ** (scale.item() - 127)).tolist()
                else:
                    assert scale.item() == single(block.abs().max().item() / 448)
                    scaled = (block / scale).tolist()
                wanted = [nearest(abs(value), E4M3) + 128 * (value < 0) for value in scaled]
                assert codes[i, down : down + 128, right : right + 128].flatten().tolist() == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_zeros_has_the_scale_of_the_floor(backend):
    w = torch.zeros(2, 2)
    w[1, 0] = -0.0
    packed, wide = (quantise_blocks(w, dtype, backend=backend) for dtype in (torch.uint8, torch.float32))
    assert packed.codes.tolist() == wide.codes.tolist() == [[0, 0], [128, 0]]
    assert packed.scales.tolist() == [[ONE - 22]]
    assert wide.scales.tolist() == [[single(single(1e-4) / 448)]]


# Round trips, and all backends


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_quantised_keeps_its_codes(backend):
    """Where a group's largest is in the upper half of the codes' range: else its scale could be smaller."""
    w = torch.randn(130, 32)
    w[:, ::32], w[::64] = 5.9, 5.9
    for packed in (
        quantise_fp4(w, backend=backend),
        quantise_blocks(w, backend=backend),
        quantise_blocks(w, torch.float32, backend=backend),
    ):
        values = dequantise(packed, torch.float32, backend=backend)
        if packed.kind == "fp4":
            again = quantise_fp4(values, backend=backend)
        else:
            again = quantise_blocks(values, packed.scales.dtype, backend=backend)
        assert again.codes.equal(packed.codes)
        torch.testing.assert_close(again.scales, packed.scales, rtol=2**-23, atol=0)  # exact in bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_quantised_keeps_its_values(backend):
    w = rough(40, 64)
    for quantise in (quantise_fp4, quantise_blocks):
        values = dequantise(quantise(w, backend=backend), torch.float32, backend=backend)
        again = dequantise(quantise(values, backend=backend), torch.float32, backend=backend)
        assert again.view(torch.int32).equal(values.view(torch.int32))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_to_the_bit(dtype):
    x = rough(60, 203).to(dtype)
    wanted, *others = (quantise_rows(x, 64, backend=backend) for backend in ALL)
    assert all(codes.equal(wanted[0]) and scales.equal(wanted[1]) for codes, scales in others)
    for quantise in (
        lambda backend: quantise_fp4(x[:, :192], backend=backend),
        lambda backend: quantise_blocks(x, backend=backend),
        lambda backend: quantise_blocks(x, torch.float32, backend=backend),
    ):
        wanted, *others = (quantise(backend) for backend in ALL)
        assert all(got.codes.equal(wanted.codes) and got.scales.equal(wanted.scales) for got in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_and_no_rows(backend):
    w = torch.randn(5, 96, 3).permute(2, 0, 1)  # [3, 5, 96]
    assert quantise_fp4(w, backend=backend).codes.equal(quantise_fp4(w.contiguous(), backend=backend).codes)
    assert quantise_blocks(w, backend=backend).codes.equal(quantise_blocks(w.contiguous(), backend=backend).codes)
    assert quantise_rows(w, backend=backend)[0].equal(quantise_rows(w.contiguous(), backend=backend)[0])
    codes, scales = quantise_rows(torch.zeros(0, 200), backend=backend)
    assert (codes.shape, scales.shape) == ((0, 200), (0, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_rounded_to_float32_first(backend):
    x = torch.randn(3, 128, dtype=torch.float64)
    assert quantise_rows(x, backend=backend)[0].equal(quantise_rows(x.float(), backend=backend)[0])
    assert quantise_fp4(x, backend=backend).codes.equal(quantise_fp4(x.float(), backend=backend).codes)


# Errors

W = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantise_fp4(torch.ones(2, 48)),
            r"w has shape \[2, 48\]; expected \[\.\.\., O, I\], .* I a multiple of 32",
        ),
        (lambda: quantise_fp4(torch.ones(64)), r"w has shape \[64\]; expected \[\.\.\., O, I\]"),
        (lambda: quantise_blocks(torch.ones(0, 64)), r"w has shape \[0, 64\]; expected .* at least one row and column"),
        (lambda: quantise_blocks(W.long()), r"w has dtype torch\.int64; expected a floating-point dtype"),
        (lambda: quantise_blocks(W, torch.bfloat16), r"scale_dtype is torch\.bfloat16; expected torch\.uint8 or"),
        (lambda: quantise_rows(torch.ones(2, 0)), r"x has shape \[2, 0\]; expected \[\.\.\., channels\], at least one"),
        (lambda: quantise_rows(torch.tensor(1.0)), r"x has shape \[\]; expected \[\.\.\., channels\]"),
        (lambda: quantise_rows(W, 0), "group is 0; expected at least 1"),
        (lambda: quantise_rows(W, backend="cuda"), "backend is 'cuda'; expected one of reference, portable, native"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("quantise", [quantise_fp4, quantise_blocks])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(quantise, bad):
    w = torch.ones(2, 64)
    w[1, 7] = w[1, 9] = bad
    with pytest.raises(ValueError, match=rf"w holds {bad} at \[1, 7\], and 2 such of 128; expected finite numbers"):
        quantise(w)
