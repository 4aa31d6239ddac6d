"""Rows of the cache in the registers of a kernel: tiles of them are read from their stored bytes, and written as such.

The formats are those of ``dsv4.ops.rows``; a kernel takes a format by its name, as a constexpr. Where a row begins is a
pointer to bytes, so that the rows of a tile may lie in different places: in a ring, in pages, in a step's own list.
Nothing is read of a row that is masked, and its channels are zero.

Packed rows whose scales begin at a multiple of 8 bytes, as those of the released models do, begin at one themselves if
their tensor does: the scales are then read as one number, and codes by eights. The compiler must see it: pointers that
are a choice between two want ``tl.multiple_of`` where they are chosen, since the hint does not go through a call.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import triton
import triton.language as tl

from dsv4.ops.lowbit.triton_codes import bits_of, code_of, factor_of, group_scales, number_of, value_of
from dsv4.ops.rows.formats import INDEX_GROUP, ROW_GROUP, UNIT, is_packed

_is_packed = triton.constexpr_function(is_packed)
_GROUP = tl.constexpr(ROW_GROUP)
_INDEX_GROUP = tl.constexpr(INDEX_GROUP)
_UNIT = tl.constexpr(UNIT)
_ABS = tl.constexpr(0x7FFFFFFF)
_INF = tl.constexpr(0x7F800000)


# Rows


@triton.jit
def load_scales(rows, is_row, K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr):
    """What ``load_channels`` wants to know of rows [N] before all else: their first eight scales in one number, [N]."""
    at: tl.constexpr = K + R
    if _is_packed(FORMAT) and at % 8 == 0 and K > R:
        return tl.load((rows + at).to(tl.pointer_type(tl.int64)), mask=is_row, other=0)
    else:
        return tl.zeros(rows.shape, dtype=tl.int64)


@triton.jit
def load_channels(
    rows, is_row, scales, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Channels FIRST <= k < FIRST + WIDTH of rows, [N, WIDTH] in ``dtype``; zero from K on.

    rows: [N] pointers to bytes; scales: of ``load_scales``. Of packed rows WIDTH divides 64 and FIRST, so that a row
    has one scale in what is read.
    """
    plain: tl.constexpr = K - R if _is_packed(FORMAT) else 0
    if plain >= FIRST + WIDTH:
        return _coded(rows, is_row, scales, FIRST, WIDTH, K, R).to(dtype)
    elif plain <= FIRST:
        return _stored(rows, is_row, FIRST, WIDTH, K, R, FORMAT, dtype)
    else:
        coded = _coded(rows, is_row, scales, FIRST, WIDTH, K, R).to(dtype)
        stored = _stored(rows, is_row, FIRST, WIDTH, K, R, FORMAT, dtype)
        return tl.where((FIRST + tl.arange(0, WIDTH) < plain)[None, :], coded, stored)


@triton.jit
def _coded(rows, is_row, scales, FIRST: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
    """The plain channels of packed rows among these, float32."""
    group: tl.constexpr = FIRST // _GROUP
    channel = FIRST + tl.arange(0, WIDTH)[None, :]
    is_in = is_row[:, None]
    if FIRST + WIDTH > K - R:  # else a mask that is the same for all columns lets loads be wide ones
        is_in = is_in & (channel < K - R)
    code = tl.load(rows[:, None] + channel, mask=is_in, other=0)
    if (K + R) % 8 == 0 and group < 8:
        scale = (scales >> (8 * group)).to(tl.int32) & 255
    else:
        scale = tl.load(rows + (K + R + group), mask=is_row, other=0).to(tl.int32)
    return value_of(code.to(tl.int32), False) * factor_of(scale)[:, None]


@triton.jit
def _stored(
    rows, is_row, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The channels among these that are stored as float32 or bfloat16, in ``dtype``."""
    plain: tl.constexpr = K - R if _is_packed(FORMAT) else 0
    channel = FIRST + tl.arange(0, WIDTH)[None, :]
    is_in = is_row[:, None]
    if plain > FIRST or FIRST + WIDTH > K:
        is_in = is_in & (channel >= plain) & (channel < K)
    if FORMAT == "float32":
        return tl.load(rows[:, None].to(tl.pointer_type(tl.float32)) + channel, mask=is_in, other=0).to(dtype)
    elif plain % 2 == 0:
        half = tl.load((rows[:, None] + plain).to(tl.pointer_type(tl.int16)) + (channel - plain), mask=is_in, other=0)
        if dtype == tl.bfloat16:
            return half.to(tl.bfloat16, bitcast=True)
        else:
            return number_of(half.to(tl.int32) << 16).to(dtype)
    else:  # at odd bytes
        byte = rows[:, None] + (2 * channel - plain)
        low = tl.load(byte, mask=is_in, other=0).to(tl.int32)
        high = tl.load(byte + 1, mask=is_in, other=0).to(tl.int32)
        return number_of(low << 16 | high << 24).to(dtype)


@triton.jit
def store_rows(
    rows, is_row, x, N: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr
):
    """Write x [N, WIDTH], float32, of which the first K channels count, to rows: [N] pointers to bytes.

    WIDTH is a power of two. Every byte of a row is written.
    """
    plain: tl.constexpr = K - R if _is_packed(FORMAT) else 0
    channel = tl.arange(0, WIDTH)[None, :]
    bits = bits_of(x)
    is_in = is_row[:, None] & (channel >= plain) & (channel < K)
    if FORMAT == "float32":
        tl.store(rows[:, None].to(tl.pointer_type(tl.int32)) + channel, bits, mask=is_in)
    elif plain < K:
        half = _half(bits)
        if plain % 2 == 0:
            tl.store((rows[:, None] + plain).to(tl.pointer_type(tl.int16)) + (channel - plain), half, mask=is_in)
        else:
            byte = rows[:, None] + (2 * channel - plain)
            tl.store(byte, (half & 255).to(tl.uint8), mask=is_in)
            tl.store(byte + 1, (half >> 8 & 255).to(tl.uint8), mask=is_in)
    if plain > 0:
        group: tl.constexpr = _GROUP if WIDTH > _GROUP else WIDTH
        is_plain = channel < plain
        scale, _ = group_scales(tl.reshape(tl.where(is_plain, bits, 0), (N * WIDTH // group, group)), False)
        code = code_of(tl.reshape(bits, (N * WIDTH // group, group)), scale[:, None], False)
        tl.store(rows[:, None] + channel, tl.reshape(code, (N, WIDTH)).to(tl.uint8), mask=is_row[:, None] & is_plain)
        count: tl.constexpr = (plain + group - 1) // group
        place = tl.arange(0, WIDTH // group)[None, :]
        at = rows[:, None] + (K + R)
        tl.store(
            at + place, tl.reshape(scale, (N, WIDTH // group)).to(tl.uint8), mask=is_row[:, None] & (place < count)
        )
        filling = count // 8 * 8 + tl.arange(0, 8)[None, :]
        if count % 8 != 0:
            none = tl.zeros((N, 8), dtype=tl.uint8)
            tl.store(at + filling, none, mask=is_row[:, None] & (filling >= count))


@triton.jit
def _half(bits):
    """The upper half of float32's bits rounded to bfloat16, ties to even, int16; of NaN, the bits that torch gives."""
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return (tl.where((bits & _ABS) > _INF, 0x7FC00000, rounded) >> 16).to(tl.int16)


# Indexer keys


@triton.jit
def key_bytes(J: tl.constexpr, FORMAT: tl.constexpr):
    """The bytes of a key, as ``index_row_bytes`` has them."""
    if _is_packed(FORMAT):
        return _code_bytes(J, FORMAT) + (J + _INDEX_GROUP - 1) // _INDEX_GROUP
    else:
        return J * (4 if FORMAT == "float32" else 2)


@triton.jit
def _code_bytes(J: tl.constexpr, FORMAT: tl.constexpr):
    if FORMAT == "packed-fp8":
        return J
    else:
        return (J + 1) // 2


@triton.jit
def load_keys(
    pages, is_key, entry, WIDTH: tl.constexpr, J: tl.constexpr, ENTRIES: tl.constexpr, FORMAT: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Keys of pages as they lie there (``rows.formats.index_places``), [N, WIDTH] float32; zero from J on.

    pages: [N] pointers to the first byte of the page of each; entry: [N], below ENTRIES, of which
    there are 0 in a list of rows. WIDTH is a power of two, at least 2.
    """
    channel = tl.arange(0, WIDTH)[None, :]
    is_in = is_key[:, None] & (channel < J)
    if _is_packed(FORMAT):
        is_fp4: tl.constexpr = FORMAT == "packed"
        group: tl.constexpr = _INDEX_GROUP if WIDTH > _INDEX_GROUP else WIDTH
        byte, is_byte, scale_at, is_group = _key_places(entry, is_key, N, WIDTH, J, ENTRIES, group, FORMAT)
        code = tl.load(pages[:, None] + byte, mask=is_byte, other=0).to(tl.int32)
        scale = tl.load(pages[:, None] + scale_at, mask=is_group, other=0).to(tl.int32)
        if is_fp4:
            code = tl.join(code & 15, code >> 4)
        code = tl.reshape(code, (N * WIDTH // group, group))
        value = value_of(code, is_fp4) * tl.reshape(factor_of(scale), (N * WIDTH // group, 1))
        return tl.where(is_in, tl.reshape(value, (N, WIDTH)), 0.0)
    else:
        keys = (pages + entry * key_bytes(J, FORMAT))[:, None]
        if FORMAT == "float32":
            return tl.load(keys.to(tl.pointer_type(tl.float32)) + channel, mask=is_in, other=0)
        else:
            half = tl.load(keys.to(tl.pointer_type(tl.int16)) + channel, mask=is_in, other=0)
            return number_of(half.to(tl.int32) << 16)


@triton.jit
def store_keys(
    pages, is_key, entry, x, N: tl.constexpr, WIDTH: tl.constexpr, J: tl.constexpr, ENTRIES: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Write x [N, WIDTH], float32, of which the first J channels count, as keys of pages. See ``load_keys``."""
    channel = tl.arange(0, WIDTH)[None, :]
    is_in = is_key[:, None] & (channel < J)
    bits = bits_of(x)
    if _is_packed(FORMAT):
        is_fp4: tl.constexpr = FORMAT == "packed"
        group: tl.constexpr = _INDEX_GROUP if WIDTH > _INDEX_GROUP else WIDTH
        byte, is_byte, scale_at, is_group = _key_places(entry, is_key, N, WIDTH, J, ENTRIES, group, FORMAT)
        bits = tl.reshape(tl.where(channel < J, bits, 0), (N * WIDTH // group, group))
        scale, stored = group_scales(bits, is_fp4, True)
        code = code_of(bits, scale[:, None], is_fp4)
        if is_fp4:
            low, high = tl.split(tl.reshape(code, (N, WIDTH // 2, 2)))
            code = low | high << 4
        else:
            code = tl.reshape(code, (N, WIDTH))
        tl.store(pages[:, None] + byte, code.to(tl.uint8), mask=is_byte)
        stored = tl.reshape(stored, (N, WIDTH // group)).to(tl.uint8)
        tl.store(pages[:, None] + scale_at, stored, mask=is_group)
    else:
        keys = (pages + entry * key_bytes(J, FORMAT))[:, None]
        if FORMAT == "float32":
            tl.store(keys.to(tl.pointer_type(tl.int32)) + channel, bits, mask=is_in)
        else:
            tl.store(keys.to(tl.pointer_type(tl.int16)) + channel, _half(bits), mask=is_in)


@triton.jit
def _key_places(
    entry, is_key, N: tl.constexpr, WIDTH: tl.constexpr, J: tl.constexpr, ENTRIES: tl.constexpr, GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Where in its page the bytes of codes of a packed key lie, and its scales, each with which of them there are.

    [N, WIDTH / codes of a byte] and [N, WIDTH / GROUP]. In columns, or as a row.
    """
    codes: tl.constexpr = _code_bytes(J, FORMAT)
    byte = tl.arange(0, WIDTH // 2 if FORMAT == "packed" else WIDTH)[None, :]
    group = tl.arange(0, WIDTH // GROUP)[None, :]
    is_byte = is_key[:, None] & (byte < codes)
    is_group = is_key[:, None] & (group < (J + GROUP - 1) // GROUP)
    if ENTRIES > 0 and J == J // _INDEX_GROUP * _INDEX_GROUP:
        own = entry[:, None]
        inside = byte % _UNIT
        if FORMAT == "packed-fp8":
            inside = inside % 2 * 2 + inside // 2  # UNIT_ORDER
        at = byte // _UNIT * (_UNIT * ENTRIES) + own * _UNIT + inside
        return at, is_byte, (codes + group) * ENTRIES + own, is_group
    else:
        row = (entry * key_bytes(J, FORMAT))[:, None]
        return row + byte, is_byte, row + codes + group, is_group
