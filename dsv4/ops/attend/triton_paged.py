"""The kernels of paged attention. How lists of keys are cut is told in ``paged_triton.py``.

All launches for one kind of layer run one compiled kernel, whatever they cut and store, and no product is fused with a
sum but where it is written so: bits are those of the operations below.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

import triton
import triton.language as tl

from dsv4.ops.attend.triton_backward import LOG2_E
from dsv4.ops.lowbit.triton_codes import bits_of, number_of
from dsv4.ops.places import PAGE_TOKENS
from dsv4.ops.rows.formats import ROW_GROUP
from dsv4.ops.rows.triton_rows import load_channels, load_scales, store_rows

_PAGE = tl.constexpr(PAGE_TOKENS)
_GROUP = tl.constexpr(ROW_GROUP)
_LEAST = tl.constexpr(-1e30)  # the peak of no keys: -inf would make differences of it no number
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=["first_token", "num_parts", "window_parts", "units_each", "width", "most"])
def attend_parts(
    q_ptr, sink_ptr, own_ptr, ring_ptr, pages_ptr, slot_ptr, position_ptr, first_ptr, table_ptr, picked_ptr,
    out_ptr, sums_ptr, peaks_ptr, totals_ptr,
    first_token, num_parts, window_parts, units_each, width, most, log2_scale,
    L: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr, IS_PICKED: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr,
    BYTES: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one token, and a block of heads. Past 60 lines, since where keys lie is one thought."""
    head_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0)
    head = program % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    program = program // head_blocks
    part = program % num_parts
    token = first_token + program // num_parts
    position = tl.load(position_ptr + token)
    first_unit, last_unit = _window_units(part, window_parts, position, WINDOW, UNIT)
    first_entry, last_entry = _entry_units(part, window_parts, units_each, position, most, RATIO, UNIT)
    if first_unit >= last_unit and first_entry >= last_entry:
        return

    q = _queries(q_ptr, token, head, H, K, BLOCK_C)
    sums = _no_sums(q, K, BLOCK_H, BLOCK_C)
    peaks = tl.full((BLOCK_H,), _LEAST, dtype=tl.float32)
    totals = tl.zeros((BLOCK_H,), dtype=tl.float32)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    place = tl.arange(0, UNIT)

    begin = tl.maximum(position - WINDOW + 1, 0)
    own_begin = tl.load(first_ptr + token) - token + position  # the position of the sequence's first token in the step
    ring = ring_ptr + slot * (L * BYTES)
    for unit in tl.range(first_unit, last_unit, num_stages=STAGES):
        raw = begin + unit * UNIT + place
        is_seen = raw <= position
        mine = own_ptr + (token - position + raw).to(tl.int64) * BYTES
        rows = tl.where(raw >= own_begin, mine, ring + (raw % L).to(tl.int64) * BYTES)
        rows = tl.multiple_of(rows, ALIGNMENT)  # the compiler does not look through a choice
        sums, peaks, totals = _meet(
            q,
            rows,
            is_seen,
            sums,
            peaks,
            totals,
            log2_scale,
            most >= 0,
            num_parts > 0,
            K,
            R,
            FORMAT,
            BLOCK_H,
            BLOCK_C,
            UNIT,
        )
    if RATIO > 0:
        where = (pages_ptr, table_ptr + slot * width, picked_ptr + token.to(tl.int64) * most)
        rows, is_seen = _entry_rows(*where, first_entry * UNIT + place, position, most, RATIO, IS_PICKED, BYTES)
        for unit in tl.range(first_entry, last_entry, num_stages=STAGES):
            # Where the next rows lie is found out before their turn, so that they can be fetched beside the products.
            entry = (unit + 1) * UNIT + place
            next_rows, next_is_seen = _entry_rows(*where, entry, position, most, RATIO, IS_PICKED, BYTES)
            sums, peaks, totals = _meet(
                q,
                rows,
                is_seen,
                sums,
                peaks,
                totals,
                log2_scale,
                most >= 0,
                num_parts > 0,
                K,
                R,
                FORMAT,
                BLOCK_H,
                BLOCK_C,
                UNIT,
            )
            rows, is_seen = next_rows, next_is_seen

    is_head = head < H
    if (window_parts == 0) & (_num_units(position, most, RATIO, UNIT) <= units_each):  # the token is this piece
        factor = _last_factor(sink_ptr, head, peaks, totals, H)
        row = token.to(tl.int64) * H + head
        for i in tl.static_range(len(sums)):
            channel = i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            mean = (sums[i] + 0.0) * factor[:, None]  # 0 of either sign becomes 0, as in a sum with the first part
            at = out_ptr + row[:, None] * K + channel
            tl.store(at, mean.to(out_ptr.dtype.element_ty), mask=is_head[:, None] & (channel < K))
    else:
        row = program.to(tl.int64) * H + head
        tl.store(peaks_ptr + row, peaks, mask=is_head)
        tl.store(totals_ptr + row, totals, mask=is_head)
        for i in tl.static_range(len(sums)):
            channel = i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            tl.store(sums_ptr + row[:, None] * K + channel, sums[i], mask=is_head[:, None] & (channel < K))


@triton.jit
def _window_units(part, window_parts, position, WINDOW: tl.constexpr, UNIT: tl.constexpr):
    """The units of the window that a part has: one, or the first part all of them."""
    units = tl.cdiv(tl.minimum(position + 1, WINDOW), UNIT)
    if window_parts > 0:
        first = tl.minimum(part, units)
        last = tl.minimum(part + 1, units)
    else:
        first = units * 0
        last = tl.where(part == 0, units, 0)
    return first, tl.where(part < tl.maximum(window_parts, 1), last, first)


@triton.jit
def _num_units(position, most, RATIO: tl.constexpr, UNIT: tl.constexpr):
    """How many units of entries a token sees."""
    if RATIO == 0:
        return position * 0
    else:
        return tl.cdiv(tl.minimum((position + 1) // RATIO, most), UNIT)


@triton.jit
def _entry_units(part, window_parts, units_each, position, most, RATIO: tl.constexpr, UNIT: tl.constexpr):
    """The units of entries that a part has."""
    first = tl.maximum(part - window_parts, 0) * units_each
    last = tl.minimum(first + units_each, _num_units(position, most, RATIO, UNIT))
    return first, tl.where(part < window_parts, 0, last)


@triton.jit
def _entry_rows(
    pages_ptr, table_ptr, picked_ptr, entry, position, most,
    RATIO: tl.constexpr, IS_PICKED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Pointers to the rows of entries [n], or of those in these places of the picks, and which of them are seen."""
    each: tl.constexpr = _PAGE // RATIO
    if IS_PICKED:
        entry = tl.load(picked_ptr + entry, mask=entry < most, other=-1)
        is_seen = entry >= 0
    else:
        is_seen = entry < tl.minimum((position + 1) // RATIO, most)
    page = tl.load(table_ptr + entry // each, mask=is_seen, other=0)
    return pages_ptr + (page.to(tl.int64) * each + entry % each) * BYTES, is_seen


@triton.jit
def _queries(q_ptr, token, head, H: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Blocks of the channels of the queries, [h, c] each."""
    row = token.to(tl.int64) * H + head
    blocks = ()
    for first in tl.static_range(0, K, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)[None, :]
        is_in = (head < H)[:, None]
        if first + BLOCK_C > K:
            is_in = is_in & (channel < K)
        blocks = blocks + (tl.load(q_ptr + row[:, None] * K + channel, mask=is_in, other=0.0),)  # noqa: RUF005
    return blocks


@triton.jit
def _no_sums(q, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    sums = ()
    for _ in tl.static_range(len(q)):
        sums = sums + (tl.zeros((BLOCK_H, BLOCK_C), dtype=tl.float32),)  # noqa: RUF005
    return sums


@triton.jit
def _meet(
    q, rows, is_seen, sums, peaks, totals, log2_scale, is_there, is_still_there,
    K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Join a unit of keys to what there is: sums [h, c] by blocks and totals [h] are relative to exp2(peaks).

    It is there. As in ``triton.py`` the conditions are for the compiler: the next unit arrives beside the products, and
    those whose results reach another product are not formed twice, by each half of the warps.
    """
    scales = load_scales(rows, is_seen, K, R, FORMAT)
    keys = ()
    for i in tl.static_range(len(q)):
        block = _block(rows, is_seen, scales, i * BLOCK_C, BLOCK_C, K, R, FORMAT, q[i].dtype, UNIT)
        keys = keys + (block,)  # noqa: RUF005 - a kernel has no other way to lengthen a tuple
    if is_there:
        weights = tl.zeros((BLOCK_H, UNIT), dtype=q[0].dtype)
        unit_peaks = tl.zeros_like(peaks)
        unit_totals = tl.zeros_like(totals)
        if is_still_there:
            scores = tl.zeros((BLOCK_H, UNIT), dtype=tl.float32)
            for i in tl.static_range(len(q)):
                scores = tl.fma(tl.dot(q[i], tl.trans(keys[i]), input_precision="ieee"), log2_scale, scores)  # [h, n]
            scores = tl.where(is_seen[None, :], scores, float("-inf"))
            unit_peaks = tl.maximum(tl.max(scores, axis=1), _LEAST)
            shares = tl.exp2(scores - unit_peaks[:, None])
            unit_totals = tl.sum(shares, axis=1)
            weights = shares.to(q[0].dtype)
        peaks, shrink, grow = _peaks(peaks, unit_peaks)
        totals = _join(totals, shrink, unit_totals, grow)
        joined = ()
        for i in tl.static_range(len(q)):
            unit_sums = tl.dot(weights, keys[i], input_precision="ieee")
            joined = joined + (_join(sums[i], shrink[:, None], unit_sums, grow[:, None]),)  # noqa: RUF005
        sums = joined
    return sums, peaks, totals


@triton.jit
def _block(
    rows, is_seen, scales, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Channels of a unit's keys, [n, c]; packed ones are read by the 64 that share a scale."""
    if WIDTH <= _GROUP or FORMAT == "bfloat16" or FORMAT == "float32":
        return load_channels(rows, is_seen, scales, FIRST, WIDTH, K, R, FORMAT, dtype)
    else:
        half: tl.constexpr = WIDTH // 2
        low = _block(rows, is_seen, scales, FIRST, half, K, R, FORMAT, dtype, UNIT)
        high = _block(rows, is_seen, scales, FIRST + half, half, K, R, FORMAT, dtype, UNIT)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (UNIT, WIDTH))


@triton.jit
def _peaks(peaks, other):
    """The larger of two peaks, and what sums relative to each are to be multiplied with."""
    peak = tl.maximum(peaks, other)
    return peak, tl.exp2(peaks - peak), tl.exp2(other - peak)


@triton.jit
def _join(sums, shrink, other, grow):
    return tl.fma(sums, shrink, other * grow)


@triton.jit
def _last_factor(sink_ptr, head, peaks, totals, H: tl.constexpr):
    """What the sums of heads are to be multiplied with: the sink takes part in the denominator alone."""
    sink = tl.load(sink_ptr + head, mask=head < H, other=0.0).to(tl.float32) * _LOG2_E
    _, shrink, weight = _peaks(peaks, sink)
    return shrink / tl.fma(totals, shrink, weight)


@triton.jit(do_not_specialize=["first_token", "num_parts", "window_parts", "units_each", "most"])
def join_parts(
    sink_ptr, position_ptr, out_ptr, sums_ptr, peaks_ptr, totals_ptr,
    first_token, num_parts, window_parts, units_each, most,
    WINDOW: tl.constexpr, RATIO: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    UNIT: tl.constexpr, EACH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Join the parts of a head of a token to pieces, of EACH parts of entries, then pieces to the output."""
    head = tl.program_id(0) % H
    own = tl.program_id(0) // H
    token = first_token + own
    position = tl.load(position_ptr + token)
    units = _num_units(position, most, RATIO, UNIT)
    if (window_parts == 0) & (units <= units_each):  # one piece, whose program has stored the output
        return
    where = (peaks_ptr, totals_ptr, sums_ptr)
    row = own.to(tl.int64) * num_parts * H + head
    sums, peak, total = _no_part(BLOCK_K)
    piece_sums, piece_peak, piece_total = _no_part(BLOCK_K)
    for part in range(tl.minimum(window_parts, tl.cdiv(tl.minimum(position + 1, WINDOW), UNIT))):
        piece_sums, piece_peak, piece_total = _join_part(
            *where, row + part * H, part >= 0, piece_sums, piece_peak, piece_total, K, BLOCK_K
        )
    last = tl.cdiv(units, units_each)
    for first in tl.range(0, tl.maximum(last, 1), EACH, num_stages=2):
        for i in tl.static_range(EACH):
            at = row + (window_parts + first + i) * H
            piece_sums, piece_peak, piece_total = _join_part(
                *where, at, first + i < last, piece_sums, piece_peak, piece_total, K, BLOCK_K
            )
        peak, shrink, grow = _peaks(peak, piece_peak)
        total = _join(total, shrink, piece_total, grow)
        sums = _join(sums, shrink, piece_sums, grow)
        piece_sums, piece_peak, piece_total = _no_part(BLOCK_K)
    factor = _last_factor(sink_ptr, head, peak, total, H)
    channel = tl.arange(0, BLOCK_K)
    at = out_ptr + (token.to(tl.int64) * H + head) * K + channel
    tl.store(at, (sums * factor).to(out_ptr.dtype.element_ty), mask=channel < K)


@triton.jit
def _no_part(BLOCK_K: tl.constexpr):
    return tl.zeros((BLOCK_K,), dtype=tl.float32), tl.full((), _LEAST, tl.float32), tl.full((), 0.0, tl.float32)


@triton.jit
def _join_part(
    peaks_ptr, totals_ptr, sums_ptr, row, is_there, sums, peak, total, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Join a part, if it is there, to what there is of a head: sums [k], and its peak and total."""
    channel = tl.arange(0, BLOCK_K)
    part_peak = tl.load(peaks_ptr + row, mask=is_there, other=0.0)
    part_total = tl.load(totals_ptr + row, mask=is_there, other=0.0)
    part_sums = tl.load(sums_ptr + row * K + channel, mask=channel < tl.where(is_there, K, 0), other=0.0)
    new_peak, shrink, grow = _peaks(peak, part_peak)
    sums = tl.where(is_there, _join(sums, shrink, part_sums, grow), sums)
    total = tl.where(is_there, _join(total, shrink, part_total, grow), total)
    return sums, tl.where(is_there, new_peak, peak), total


@triton.jit(do_not_specialize=["num_tokens"])
def store_rows_of_ring(
    kv_ptr, ring_ptr, slot_ptr, position_ptr, first_ptr, num_tokens,
    L: tl.constexpr, K: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr, BYTES: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < num_tokens
    # The last L tokens of a sequence are those after whose L-th successor another begins, or the step ends.
    first = tl.load(first_ptr + token, mask=is_token, other=0)
    later = tl.load(first_ptr + token + L, mask=token < num_tokens - L, other=-1)
    is_kept = is_token & (later != first)
    slot = tl.load(slot_ptr + token, mask=is_kept, other=0).to(tl.int64)
    position = tl.load(position_ptr + token, mask=is_kept, other=0)
    rows = ring_ptr + (slot * L + position % L) * BYTES
    channel = tl.arange(0, WIDTH)[None, :]
    at = kv_ptr + token.to(tl.int64)[:, None] * K + channel
    given = tl.load(at, mask=is_kept[:, None] & (channel < K), other=0)
    store_rows(rows, is_kept, number_of(bits_of(given)), ROWS, WIDTH, K, R, FORMAT)
