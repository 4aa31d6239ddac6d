"""Rows in Triton kernels: the same bytes and the same values as the reference, to the bit."""

import pytest
import torch
from triton import jit
from triton import language as tl

from dsv4.ops import rows
from dsv4.ops.rows import portable, reference, triton
from dsv4.ops.rows.triton_rows import load_keys, store_keys
from tests.ops.rows.test_rows import FORMATS, bits, rough
from tests.ops.triton_lane import DEVICE, DTYPES, poisoned

SHAPES = [(1, 0), (1, 1), (6, 3), (64, 16), (128, 64), (129, 0), (203, 8), (600, 24)]
KEY_SHAPES = [1, 2, 31, 33, 64, 102]

# Of an infinite number the largest code is stored, and over 2^127 that is infinite again: numpy tells.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply")


def made(function, *given):
    """What a kernel makes of tensors on the device, over poison."""
    with poisoned():
        return getattr(triton, function)(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in given)).cpu()


def is_same(values, wanted):
    return ((bits(values) == bits(wanted)) | (values.isnan() & wanted.isnan())).all()


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize(("K", "R"), SHAPES)
def test_rows_to_the_bit(row_format, K, R):
    x = rough(9, K)
    stored = reference.pack(x, row_format, R)
    assert made("pack", x, row_format, R).equal(stored)
    values = made("unpack", stored, row_format, K, R)
    assert values.dtype == torch.float32
    assert is_same(values, reference.unpack(stored, row_format, K, R))


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("J", KEY_SHAPES)
def test_keys_to_the_bit(row_format, J):
    x = rough(9, J)
    stored = reference.pack_index(x, row_format)
    assert made("pack_index", x, row_format).equal(stored)
    assert is_same(made("unpack_index", stored, row_format, J), reference.unpack_index(stored, row_format, J))


def test_the_released_sizes_in_several_programs():
    x = rough(11, 512)
    stored = made("pack", x, "packed", 64)
    assert stored.shape == (11, 584)
    assert stored.equal(portable.pack(x, "packed", 64))
    assert is_same(made("unpack", stored, "packed", 512, 64), portable.unpack(stored, "packed", 512, 64))
    for row_format, size in (("packed", 68), ("packed-fp8", 132)):
        keys = made("pack_index", x[:, :128], row_format)
        assert keys.shape == (11, size)
        assert keys.equal(portable.pack_index(x[:, :128], row_format))
        assert is_same(made("unpack_index", keys, row_format, 128), portable.unpack_index(keys, row_format, 128))


def test_any_stored_bytes():
    """Every code with every kind of scale, NaN among both."""
    stored, keys = torch.randint(0, 256, (64, 584)).byte(), torch.randint(0, 256, (64, 68)).byte()
    stored[:, :256] = torch.arange(256).byte()
    stored[:4, -8:], keys[:4, -4:] = (
        torch.tensor([[0], [255], [1], [254]]).byte(),
        torch.tensor([[0], [255], [1], [254]]).byte(),
    )
    wanted = portable.unpack(stored, "packed", 512, 64)
    assert wanted.isnan().any()
    assert is_same(made("unpack", stored, "packed", 512, 64), wanted)
    assert is_same(made("unpack_index", keys, "packed", 128), portable.unpack_index(keys, "packed", 128))


@pytest.mark.parametrize("function", ["pack", "pack_index"])
@pytest.mark.parametrize("row_format", FORMATS)
def test_a_nan_stays_one(function, row_format):
    x = torch.ones(2, 70)
    x[0, 3], x[1, 68] = torch.nan, -torch.nan
    rotary = [3] if function == "pack" else []
    stored = made(function, x, row_format, *rotary)
    assert stored.equal(getattr(reference, function)(x, row_format, *rotary))
    values = made(function.replace("pack", "unpack"), stored, row_format, 70, *rotary)
    assert values.isnan()[[0, 1], [3, 68]].all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float64])
def test_of_any_float(dtype):
    x = rough(5, 100).clamp(-6e4, 6e4).to(dtype)
    for row_format in FORMATS:
        assert made("pack", x, row_format, 12).equal(reference.pack(x, row_format, 12))
        assert made("pack_index", x, row_format).equal(reference.pack_index(x, row_format))


def test_ties_of_bfloat16_go_to_the_even_one():
    x = (torch.arange(-40, 40) * 0x8000 + (0x3F80 << 16)).int().view(torch.float32)
    x = torch.stack([x, -x, 1e-38 * x])
    assert made("pack", x, "bfloat16", 0).view(torch.bfloat16).equal(x.bfloat16())
    assert made("pack_index", x, "bfloat16").view(torch.bfloat16).equal(x.bfloat16())


@pytest.mark.parametrize("row_format", FORMATS)
def test_no_rows_and_strided_rows(row_format):
    none = made("pack", torch.zeros(0, 9), row_format, 4)
    assert none.shape == (0, rows.row_bytes(row_format, 9, 4))
    assert made("unpack", none, row_format, 9, 4).shape == (0, 9)
    keys = made("pack_index", torch.zeros(2, 0, 9), row_format)
    assert keys.shape == (2, 0, rows.index_row_bytes(row_format, 9))
    assert made("unpack_index", keys, row_format, 9).shape == (2, 0, 9)
    x = torch.randn(9, 5, 3).permute(2, 1, 0)[:, ::2]  # [3, 3, 9]
    stored = made("pack", x, row_format, 4)
    assert stored.equal(reference.pack(x, row_format, 4))
    turned = made("unpack", stored.transpose(0, 1), row_format, 9, 4)
    assert turned.equal(reference.unpack(stored, row_format, 9, 4).transpose(0, 1))


def test_the_door_takes_the_kernels():
    x = torch.randn(3, 96, device=DEVICE)
    how = {"row_format": "packed", "rotary_dims": 32, "backend": "unproved"}
    stored = rows.pack(x, **how)
    assert stored.cpu().equal(reference.pack(x.cpu(), "packed", 32))
    values = rows.unpack(stored, **how, channels=96, dtype=torch.bfloat16)
    assert values.cpu().equal(reference.unpack(stored.cpu(), "packed", 96, 32).bfloat16())
    keys = rows.pack_index(x, row_format="packed", backend="unproved")
    assert keys.cpu().equal(reference.pack_index(x.cpu(), "packed"))
    values = rows.unpack_index(keys, row_format="packed", channels=96, dtype=torch.float32, backend="unproved")
    assert values.cpu().equal(reference.unpack_index(keys.cpu(), "packed", 96))


@jit
def _move_keys(
    pages, at, entry, x, y, num_keys, N: tl.constexpr, J: tl.constexpr, BYTES: tl.constexpr, ENTRIES: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Store keys x in pages, and read them again into y; channels beyond the last do not count."""
    own = tl.arange(0, N)
    is_key = own < num_keys
    page = pages + tl.load(at + own, mask=is_key, other=0) * (ENTRIES * BYTES)
    place = tl.load(entry + own, mask=is_key, other=0)
    channel = tl.arange(0, 128)[None, :]
    is_in = is_key[:, None] & (channel < J)
    given = tl.load(x + own[:, None] * J + channel, mask=is_in, other=3e38)
    store_keys(page, is_key, place, given, N, 128, J, ENTRIES, FORMAT)
    tl.debug_barrier()
    tl.store(y + own[:, None] * J + channel, load_keys(page, is_key, place, 128, J, ENTRIES, FORMAT, N), mask=is_in)


@pytest.mark.parametrize(
    ("row_format", "channels"),
    [
        *(("packed", 64), ("packed", 96), ("packed", 48), ("packed-fp8", 64), ("packed-fp8", 48)),
        *(("bfloat16", 64), ("float32", 33)),
    ],
)
def test_pages_of_keys(row_format, channels):
    """In columns where whole groups are packed, in rows otherwise; what is masked is left alone."""
    x, at, entry = rough(7, channels), torch.tensor([0, 2, 2, 1, 0, 2, 1]), torch.tensor([19, 0, 7, 11, 4, 19, 0])
    pages = torch.full((3, 20, rows.index_row_bytes(row_format, channels)), 77, dtype=torch.uint8)
    wanted, stored = pages.clone(), reference.pack_index(x, row_format)
    rows.write_index_pages_(wanted, at[:5], entry[:5], stored[:5], row_format=row_format, channels=channels)
    moved, y = pages.to(DEVICE), torch.full((7, channels), 9.0, device=DEVICE)
    given = (each.to(DEVICE) for each in (at, entry, x))
    _move_keys[(1,)](moved, *given, y, 5, 8, channels, pages.shape[2], 20, row_format)
    assert moved.cpu().equal(wanted)
    assert is_same(y.cpu()[:5], reference.unpack_index(stored[:5], row_format, channels))
    assert (y[5:] == 9).all()
