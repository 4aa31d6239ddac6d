"""Index scores of a tile of entries, wherever their keys lie, as integers that compare as the scores do.

A tile is one product, [entries, J] x [J, I]: with heads as columns a thread holds whole runs of an entry's heads, so
that their weighted sum stays in its registers. However a call is cut into programs, an entry's score comes out of the
same tile, at the same place in it, by the same function; and multiplications and additions are not fused (``EXACT``),
which compilers would decide anew in each kernel. So a score has the same bits whatever else the call holds.

A score of -0 is one of 0, and what a query does not see is ``NOTHING``, below every score. Beside the scores, the
largest of each ``FOLD`` neighbours is kept: by those few numbers ``triton_choice.py`` finds where to look.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from dsv4.ops.lowbit.triton_codes import bits_of, factor_of, number_of, raw_bits, value_of
from dsv4.ops.rows.formats import INDEX_GROUP, RowFormat, is_packed

FOLD = 16  # entries that are first represented by their largest score
PAGE_ENTRIES = 32  # of a page of keys
NOTHING = tl.constexpr(-(2**31))
EXACT = {"enable_fp_fusion": False}

_PAGE_ENTRIES = tl.constexpr(PAGE_ENTRIES)
_INDEX_GROUP = tl.constexpr(INDEX_GROUP)  # codes that share a scale


class Config(NamedTuple):
    """Entries of a tile, warps of a program, how many tiles are on their way, and registers of a thread at most."""

    entries: int
    warps: int
    stages: int
    registers: int | None


CONFIGS = {
    # Queries stream past a tile of keys through L2, 16 KiB each: 256 entries halve that beside 128. Their 64 KiB and
    # three queries on their way, and 128 registers a thread, leave room for a second program, whose products hide the
    # sums of the first.
    "wide": Config(256, 8, 3, 128),
    "deep": Config(128, 4, 3, None),
    # Packed keys are unpacked into registers and stay there, as many as the sums take.
    "even": Config(128, 8, 3, 128),
    # float32 has no tensor cores here.
    "float32": Config(32, 8, 1, None),
}
STORED = "wide"  # for 16-bit dtypes, of keys that a product can read as they are stored
CONVERTED = "even"  # and of others
GROUP = 32  # queries that share a tile of keys; any number gives the same bits
FEW = 64  # up to so many queries, each streams the keys by itself
FEW_GROUP = 8  # queries that a program then takes one after the other
SPLITS = 256  # programs over which the entries then are spread: two for each multiprocessor of an H200, or nearly

Layout = Literal["rows", "pages", "fp4-columns", "fp4-rows", "fp8-columns", "fp8-rows"]


class Keys(NamedTuple):
    """Where keys lie. data: as kernels read it; table: [slots, n] int32; num_entries: of the longest sequence, C.

    layout: ``rows``, data [B, C, J]; else pages of 32 entries, whose numbers the table has: ``pages`` of rows,
    ``fp4-columns`` and ``fp8-columns`` of packed keys as words, with the pages as bytes for their scales, ``fp4-rows``
    and ``fp8-rows`` of packed keys in rows of bytes. Without table or scales, data stands in.
    """

    data: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    num_entries: int
    layout: Layout


class Queries(NamedTuple):
    """Queries in one flat list, and which entries of which sequence each of them sees. All are contiguous.

    q: [n, I, J]; weights: [n, I]. With a ratio, slot and end are [n] int32, the slot and the position of a token, which
    sees (position + 1) // ratio entries, and begin is not read. With ratio 0, begin and end are [n] int64, the bounds
    of what is seen, and queries belong to rows of ``num_tokens``.
    """

    q: torch.Tensor
    weights: torch.Tensor
    slot: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    num_tokens: int
    ratio: int


class Scores(NamedTuple):
    """Scores of some queries as integers, [n, length] int32, and the largest of each fold, [n, length / FOLD]."""

    ordered: torch.Tensor
    peaks: torch.Tensor


def config_of(queries: Queries, keys: Keys) -> Config:
    """Return the tile, which is the same for all that a call can hold of these dtypes."""
    dtype = queries.q.dtype
    if dtype == torch.float32:
        return CONFIGS["float32"]
    return CONFIGS[STORED if keys.data.dtype == dtype else CONVERTED]


def score_into(scores: Scores, queries: Queries, keys: Keys, first: int, num_queries: int, num_picks: int) -> None:
    """Write the scores of queries from ``first`` on, wherever those that see more than num_picks entries see one."""
    config = config_of(queries, keys)
    num_tiles = scores.ordered.shape[1] // config.entries
    is_few = queries.q.shape[0] <= FEW
    group = FEW_GROUP if is_few else GROUP
    splits = min(SPLITS, num_tiles)
    num_groups = triton.cdiv(num_queries, group)
    kernel = _score_few if is_few else _score_many
    kernel[(splits if is_few else num_tiles, num_groups)](
        *(queries.q, queries.weights, keys.data, keys.scales, keys.table),
        *(queries.slot, queries.begin, queries.end, *scores),
        *(first, first + num_queries, queries.num_tokens, keys.num_entries, keys.table.shape[-1], num_picks),
        scores.ordered.shape[1],
        RATIO=queries.ratio,
        LAYOUT=keys.layout,
        HEADS=queries.q.shape[1],
        CHANNELS=queries.q.shape[2],
        BLOCK_I=max(16, triton.next_power_of_2(queries.q.shape[1])),
        BLOCK_J=max(16, triton.next_power_of_2(queries.q.shape[2])),
        BLOCK_N=config.entries,
        FOLD=FOLD,
        GROUP=group,
        num_warps=config.warps,
        num_stages=config.stages + (is_few and keys.layout != "rows"),  # to find pages is a stage of its own
        maxnreg=config.registers,
        **EXACT,
    )


# Kernels


@triton.jit
def seen_by(query, stop, slot_ptr, begin_ptr, end_ptr, T, C, RATIO: tl.constexpr):
    """Slot, begin and end of queries, one or [n]: begin <= entry < end <= C is seen; past the last, nothing of -1."""
    is_query = query < stop
    if RATIO:
        slot = tl.load(slot_ptr + query, mask=is_query, other=-1)
        end = (tl.load(end_ptr + query, mask=is_query, other=-1) + 1) // RATIO
        begin = end * 0
    else:
        slot = tl.where(is_query, query // T, -1).to(tl.int32)
        end = tl.load(end_ptr + query, mask=is_query, other=0)
        begin = tl.maximum(tl.load(begin_ptr + query, mask=is_query, other=0), 0)
    return slot, tl.minimum(begin, C).to(tl.int32), tl.minimum(end, C).to(tl.int32)


@triton.jit
def score_tile(keys, q, weights):
    """sum_i weight_i relu(q_i . k) of keys [n, j], q [i, j] and weights [i] float32: [n] float32."""
    dots = tl.dot(keys, tl.trans(q), input_precision="ieee")  # [n, i]
    dots = dots.to(q.dtype).to(tl.float32)  # products are rounded to the dtype of q
    return tl.sum(tl.maximum(dots, 0.0) * weights[None, :], axis=1)


@triton.jit
def load_query(
    q_ptr, weights_ptr, query, HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """q [i, j] and weights [i] float32 of one query, int64; heads and channels beyond are zero."""
    head = tl.arange(0, BLOCK_I)
    channel = tl.arange(0, BLOCK_J)
    at = (query * HEADS + head)[:, None] * CHANNELS + channel[None, :]
    q = tl.load(q_ptr + at, mask=(head < HEADS)[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    return q, tl.load(weights_ptr + query * HEADS + head, mask=head < HEADS, other=0.0).to(tl.float32)


@triton.jit
def _load_keys(
    keys_ptr, scales_ptr, table_ptr, slot, first, end, C, table_width, DTYPE: tl.constexpr, LAYOUT: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys of the entries of one sequence from ``first`` on, [n, j] in ``DTYPE``; those from ``end`` on are zero."""
    entry = first + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_J)
    is_in = (entry < end)[:, None] & (channel < CHANNELS)[None, :]
    slot = slot.to(tl.int64)
    if LAYOUT == "fp4-columns" or LAYOUT == "fp8-columns":
        return _load_columns(
            keys_ptr, scales_ptr, table_ptr + slot * table_width, first, end, DTYPE, LAYOUT, CHANNELS, BLOCK_J, BLOCK_N
        )
    if LAYOUT == "rows":
        row = slot * C + entry
    else:
        page = tl.load(table_ptr + slot * table_width + entry // _PAGE_ENTRIES, mask=entry < end, other=0)
        row = page.to(tl.int64) * _PAGE_ENTRIES + entry % _PAGE_ENTRIES
    if LAYOUT == "fp4-rows" or LAYOUT == "fp8-rows":
        is_fp4: tl.constexpr = LAYOUT == "fp4-rows"
        num_bytes: tl.constexpr = (CHANNELS + 1) // 2 if is_fp4 else CHANNELS
        bytes_ptr = keys_ptr + row[:, None] * (num_bytes + (CHANNELS + _INDEX_GROUP - 1) // _INDEX_GROUP)
        byte = channel // 2 if is_fp4 else channel
        codes = tl.load(bytes_ptr + byte[None, :], mask=is_in, other=0).to(tl.int32)
        if is_fp4:
            codes = codes >> (channel % 2 * 4)[None, :] & 15
        scales = tl.load(bytes_ptr + num_bytes + channel[None, :] // _INDEX_GROUP, mask=is_in, other=0).to(tl.int32)
        return (value_of(codes, is_fp4) * factor_of(scales)).to(DTYPE)
    else:
        keys = tl.load(keys_ptr + row[:, None] * CHANNELS + channel[None, :], mask=is_in, other=0)
        if keys.dtype == tl.int16:  # bfloat16 by its bits
            return number_of(bits_of(keys)).to(DTYPE)
        else:
            return keys.to(DTYPE)


@triton.jit
def _load_columns(
    keys_ptr, scales_ptr, table_ptr, first, end, DTYPE: tl.constexpr, LAYOUT: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of packed keys in columns: a page is units, [J / codes of a word, 32] words, then scales, [J / 32, 32].

    Pages are read whole, so that a thread takes four entries at a time; nobody sees what lies beyond the end.
    """
    codes: tl.constexpr = 8 if LAYOUT == "fp4-columns" else 4  # of a word
    page_bytes: tl.constexpr = _PAGE_ENTRIES * (4 * CHANNELS // codes + CHANNELS // _INDEX_GROUP)
    number = first // _PAGE_ENTRIES + tl.arange(0, BLOCK_N // _PAGE_ENTRIES)
    is_seen = number * _PAGE_ENTRIES < end
    page = tl.load(table_ptr + number, mask=is_seen, other=0).to(tl.int64)[:, None, None]
    own = tl.arange(0, _PAGE_ENTRIES)[None, None, :]
    unit = tl.arange(0, BLOCK_J // codes)
    group = (unit // (_INDEX_GROUP // codes))[None, :, None]
    mask = is_seen[:, None, None] & (unit < CHANNELS // codes)[None, :, None] & (own >= 0)  # [p, u, 32]
    at = page * (page_bytes // 4) + (unit[None, :, None] * _PAGE_ENTRIES + own)
    words = tl.load(keys_ptr + at, mask=mask, other=0)
    at = page * page_bytes + (_PAGE_ENTRIES * 4 * CHANNELS // codes + group * _PAGE_ENTRIES + own)
    factors = _half_factor_of(tl.load(scales_ptr + at, mask=mask, other=0).to(tl.int32))
    # Joined, not spread by a dimension of shifts, so that a thread unpacks the words that it has loaded.
    if LAYOUT == "fp4-columns":
        a, e = _scaled(_e2m1_pair(words, 0), 2.0**126, factors, DTYPE)
        b, f = _scaled(_e2m1_pair(words, 4), 2.0**126, factors, DTYPE)
        c, g = _scaled(_e2m1_pair(words, 8), 2.0**126, factors, DTYPE)
        d, h = _scaled(_e2m1_pair(words, 12), 2.0**126, factors, DTYPE)
        values = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    else:
        a, b = _scaled(_e4m3_pair(words << 8), 2.0**120, factors, DTYPE)  # the order of UNIT_ORDER
        c, d = _scaled(_e4m3_pair(words), 2.0**120, factors, DTYPE)
        values = tl.join(tl.join(a, c), tl.join(b, d))
    shape: tl.constexpr = (BLOCK_N // _PAGE_ENTRIES, BLOCK_J // codes, _PAGE_ENTRIES, codes)
    values = tl.permute(tl.reshape(values, shape), (0, 2, 1, 3))  # [p, 32, u, codes]
    return tl.reshape(values, (BLOCK_N, BLOCK_J))


@triton.jit
def _e2m1_pair(words, first: tl.constexpr):
    """The codes in the four bits from ``first`` on, and 16 further on, as two bfloat16 over 2^126 in one word.

    Exponent and mantissa go where bfloat16 has them, and zero and a half, which are subnormal, are so there too.
    """
    size = words << (6 - first) if first <= 6 else words >> (first - 6)
    return size & 0x01C001C0 | (words << (12 - first)) & -0x7FFF8000


@triton.jit
def _e4m3_pair(words):
    """The same of the codes in bits 8 to 15 and 24 to 31, over 2^120. No key has the code of NaN."""
    return (words >> 4) & 0x07F007F0 | words & -0x7FFF8000


@triton.jit
def _scaled(pair, bias: tl.constexpr, factors, DTYPE: tl.constexpr):
    """The two numbers of a word, times the bias that they lack and a factor.

    With bfloat16 in and out of each product the compiler forms those of two numbers at once; the first is exact. One
    product would not do, for bias and factor together may be no number.
    """
    low = (_wide(pair) * bias).to(tl.bfloat16).to(tl.float32)
    high = (_wide(pair >> 16) * bias).to(tl.bfloat16).to(tl.float32)
    return (low * factors).to(DTYPE), (high * factors).to(DTYPE)


@triton.jit
def _wide(bits):
    """The bfloat16 of the lower 16 bits, as float32."""
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def _half_factor_of(scale):
    """``factor_of``, by way of bfloat16."""
    return _wide(scale << 7 | tl.where((scale == 0) | (scale == 255), 0x40, 0))


@triton.jit
def _keep(scores, first, begin, end, ordered_ptr, peaks_ptr, row, length, BLOCK_N: tl.constexpr, FOLD: tl.constexpr):
    """Store a tile's scores, [n] float32, from entry ``first`` on, as ordered integers, and the largest of folds."""
    entry = first + tl.arange(0, BLOCK_N)
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(scores == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    ordered = tl.where((entry >= begin) & (entry < end), ordered, NOTHING)
    tl.store(ordered_ptr + row * length + entry, ordered)
    fold = first // FOLD + tl.arange(0, BLOCK_N // FOLD)
    peaks = tl.max(tl.reshape(ordered, (BLOCK_N // FOLD, FOLD)), axis=1)
    tl.store(peaks_ptr + row * (length // FOLD) + fold, peaks)


@triton.jit
def _of(values, place, i):
    """The value at one place of [n]."""
    return tl.sum(tl.where(place == i, values, 0), axis=0)


@triton.jit
def _score_many(
    q_ptr, weights_ptr, keys_ptr, scales_ptr, table_ptr, slot_ptr, begin_ptr, end_ptr, ordered_ptr, peaks_ptr,
    first_query, stop_query, T, C, table_width, P, length, RATIO: tl.constexpr, LAYOUT: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
    FOLD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of entries, past which the queries of a group stream, by runs of those of one sequence."""
    first_entry = tl.program_id(0) * BLOCK_N
    place = tl.arange(0, GROUP)
    first = first_query + tl.program_id(1) * GROUP
    slot, begin, end = seen_by(first + place, stop_query, slot_ptr, begin_ptr, end_ptr, T, C, RATIO)
    is_reader = (end - begin > P) & (begin < first_entry + BLOCK_N) & (end > first_entry)
    start = tl.min(tl.where(is_reader, place, GROUP), axis=0)
    while start < GROUP:
        own = _of(slot, place, start)
        stop = tl.min(tl.where((place > start) & (slot != own), place, GROUP), axis=0)
        is_own = is_reader & (place >= start) & (place < stop)
        last = tl.max(tl.where(is_own, place + 1, 0), axis=0)
        last_end = tl.max(tl.where(is_own, end, 0), axis=0)
        keys = _load_keys(
            keys_ptr, scales_ptr, table_ptr, own, first_entry, last_end, C, table_width, q_ptr.dtype.element_ty, LAYOUT,
            CHANNELS, BLOCK_J, BLOCK_N,
        )  # fmt: skip
        for i in range(start, last):
            query = (first + i).to(tl.int64)
            q, weights = load_query(q_ptr, weights_ptr, query, HEADS, CHANNELS, BLOCK_I, BLOCK_J)
            scores = score_tile(keys, q, weights)
            own_begin, own_end = _of(begin, place, i), _of(end, place, i)
            _keep(
                scores, first_entry, own_begin, own_end, ordered_ptr, peaks_ptr, query - first_query, length, BLOCK_N,
                FOLD,
            )  # fmt: skip
        start = tl.min(tl.where(is_reader & (place >= stop), place, GROUP), axis=0)


@triton.jit
def _score_few(
    q_ptr, weights_ptr, keys_ptr, scales_ptr, table_ptr, slot_ptr, begin_ptr, end_ptr, ordered_ptr, peaks_ptr,
    first_query, stop_query, T, C, table_width, P, length, RATIO: tl.constexpr, LAYOUT: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
    FOLD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One of so many parts of the tiles of each query of a group: tiles stream past a query.

    A query with few tiles keeps few programs busy, and other queries of the group others: the first part turns.
    """
    splits = tl.num_programs(0)
    place = tl.arange(0, GROUP)
    first = first_query + tl.program_id(1) * GROUP
    slot, begin, end = seen_by(first + place, stop_query, slot_ptr, begin_ptr, end_ptr, T, C, RATIO)
    for i in range(GROUP):
        own, own_begin, own_end = _of(slot, place, i), _of(begin, place, i), _of(end, place, i)
        first_tile = own_begin // BLOCK_N + (tl.program_id(0) + i * (splits // GROUP + 1)) % splits
        if (own_end - own_begin > P) & (first_tile * BLOCK_N < own_end):
            query = (first + i).to(tl.int64)
            q, weights = load_query(q_ptr, weights_ptr, query, HEADS, CHANNELS, BLOCK_I, BLOCK_J)
            for tile in range(first_tile, tl.cdiv(own_end, BLOCK_N), splits):
                keys = _load_keys(
                    keys_ptr, scales_ptr, table_ptr, own, tile * BLOCK_N, own_end, C, table_width,
                    q_ptr.dtype.element_ty, LAYOUT, CHANNELS, BLOCK_J, BLOCK_N,
                )  # fmt: skip
                scores = score_tile(keys, q, weights)
                _keep(
                    scores, tile * BLOCK_N, own_begin, own_end, ordered_ptr, peaks_ptr, query - first_query, length,
                    BLOCK_N, FOLD,
                )  # fmt: skip


def rows_of(k: torch.Tensor) -> Keys:
    """Return contiguous keys, [B, C, J], as kernels find them."""
    return Keys(k, k, k, k.shape[1], "rows")


def pages_of(pages: torch.Tensor, table: torch.Tensor, row_format: RowFormat, q: torch.Tensor) -> Keys:
    """Return keys in pages, [pages, 32, bytes] uint8, as kernels find them for q [n, I, J]."""
    num_entries = table.shape[1] * PAGE_ENTRIES
    if is_packed(row_format):
        is_fp4 = row_format == "packed"
        if q.shape[2] % INDEX_GROUP:
            return Keys(pages, pages, table, num_entries, "fp4-rows" if is_fp4 else "fp8-rows")
        words = pages.flatten(1).view(torch.int32)
        return Keys(words, pages, table, num_entries, "fp4-columns" if is_fp4 else "fp8-columns")
    data = pages.view(torch.float32 if row_format == "float32" else torch.bfloat16)
    data = data if data.dtype == q.dtype else raw_bits(data)
    return Keys(data, data, table, num_entries, "pages")
