"""Row formats, to the bit: every code against the formula, the layout byte by byte, and all backends alike."""

import math

import pytest
import torch

from dsv4 import native
from dsv4.accounting import cache
from dsv4.config import presets
from dsv4.ops import rows
from dsv4.ops.rows import (
    index_row_bytes,
    pack,
    pack_index,
    portable,
    read_index_pages,
    row_bytes,
    unpack,
    unpack_index,
    write_index_pages_,
)

FORMATS = ["float32", "bfloat16", "packed", "packed-fp8"]
needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler here")
BACKENDS = ["reference", "portable", pytest.param("native", marks=needs_compiler)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ONE = 127  # the E8M0 code of 1


def e4m3(code):
    """The value of an E4M3 code: 4 exponent bits with bias 7, 3 mantissa bits; only the last size is NaN."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def bits(x):
    return x.float().contiguous().view(torch.int32)


def read(stored, channels, backend, rotary_dims=0, row_format="packed"):
    how = {"row_format": row_format, "channels": channels, "dtype": torch.float32, "backend": backend}
    return unpack(stored, rotary_dims=rotary_dims, **how)


def read_index(stored, channels, backend="portable", row_format="packed"):
    return unpack_index(stored, row_format=row_format, channels=channels, dtype=torch.float32, backend=backend)


def packed(values, backend, rotary_dims=0):
    return pack(torch.tensor(values), row_format="packed", rotary_dims=rotary_dims, backend=backend)


def packed_index(values, backend="portable", row_format="packed"):
    return pack_index(torch.tensor(values), row_format=row_format, backend=backend)


# Sizes


def test_the_released_sizes():
    assert row_bytes("packed", 512, 64) == 584
    assert row_bytes("packed-fp8", 512, 64) == 584
    assert [index_row_bytes(row_format, 128) for row_format in ("packed", "packed-fp8")] == [68, 132]


@pytest.mark.parametrize("name", ["flash", "pro", "mini", "nano", "smoke"])
@pytest.mark.parametrize("row_format", FORMATS)
def test_sizes_are_those_of_the_accounting(name, row_format):
    config = presets.preset(name)
    own = row_bytes(row_format, config.attention.head_dim, config.attention.rotary_dims)
    assert own == cache.row_bytes(config, row_format)
    assert index_row_bytes(row_format, config.indexer.head_dim) == cache.index_row_bytes(config, row_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize(("K", "R"), [(1, 0), (1, 1), (9, 4), (65, 0), (600, 7)])
def test_rows_have_these_sizes(backend, row_format, K, R):
    x = torch.randn(2, 3, K)
    assert pack(x, row_format=row_format, rotary_dims=R, backend=backend).shape == (2, 3, row_bytes(row_format, K, R))
    wanted = (2, 3, index_row_bytes(row_format, K))
    assert pack_index(x, row_format=row_format, backend=backend).shape == wanted


# E4M3. A group that holds 448 has the scale 1.


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_of_e4m3(backend):
    stored = torch.tensor([*range(256), *[ONE] * 4, *[0] * 4], dtype=torch.uint8)
    wanted = torch.tensor([e4m3(code) for code in range(256)])
    torch.testing.assert_close(read(stored, 256, backend), wanted, rtol=0, atol=0, equal_nan=True)
    assert read(stored, 256, backend)[128].signbit()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [-22, -3, 0, 1, 17, 119])
def test_what_is_on_the_grid_of_e4m3_comes_back_to_the_bit(backend, exponent):
    codes = [code for code in range(256) if code % 128 < 127]
    values = [
        [448 * 2.0**exponent, *(e4m3(code) * 2.0**exponent for code in codes[i : i + 63])] for i in range(0, 254, 63)
    ]
    for row in values:
        stored = packed(row, backend)
        assert stored[len(row)] == ONE + exponent
        assert bits(read(stored, len(row), backend)).equal(bits(torch.tensor(row)))


def neighbours(table):
    """Each midpoint of neighbouring values with the even code of the two, and what lies just beside it."""
    for low in range(len(table) - 1):
        middle = torch.tensor((table[low] + table[low + 1]) / 2)
        yield middle.item(), low + low % 2
        yield torch.nextafter(middle, torch.tensor(0.0)).item(), low
        yield torch.nextafter(middle, torch.tensor(torch.inf)).item(), low + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_e4m3_rounds_to_nearest_and_ties_to_the_even_code(backend):
    values, codes = zip(*neighbours([e4m3(code) for code in range(127)]), strict=True)
    for first in range(0, len(values), 63):
        now = slice(first, first + 63)
        assert packed([448.0, *values[now]], backend)[1 : 1 + len(codes[now])].tolist() == list(codes[now])
        below = packed([448.0, *(-value for value in values[now])], backend)[1 : 1 + len(codes[now])]
        assert below.tolist() == [128 + code for code in codes[now]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("largest", "exponent"),
    [
        (448.0, 0),
        (448 - 2.0**-15, 0),
        (448 + 2.0**-15, 1),  # its float32 neighbours
        (256.0, 0),
        (224.0, -1),
        (512.0, 1),
        (448 * 2.0**30, 30),
        (448 * 2.0**-20, -20),
        (1.0, -8),
        (1e-4, -22),
        (1e-9, -22),
        (0.0, -22),
        (3.4028234663852886e38, 120),
    ],
)
def test_the_scale_of_a_row_is_the_least_power_of_two_that_fits(backend, largest, exponent):
    assert packed([0.0, -largest, 0.0], backend)[3] == ONE + exponent


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_keep_their_sign_and_infinities_become_the_largest(backend):
    stored = packed([0.0, -0.0, math.inf, -math.inf, 1.0], backend)
    assert stored[:5].tolist() == [0, 0x80, 0x7E, 0xFE, 0]
    assert bits(read(packed([0.0, -0.0], backend), 2, backend)).equal(bits(torch.tensor([0.0, -0.0])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_byte_by_byte(backend):
    """66 plain channels in two groups, 3 rotary ones."""
    values = [448.0, 1.0, *[0.0] * 62, -14.0, 7.0, 1.0, -2.0, 1.00390625]
    codes = [0x7E, 0x38, *[0] * 62, 0xFE, 0x76]
    rotary = [0x80, 0x3F, 0x00, 0xC0, 0x80, 0x3F]  # little endian; the last rounds to the even 1
    scales = [ONE, ONE - 5, *[0] * 6]
    assert packed(values, backend, rotary_dims=3).tolist() == codes + rotary + scales


# E2M1. A group that holds 6 has the scale 1.


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_of_e2m1_the_low_nibble_first(backend):
    stored = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, ONE], dtype=torch.uint8)
    values = [*E2M1, *(-value for value in E2M1)]
    assert bits(read_index(stored, 16, backend)).equal(bits(torch.tensor(values)))
    assert packed_index(values, backend).equal(stored)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [-126, -125, -3, 0, 1, 17, 125])
def test_what_is_on_the_grid_of_e2m1_comes_back_to_the_bit(backend, exponent):
    row = [
        value * 2.0**exponent
        for value in (*E2M1, *(-value for value in E2M1), *E2M1[::-1], 0.5, -0.0, 3, 4, 6, 2, 1, 6)
    ]
    stored = packed_index(row, backend)
    assert stored.tolist()[-1] == ONE + exponent
    assert bits(read_index(stored, 32, backend)).equal(bits(torch.tensor(row)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_e2m1_rounds_to_nearest_and_ties_to_the_even_code(backend):
    values, codes = zip(*neighbours(E2M1), strict=True)
    for sign in (1, -1):
        stored = packed_index([6.0, *(sign * value for value in values)], backend)
        nibbles = [nibble for byte in stored[:11].tolist() for nibble in (byte & 15, byte >> 4)]
        assert nibbles == [7, *(code + 8 * (sign < 0) for code in codes)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("largest", "exponent"),
    [
        (6.0, 0),
        (6 - 2.0**-21, 0),
        (6 + 2.0**-21, 1),  # its float32 neighbours
        (4.0, 0),
        (3.0, -1),
        (8.0, 1),
        (6 * 2.0**60, 60),
        (6 * 2.0**-126, -126),
        (2.0**-126, -126),
        (0.0, -126),
        (3.4028234663852886e38, 126),
    ],
)
def test_the_scale_of_a_key_is_the_least_power_of_two_that_fits(backend, largest, exponent):
    assert packed_index([0.0, -largest, 0.0], backend).tolist()[2] == ONE + exponent


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_byte_by_byte(backend):
    """33 channels in two groups: the last byte holds one code."""
    values = [6.0, -1.0, *[0.0] * 30, 0.75]
    assert packed_index(values, backend).tolist() == [0xA7, *[0] * 15, 0x7, ONE, ONE - 3]


# Keys in E4M3


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_in_e4m3(backend):
    """Every code under its own sign; a group that holds 448 has the scale 1."""
    values = [448.0, *(e4m3(code) for code in range(256) if code % 128 < 127)]
    for first in range(1, len(values), 31):
        row = [448.0, *values[first : first + 31]]
        stored = packed_index(row, backend, "packed-fp8")
        codes = [code for code in range(256) if code % 128 < 127][first - 1 : first + 30]
        assert stored.tolist() == [0x7E, *codes, ONE]
        assert bits(read_index(stored, len(row), backend, "packed-fp8")).equal(bits(torch.tensor(row)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("largest", "exponent"),
    [
        (448.0, 0),
        (448 + 2.0**-15, 1),
        (256.0, 0),
        (224.0, -1),
        (1e-9, -38),
        (448 * 2.0**-126, -126),
        (2.0**-149, -126),
        (0.0, -126),
        (3.4028234663852886e38, 120),
        (math.inf, 120),
    ],
)
def test_the_scale_of_a_key_in_e4m3_goes_as_low_as_that_of_fp4(backend, largest, exponent):
    """33 channels in two groups, as bytes lie."""
    stored = packed_index([0.0, -largest, *[0.0] * 30, 14.0], backend, "packed-fp8").tolist()
    assert stored[33:] == [ONE + exponent, ONE - 5]
    assert stored[32] == 0x7E  # 448 times 2^-5


def test_a_key_in_e4m3_holds_every_one_of_fp4():
    """All values beside each of the largest, under every scale, and what has no number: the same bits."""
    sizes = torch.tensor(E2M1)
    x = torch.zeros(len(E2M1), 32)
    for largest in range(len(E2M1)):
        x[largest, : largest + 1], x[largest, 16 : largest + 17] = sizes[: largest + 1], -sizes[: largest + 1]
    x = x * 2.0 ** torch.arange(-126, 127.0)[:, None, None]  # infinite at the end
    x = torch.cat([x.flatten(0, 1), torch.full((1, 32), torch.nan)])
    held = portable.unpack_index(portable.pack_index(x, "packed"), "packed", 32)
    assert held[:-9].equal(x[:-9])
    again = portable.unpack_index(portable.pack_index(held, "packed-fp8"), "packed-fp8", 32)
    assert bits(again[:-1]).equal(bits(held[:-1]))
    assert again[-1].isnan().all()


def test_a_key_in_e4m3_loses_far_less_than_one_in_fp4():
    x = torch.randn(500, 128)
    lost = [
        ((read_index(packed_index(x.tolist(), row_format=f), 128, row_format=f) - x).norm() / x.norm()).item()
        for f in FORMATS[2:]
    ]
    assert 0.08 < lost[0] < 0.14
    assert lost[1] < 0.03  # half of an eighth at most, which is spread evenly


# All backends


def rough(*shape):
    """Numbers of all magnitudes, subnormal ones, zeros and infinities among them."""
    x = torch.randn(shape) * 2.0 ** torch.randint(-140, 120, (*shape[:-1], 1)).float()
    x = torch.where(torch.rand(shape) < 0.1, x * 2.0 ** torch.randint(-30, 9, shape), x)
    x[torch.rand(shape) < 0.02] = 0.0
    x[torch.rand(shape) < 0.002] = -torch.inf
    return x


@needs_compiler
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize(("K", "R"), [(1, 0), (1, 1), (6, 3), (64, 16), (128, 64), (129, 0), (203, 8)])
def test_backends_agree_on_rows_to_the_bit(row_format, K, R):
    x = rough(40, K)
    how = {"row_format": row_format, "rotary_dims": R}
    wanted, *others = (pack(x, **how, backend=backend) for backend in ("reference", "portable", "native"))
    assert all(other.equal(wanted) for other in others)
    values, *others = (read(wanted, K, backend, R, row_format) for backend in ("reference", "portable", "native"))
    assert all(bits(other).equal(bits(values)) for other in others)
    again = read(pack(values, **how), K, "portable", R, row_format)
    assert bits(again).equal(bits(values))


@needs_compiler
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("J", [1, 2, 31, 32, 33, 64, 102, 128])
def test_backends_agree_on_keys_to_the_bit(row_format, J):
    x = rough(40, J)
    wanted, *others = (pack_index(x, row_format=row_format, backend=b) for b in ("reference", "portable", "native"))
    assert all(other.equal(wanted) for other in others)
    values, *others = (read_index(wanted, J, backend, row_format) for backend in ("reference", "portable", "native"))
    assert all(bits(other).equal(bits(values)) for other in others)
    assert bits(read_index(pack_index(values, row_format=row_format), J, "portable", row_format)).equal(bits(values))


@needs_compiler
def test_backends_agree_on_any_stored_bytes():
    stored = torch.randint(0, 256, (100, 584), dtype=torch.uint8)
    keys = torch.randint(0, 256, (100, 68), dtype=torch.uint8)
    keys[:2, -4:], stored[:2, -8:] = 0, 255
    for read_it, rows_of, channels in ((read, stored, 512), (read_index, keys, 128)):
        rotary = {"rotary_dims": 64} if read_it is read else {}
        wanted, *others = (read_it(rows_of, channels, b, **rotary) for b in ("reference", "portable", "native"))
        assert wanted.isnan().any()
        for other in others:
            torch.testing.assert_close(other, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_rows_are_torchs_own_rounding(backend):
    x = rough(20, 33)
    stored = pack(x, row_format="bfloat16", rotary_dims=2, backend=backend)
    assert stored.view(torch.bfloat16).equal(x.bfloat16())
    values = unpack(stored, row_format="bfloat16", channels=33, rotary_dims=2, dtype=torch.bfloat16, backend=backend)
    assert values.dtype == torch.bfloat16
    assert values.equal(x.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_format", FORMATS)
def test_no_rows_and_strided_rows(backend, row_format):
    how = {"row_format": row_format, "backend": backend}
    assert pack(torch.zeros(0, 9), rotary_dims=4, **how).shape == (0, row_bytes(row_format, 9, 4))
    none = torch.zeros(0, row_bytes(row_format, 9, 4), dtype=torch.uint8)
    assert read(none, 9, backend, 4, row_format).shape == (0, 9)
    x = torch.randn(9, 5, 3).permute(2, 1, 0)[:, ::2]  # [3, 3, 9]
    stored = pack(x, rotary_dims=4, **how)
    assert stored.equal(pack(x.contiguous(), rotary_dims=4, **how))
    turned = stored.transpose(0, 1)
    assert read(turned, 9, backend, 4, row_format).equal(read(stored, 9, backend, 4, row_format).transpose(0, 1))
    keys = pack_index(x, **how).transpose(0, 1)
    assert read_index(keys, 9, backend, row_format).equal(read_index(keys.contiguous(), 9, backend, row_format))


@pytest.mark.parametrize("backend", ["reference", "portable", pytest.param("native", marks=needs_compiler)])
def test_behind_the_door_a_nan_stays_one(backend):
    """Kernels meet NaN in a sequence gone wrong; it must not come out as a number."""
    x = torch.ones(1, 70)
    x[0, 3], x[0, 68] = torch.nan, torch.nan
    module = getattr(rows, backend)
    values = module.unpack(module.pack(x, "packed", 3), "packed", 70, 3)
    assert values.isnan().equal(x.isnan())
    for row_format in FORMATS[2:]:
        keys = module.unpack_index(module.pack_index(x, row_format), row_format, 70)
        assert keys[0].isnan().tolist() == [True] * 32 + [False] * 32 + [True] * 6


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packed([1.0, torch.nan], "portable"), "x holds 1 NaN; expected numbers in a packed row"),
        (lambda: packed_index([torch.nan] * 2, "portable"), "x holds 2 NaN; expected numbers in a packed row"),
        (lambda: packed([1, 2], "portable"), r"x has dtype torch\.int64; expected a floating-point dtype"),
        (lambda: packed(1.0, "portable"), r"x has shape \[\]; expected \[\.\.\., channels\]"),
        (lambda: packed([1.0], "portable", 2), "rotary_dims is 2; expected 0 to 1, the channels"),
        (lambda: packed([1.0], "cuda"), "backend is 'cuda'; expected one of reference, portable, native"),
        (lambda: pack(torch.ones(2), row_format="fp8", rotary_dims=0), "row_format is 'fp8'; expected one of float32"),
        (lambda: pack_index(torch.ones(2), row_format="fp8"), "row_format is 'fp8'; expected one of float32"),
        (lambda: read(torch.zeros(3, 9), 9, "portable"), r"rows has dtype torch\.float32; expected torch\.uint8"),
        (lambda: read(torch.zeros(3, 9).byte(), 9, "portable"), r"shape \[3, 9\]; expected \[\.\.\., 17\], 9 channels"),
        (lambda: read_index(torch.zeros(3, 9).byte(), 9, "portable"), r"\[3, 9\]; expected \[\.\.\., 6\], 9 channels"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def place_in_page(entry, byte, codes, order):
    """Packed keys of whole groups: units of 4 bytes of codes side by side for all 20 entries, then their scales."""
    if byte < codes:
        return byte // 4 * 80 + entry * 4 + order[byte % 4]
    return byte * 20 + entry


@pytest.mark.parametrize(
    ("row_format", "channels", "in_columns"),
    [
        *(("packed", 64, True), ("packed", 96, True), ("packed", 48, False)),
        *(("packed-fp8", 96, True), ("packed-fp8", 48, False), ("bfloat16", 64, False)),
    ],
)
def test_pages_of_indexer_keys(row_format, channels, in_columns):
    pages = torch.zeros(3, 20, index_row_bytes(row_format, channels), dtype=torch.uint8)
    rows, page, entry = torch.randint(256, (5, pages.shape[2])).byte(), [0, 2, 2, 1, 0], [19, 0, 7, 11, 4]
    wanted = pages.clone()
    layout = (channels, [0, 2, 1, 3]) if row_format == "packed-fp8" else (channels // 2, [0, 1, 2, 3])
    for own, p, e in zip(rows, page, entry, strict=True):
        for byte, value in enumerate(own):
            wanted[p].flatten()[place_in_page(e, byte, *layout) if in_columns else e * len(own) + byte] = value
    page, entry = torch.tensor(page), torch.tensor(entry)
    write_index_pages_(pages, page, entry, rows, row_format=row_format, channels=channels)
    assert torch.equal(pages, wanted)
    assert torch.equal(read_index_pages(pages, row_format=row_format, channels=channels)[page, entry], rows)
