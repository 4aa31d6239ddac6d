"""Packed matrices: what they may hold, every code under every scale, and FP4 in blocks of FP8."""

import math

import pytest
import torch

from dsv4 import native
from dsv4.ops.lowbit import Packed, dequantise, quantise_blocks, quantise_fp4, reblock

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler here")
BACKENDS = ["reference", "portable", pytest.param("native", marks=needs_compiler)]
PLAIN = ["reference", "portable"]
ALL = ("reference", "portable", "native")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ONE = 127  # the E8M0 code of 1
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def e4m3(code):
    """The value of an E4M3 code: 4 exponent bits with bias 7, 3 mantissa bits; only the last size is NaN."""
    sign, exponent, mantissa = (-1.0) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = [e4m3(code) for code in range(256)]


def bits(x):
    return x.float().contiguous().view(torch.int32)


def byte(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def fp4(rows, scales):
    """A packed matrix of E2M1 codes [O, I], a number each, and E8M0 scales."""
    codes = torch.tensor(rows, dtype=torch.uint8)
    return Packed(codes[..., 0::2] | codes[..., 1::2] << 4, torch.tensor(scales, dtype=torch.uint8), "fp4")


def random_fp4(*shape, low=100, high=115):
    """Any codes, and scales from 2^(low - 127) to below 2^(high - 127)."""
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    return Packed(codes, torch.randint(low, high, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8), "fp4")


# The matrix


def test_shape_and_bytes():
    packed = Packed(byte(3, 130, 48), byte(3, 130, 3), "fp4")
    assert (packed.shape, packed.num_bytes) == ((3, 130, 96), 3 * 130 * 51)
    packed = Packed(byte(3, 130, 257), torch.zeros(3, 2, 3), "fp8")
    assert (packed.shape, packed.num_bytes) == ((3, 130, 257), 3 * (130 * 257 + 4 * 6))


def test_a_packed_matrix_may_have_no_data():
    with torch.device("meta"):
        assert Packed(byte(256, 64), byte(256, 4), "fp4").num_bytes == 256 * 68


@pytest.mark.parametrize(
    ("codes", "scales", "kind", "message"),
    [
        (byte(2, 16), byte(2, 1), "fp6", "kind is 'fp6'; expected one of fp4, fp8"),
        (byte(2, 16).char(), byte(2, 1), "fp4", r"codes has dtype torch\.int8; expected torch\.uint8"),
        (byte(16), byte(1), "fp4", r"codes has shape \[16\]; expected at least one row and column"),
        (byte(0, 16), byte(0, 1), "fp8", r"codes has shape \[0, 16\]; expected at least one row and column"),
        (byte(2, 15), byte(2, 1), "fp4", r"codes has shape \[2, 15\]; expected \[\.\.\., O, I / 2\] with I a multiple"),
        (byte(2, 24), byte(2, 2), "fp4", r"codes has shape \[2, 24\]; expected .* multiple of 32 in fp4"),
        (byte(2, 16), torch.zeros(2, 1), "fp4", r"scales has dtype torch\.float32; expected torch\.uint8 in fp4"),
        (byte(2, 16), torch.zeros(1, 1).half(), "fp8", r"dtype torch\.float16; .*uint8 or torch\.float32 in fp8"),
        (byte(2, 32), byte(2, 1), "fp4", r"scales has shape \[2, 1\]; expected \[2, 2\] beside fp4 codes \[2, 32\]"),
        (byte(130, 32), byte(1, 1), "fp8", r"scales has shape \[1, 1\]; expected \[2, 1\] beside fp8 codes \[130,"),
        (byte(3, 2, 32), byte(1, 1), "fp8", r"scales has shape \[1, 1\]; expected \[3, 1, 1\]"),
    ],
)  # fmt: skip
def test_what_is_no_packed_matrix_is_an_error(codes, scales, kind, message):
    with pytest.raises(ValueError, match=message):
        Packed(codes, scales, kind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_that_are_no_number_are_refused(backend):
    scales = byte(2, 3)
    scales[1, 2] = scales[1, 0] = 255
    packed = Packed(byte(2, 48), scales, "fp4")
    message = r"scales holds 255 at \[1, 0\], and 2 such of 6; expected 0 to 254 \(E8M0\)"
    for call in (
        packed.check_scales,
        lambda: dequantise(packed, torch.float32, backend=backend),
        lambda: reblock(packed),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    wide = Packed(byte(2, 3), torch.tensor([[torch.nan]]), "fp8")
    with pytest.raises(ValueError, match=r"scales holds nan at \[0, 0\], and 1 such of 1; expected finite numbers"):
        dequantise(wide, torch.float32, backend=backend)


# Values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_of_e4m3_under_every_scale(backend, dtype):
    """A matrix of 255 blocks, the scale of each its number, with all codes in one row of each."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1).reshape(1, -1)  # [1, 255 x 256]
    scales = torch.arange(255, dtype=torch.uint8).repeat_interleave(2)[None]
    wanted = torch.tensor([value * 2.0 ** (scale - ONE) for scale in range(255) for value in E4M3], dtype=torch.float64)
    values = dequantise(Packed(codes, scales, "fp8"), dtype, backend=backend)
    assert values.dtype == dtype
    torch.testing.assert_close(values[0], wanted.float().to(dtype), rtol=0, atol=0, equal_nan=True)
    assert values[0].signbit()[wanted == 0].equal(wanted.signbit()[wanted == 0])
    fits = wanted.abs() < 2.0**128
    assert values[0].double()[fits].equal(wanted[fits]) or dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_of_e2m1_under_every_scale(backend, dtype):
    packed = fp4([[*range(16), *range(16)]] * 255, [[scale] for scale in range(255)])
    wanted = torch.tensor([[value * 2.0 ** (s - ONE) for value in E2M1 * 2] for s in range(255)], dtype=torch.float64)
    values = dequantise(packed, dtype, backend=backend)
    assert values.dtype == dtype
    assert bits(values).equal(bits(wanted.float().to(dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_scales_round_once(backend):
    scales = torch.randn(2, 3).abs() * 1e-3
    codes = torch.randint(0, 127, (130, 300), dtype=torch.uint8)
    exact = torch.tensor(E4M3, dtype=torch.float64)[codes.long()]
    exact *= scales.double().repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :300]
    packed = Packed(codes, scales, "fp8")
    assert dequantise(packed, torch.float32, backend=backend).equal(exact.float())
    assert dequantise(packed, torch.bfloat16, backend=backend).equal(exact.float().bfloat16())


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 32), (130, 160), (2, 3, 5, 64)])
def test_backends_agree_to_the_bit(shape):
    w = torch.randn(shape)
    strided = random_fp4(*shape, low=0, high=255)
    strided = Packed(strided.codes.mT.contiguous().mT, strided.scales.mT.contiguous().mT, "fp4")
    for packed in (quantise_fp4(w), quantise_blocks(w), quantise_blocks(w, torch.float32), strided):
        for dtype in DTYPES:
            wanted, *others = (dequantise(packed, dtype, backend=backend) for backend in ALL)
            assert all(bits(other).equal(bits(wanted)) for other in others)
            assert (wanted.dtype, wanted.shape) == (dtype, shape)


# FP4 in blocks of FP8


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("shape", [(1, 32), (128, 128), (130, 160), (2, 3, 64)])
def test_reblocking_keeps_values_whose_scales_are_within_two_to_the_14th(backend, shape):
    packed = random_fp4(*shape)
    blocks = reblock(packed, backend=backend)
    assert (blocks.kind, blocks.shape) == ("fp8", shape)
    assert bits(dequantise(blocks, torch.float32)).equal(bits(dequantise(packed, torch.float32)))
    most = packed.scales[..., :128, :4].flatten(-2).amax(-1)
    assert blocks.scales[..., 0, 0].equal(most - 6)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("distance", [0, 6, 13, 14, 15, 16, 17, 18, 40, 127, 200])
def test_reblocking_is_lossless_exactly_if_each_value_is_a_number_of_e4m3(backend, distance):
    """Each code alone in its group, beside a group whose scale is so much larger."""
    for code, value in enumerate(E2M1):
        packed = fp4([[7] * 32 + [0] * 7 + [code] + [0] * 24], [[200, 200 - distance]])
        scaled = value * 2.0 ** (6 - distance)
        if scaled in E4M3:
            assert bits(dequantise(reblock(packed, backend=backend), torch.float32)[0, 39]) == bits(
                torch.tensor(value * 2.0 ** (73 - distance))
            )
        else:
            assert distance > 14
            with pytest.raises(
                ValueError, match=r"packed has 1 values that FP8 lacks in block \[0, 0\], 1 such blocks of 1"
            ):
                reblock(packed, backend=backend)


@pytest.mark.parametrize("backend", PLAIN)
def test_reblocking_names_the_block_that_loses(backend):
    packed = random_fp4(2, 300, 160)
    packed.codes[1, 200, 64:67] = 0x11  # 0.5: six numbers of the fifth group of a row in block 1, 1
    packed.scales[1, 200, 4] = 40
    packed.codes[1, 200, 67:80] = 0
    message = r"packed has 6 values that FP8 lacks in block \[1, 1, 1\], 1 such blocks of 12; expected .* or lossy=True"
    with pytest.raises(ValueError, match=message):
        reblock(packed, backend=backend)


@pytest.mark.parametrize("backend", PLAIN)
def test_lossy_reblocking_takes_the_nearest_ties_to_the_even_code(backend):
    """At 2^-15 of the largest a code is worth 2^-9, the least of E4M3: 0.5, 1.5 and 3 times it."""
    packed = fp4([[7] * 32 + [1, 3, 9, 11, 2, 5, 10] + [0] * 25], [[200, 185]])
    blocks = reblock(packed, lossy=True, backend=backend)
    assert blocks.codes[0, 32:39].tolist() == [0, 2, 128, 130, 1, 3, 129]
    assert blocks.codes[0, 0] == 0x7C  # 384
    far = reblock(fp4([[7] * 64], [[254, 0]]), lossy=True, backend=backend)
    assert far.codes.tolist() == [[0x7C] * 32 + [0] * 32]


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("largest", [0, 1, 5, 6])
def test_the_scale_of_a_block_is_never_below_the_least(backend, largest):
    packed = fp4([[*range(16)] * 4], [[largest, 0]])
    blocks = reblock(packed, backend=backend)
    assert blocks.scales.tolist() == [[0]]
    assert bits(dequantise(blocks, torch.float32)).equal(bits(dequantise(packed, torch.float32)))


@pytest.mark.parametrize("lossy", [False, True])
def test_what_is_not_fp4_is_not_reblocked(lossy):
    with pytest.raises(ValueError, match="packed is fp8; expected fp4"):
        reblock(Packed(byte(2, 32), byte(1, 1), "fp8"), lossy=lossy)


def test_backends_agree_on_blocks():
    packed = random_fp4(2, 130, 160, low=80, high=130)
    wanted, got = (reblock(packed, lossy=True, backend=backend) for backend in PLAIN)
    assert got.codes.equal(wanted.codes)
    assert got.scales.equal(wanted.scales)
    messages = []
    for backend in PLAIN:
        with pytest.raises(ValueError, match="values that FP8 lacks") as error:
            reblock(packed, backend=backend)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
