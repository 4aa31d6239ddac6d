"""The kernels of low precision: bit for bit the reference, over every code, tie, power of two and kind of number."""

import pytest
import torch
import triton.language as tl
from triton import jit

from dsv4.ops.lowbit import Packed, reference, triton
from dsv4.ops.lowbit.tables import E2M1, E4M3
from dsv4.ops.lowbit.triton_codes import cast
from tests.ops.triton_lane import DEVICE, poisoned

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # infinity, by the interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGEST_FLOAT = 3.4028234663852886e38
TINY = 2.0**-149


def bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(found, wanted):
    """Whether two tensors have the same bits, but that any NaN is as good as another among values."""
    if isinstance(found, tuple):
        return all(same(*pair) for pair in zip(found, wanted, strict=True))
    found = found.cpu()
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return False
    equal = bits(found) == bits(wanted)
    return bool((equal | found.isnan() & wanted.isnan() if found.is_floating_point() else equal).all())


def check(name, x, *rest):
    """What a kernel makes of x, over memory full of NaN, is what the reference makes of it."""
    with poisoned():
        found = getattr(triton, name)(x.to(DEVICE), *rest)
    assert same(found, getattr(reference, name)(x, *rest))


def check_all(x, group=128):
    """Every function that takes rows of numbers, x [rows, 32 n]."""
    check("quantise_rows", x, group)
    check("round_rows", x, group, x.shape[-1])
    check("quantise_fp4", x)
    check("round_fp4", x, x.dtype)
    check("round_blocks", x, x.dtype)
    if x.isfinite().all():
        check("quantise_blocks", x, torch.uint8)
        check("quantise_blocks", x, torch.float32)


def rough(*shape):
    """Numbers of all magnitudes, subnormal ones and zeros of both signs among them."""
    x = torch.randn(shape) * 2.0 ** torch.randint(-140, 120, (*shape[:-1], 1)).float()
    x = torch.where(torch.rand(shape) < 0.1, x * 2.0 ** torch.randint(-30, 4, shape), x)
    return torch.where(torch.rand(shape) < 0.03, 0.0 * x, x)


def neighbours(values):
    """Each value with the float32 numbers beside it."""
    values = torch.tensor(values, dtype=torch.float32)
    return torch.cat([values, *(torch.nextafter(values, torch.tensor(side)) for side in (-torch.inf, torch.inf))])


def midpoints(code):
    """What lies halfway between two neighbouring values."""
    return [(low + high) / 2 for low, high in zip(code.values, code.values[1:], strict=False)]


def rows_below(largest, values, width):
    """Values in rows of so many, each group of 32 led by ``largest``, and their negatives."""
    values = values[values.abs() <= largest]
    led = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    led = torch.cat([torch.full((len(led), 1), largest), led], dim=1)  # [groups, 32]
    led = torch.nn.functional.pad(led, (0, 0, 0, -len(led) % (width // 32))).view(-1, width)
    return torch.cat([led, -led])


# Every value


@jit
def _cast_kernel(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, cast(tl.load(x + at), y.dtype.element_ty))


def test_bfloat16_is_rounded_to_as_torch_does():
    """Ties, what carries into the exponent, infinity, and NaN of all bits, which is that of a GPU."""
    upper = torch.tensor([0, 1, 0x7F, 0x80, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF])
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] << 16 | lower).flatten()
    bits = torch.cat([bits, bits - 2**31, torch.zeros(256 - 2 * len(bits), dtype=torch.int64)]).int()
    x, y = bits.to(DEVICE).view(torch.float32), torch.empty(256, dtype=torch.int16, device=DEVICE)
    _cast_kernel[(1,)](x, y, 256)
    assert same(y.view(torch.bfloat16), bits.view(torch.float32).bfloat16())


@pytest.mark.parametrize("code", [E4M3, E2M1], ids=["e4m3", "e2m1"])
@pytest.mark.parametrize("exponent", [-20, -1, 0, 3, 100])
def test_every_value_every_tie_and_what_lies_beside_them(code, exponent):
    values = neighbours([*code.values, *midpoints(code)])
    check_all(rows_below(code.largest, values, 32) * 2.0**exponent, 32)


def test_every_bfloat16_up_to_the_largest():
    sizes = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    row = sizes[:0x43E1]
    assert row[-1] == 448
    check("quantise_rows", torch.stack([row, -row]), 1 << 15)
    for largest in (448.0, 6.0):
        check_all(rows_below(largest, sizes[::41].float(), 96).bfloat16(), 32)


def test_every_power_of_two_and_its_neighbours_as_the_largest():
    """What a scale hangs on: the largest alone in its group, from the least subnormal to the largest float32."""
    sizes = [2.0**e for e in range(-149, 128)]
    sizes += [1.75 * 2.0**e for e in range(-140, 128)] + [1.5 * 2.0**e for e in range(-140, 128)]
    sizes = torch.cat([neighbours(sizes), torch.tensor([0.0, 1e-4, LARGEST_FLOAT])])
    sizes = sizes[sizes.isfinite()]
    x = torch.zeros(len(sizes), 32)
    x[:, 13] = -sizes
    x[:, 29] = sizes / 3
    check("quantise_rows", x, 32)
    check("round_rows", x, 32, 32)
    check("quantise_fp4", x)
    check("round_fp4", x, torch.float32)


def test_the_floor_of_a_group_and_what_is_below_it():
    """Scales stay at 2^-22 and 2^-126; codes of what is subnormal in them, down to the least float32."""
    for unit in (2.0**-31, 2.0**-127):
        values = neighbours([k * unit / 4 for k in range(40)] + [TINY * k for k in range(9)])
        check_all(rows_below(39 * unit / 4, values, 32), 32)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # numpy, of signalling NaNs
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_and_what_is_infinite(dtype):
    x = torch.ones(6, 96)
    x[0, 3], x[1, 40], x[1, 41] = torch.nan, torch.inf, -torch.inf
    x[2, 64:], x[3, 0], x[3, 95] = torch.nan, 448.0, -torch.nan
    x[4, :2] = torch.tensor([torch.inf, torch.nan])
    for group in (32, 64, 128):
        check_all(x.to(dtype), group)
    if dtype == torch.float32:
        patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
        check_all(torch.nn.functional.pad(patterns.view(torch.float32), (0, 27), value=1.0)[None], 32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_numbers_of_all_magnitudes(dtype):
    x = rough(9, 96)
    if dtype == torch.float16:
        x = (x.clamp(-1e4, 1e4) + torch.randn(9, 96)).clamp(-6e4, 6e4)
    check_all(x.to(dtype), 64)


# Shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "group", "channels"),
    [
        (1, 128, 1),
        (127, 128, 127),
        (129, 128, 129),
        (75, 8, 75),
        (72, 64, 56),
        (9, 4, 1),
        (5, 1, 3),
        (200, 64, 130),
        (96, 32, 64),
        (32, 8, 32),
        (24, 4, 10),
    ],
)
def test_short_groups_and_channels_that_stay(dtype, width, group, channels):
    x = (torch.randn(3, 5, width) * 2.0 ** torch.randint(-8, 8, (3, 5, width))).to(dtype)
    check("quantise_rows", x, group)
    x[0, 0, channels:] = torch.nan
    x[1, 0, -1:] = -torch.inf if channels < width else 1.0
    check("round_rows", x, group, channels)
    found = triton.round_rows(x.to(DEVICE), group, channels).cpu()
    assert torch.equal(bits(found[..., channels:]), bits(x[..., channels:]))


@pytest.mark.parametrize("shape", [(1, 1), (130, 37), (3, 129), (2, 3, 5, 64), (2, 130, 160)])
def test_blocks_of_stacks_and_at_edges(shape):
    w = torch.randn(shape) * 2.0 ** torch.randint(-9, 9, shape)
    for scale_dtype in (torch.uint8, torch.float32):
        check("quantise_blocks", w, scale_dtype)
        packed = Packed(*reference.quantise_blocks(w, scale_dtype), "fp8")
        check_packed(packed, [torch.float32, torch.bfloat16])
    check("round_blocks", w, torch.float32)
    check("round_blocks", w, torch.bfloat16)


def check_packed(packed, dtypes=(*DTYPES, torch.float64)):
    for dtype in dtypes:
        with poisoned():
            found = triton.dequantise(Packed(packed.codes.to(DEVICE), packed.scales.to(DEVICE), packed.kind), dtype)
        assert same(found, reference.dequantise(packed, dtype))


def test_every_code_under_every_scale():
    codes = torch.arange(256, dtype=torch.uint8)
    scales = torch.arange(255, dtype=torch.uint8)
    check_packed(Packed(codes[:16].repeat(255, 1) * 17, scales[:, None], "fp4"))
    stack = codes.view(2, 128).expand(255, 2, 128)
    check_packed(Packed(stack, scales[:, None, None], "fp8"), [torch.float32])
    check_packed(Packed(stack[::5], scales[::5, None, None], "fp8"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 8, 32, 128, 256])
def test_index_rows(dtype, width):
    x = torch.randn(3, 7, width) * 2.0 ** torch.randint(-6, 6, (3, 7, 1))
    x[0, 0, 0] = torch.nan
    x[1, 0] = 0.0
    check("round_index", x.to(dtype))
    if dtype == torch.float32:
        check("round_index", rough(9, width).clamp(-1e35, 1e35))


def test_other_dtypes_of_rounded_weights():
    w = torch.randn(5, 64) * 2.0 ** torch.randint(-9, 9, (5, 64))
    for given in (torch.float32, torch.bfloat16, torch.float64):
        for dtype in (*DTYPES, torch.float64):
            check("round_fp4", w.to(given), dtype)
            check("round_blocks", w.to(given), dtype)


def test_strided_input_is_kept_and_no_rows():
    x = torch.randn(64, 5, 6).permute(2, 1, 0)[::2]  # [3, 5, 64]
    kept = x.clone()
    check_all(x, 48)
    check("round_index", x)
    assert torch.equal(x, kept)
    strided = Packed(*(part.mT.contiguous().mT for part in reference.quantise_fp4(x)), "fp4")
    check_packed(strided)
    none = torch.zeros(0, 7, 64)
    for rounded in (
        triton.round_rows(none.to(DEVICE), 48, 50),
        triton.round_index(none.to(DEVICE)),
        triton.round_fp4(none.to(DEVICE), torch.float32),
        triton.round_blocks(none.to(DEVICE), torch.float32),
    ):
        assert rounded.shape == none.shape
    codes, scales = triton.quantise_rows(none.to(DEVICE), 48)
    assert (codes.shape, scales.shape) == ((0, 7, 64), (0, 7, 2))


# Independence


def test_a_row_has_the_same_bits_whatever_stands_beside_it():
    x = torch.randn(70, 128).bfloat16().to(DEVICE)
    for operation in (lambda x: triton.round_rows(x, 64, 100), triton.round_index):
        whole = operation(x)
        assert same(operation(x), whole.cpu())
        for row in (0, 31, 32, 69):
            assert same(operation(x[row : row + 1]), whole[row : row + 1].cpu())
