"""Paged attention as Triton kernels (``triton_paged.py``): keys are read as the cache stores them.

The list of a token's keys, window first, is cut at fixed places into units. The largest score of a unit, its sum and
its weighted values are found from nothing but the unit; units join one after the other into a piece, and pieces join
one after the other. So bits depend on a token's own keys alone, not on what else is in the step or where it begins.

Programs take a piece each or, when that would leave most of a GPU idle, a unit each, and a second kernel joins what
they found by the same operations in the same order, but for tokens of one piece. Picked entries are one with their
window, so that prompts need no second kernel; all entries of a long sequence are many, so that few tokens keep many
programs busy. Grids are sized by shapes, never by what is on the device: a program beyond the end of its token returns
at once.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton

from dsv4.ops.attend.triton import DTYPES
from dsv4.ops.attend.triton_backward import LOG2_E
from dsv4.ops.attend.triton_paged import attend_parts, join_parts, store_rows_of_ring
from dsv4.ops.lowbit.triton_codes import raw_bits
from dsv4.ops.places import PAGE_TOKENS, Places
from dsv4.ops.rows.formats import RowFormat
from dsv4.ops.rows.triton import pack


class Config(NamedTuple):
    """heads: of a program; keys: of a unit; channels: of a block of them; stages: units whose rows are on their way."""

    heads: int
    keys: int
    channels: int
    warps: int
    stages: int


CONFIGS = {
    # 64 heads x 512 channels of float32 sums are half the registers of a multiprocessor: 8 warps share them. In shared
    # memory, of 227 KiB: 64 KiB of queries, 64 KiB of decoded keys, 36 KiB of packed rows for each stage but one, or 64
    # of bfloat16.
    "deep": Config(64, 64, 128, 8, 3),
    "narrow": Config(64, 64, 128, 8, 2),
    "small": Config(64, 32, 64, 8, 2),
    # float32 has no tensor cores here, and twice the bytes.
    "float32": Config(16, 16, 64, 4, 1),
}
CHOICES: dict[str, str] = {"packed": "deep", "packed-fp8": "deep", "bfloat16": "narrow", "float32": "small"}
"""The configuration of each row format, unless q is float32."""
MOST_DEEP = 512  # channels for which three stages fit
PIECE_KEYS = 512  # entries of a piece
PICKED_KEYS = 2048  # or picks
BUSY_PROGRAMS = 64  # fewer programs than this leave most of a GPU idle
SCRATCH_BYTES = 1 << 28  # of what programs leave for the second kernel, at a time
RING_ROWS = 4  # rows of a program that stores


def attend_paged(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    ring: torch.Tensor,
    places: Places,
    pages: torch.Tensor | None,
    picked: torch.Tensor | None,
    window: int,
    ratio: int,
    row_format: RowFormat,
    rotary_dims: int,
    scale: float,
) -> torch.Tensor:
    """See ``dsv4.ops.attend.paged.attend_paged``. q and kv: float32, float16 or bfloat16."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; expected float32, float16 or bfloat16 for the Triton kernels")
    q, (T, H, K) = q.contiguous(), q.shape
    out = torch.empty_like(q)
    if not q.numel():
        return out
    config = _config(q.dtype, row_format, K)
    plan = _Plan.of(config, H, window, ratio, places.table.shape[1], None if picked is None else picked.shape[1])
    is_whole, num_parts, units_each, window_parts = plan.cut(T)
    at_once = T if is_whole else max(1, SCRATCH_BYTES // (4 * num_parts * H * K))
    sums = q.new_empty(0 if is_whole else min(T, at_once) * num_parts, H, K, dtype=torch.float32)
    peaks, totals = (sums.new_empty(sums.shape[:2]) for _ in range(2))
    own = _as_stored(kv, row_format, rotary_dims)
    nothing = own  # where there are no pages or picks, something that is never read
    sources = (own, ring, nothing if pages is None else pages, places.slot, places.position, places.first, places.table)
    alignment = gcd(16, ring.shape[2], own.data_ptr(), ring.data_ptr())  # of rows, so that wide loads may take them
    sizes = {"WINDOW": window, "RATIO": ratio, "H": H, "K": K, "UNIT": config.keys}
    for first in range(0, T, at_once):
        count = min(at_once, T - first)
        attend_parts[(count * num_parts * plan.head_blocks,)](
            q, sink, *sources, nothing if picked is None else picked, out, sums, peaks, totals,
            first, num_parts, window_parts, units_each, places.table.shape[1], plan.most, scale * LOG2_E,
            L=ring.shape[1], IS_PICKED=picked is not None, R=rotary_dims, FORMAT=row_format, BYTES=ring.shape[2],
            ALIGNMENT=alignment, BLOCK_H=plan.heads, BLOCK_C=min(config.channels, max(16, triton.next_power_of_2(K))),
            num_warps=config.warps, STAGES=config.stages, enable_fp_fusion=False, **sizes,
        )  # fmt: skip
        if not is_whole:
            join_parts[(count * H,)](
                sink, places.position, out, sums, peaks, totals,
                first, num_parts, window_parts, units_each, plan.most, EACH=plan.piece_units // units_each,
                BLOCK_K=triton.next_power_of_2(K), num_warps=4, enable_fp_fusion=False, **sizes,
            )  # fmt: skip
    return out


def write_ring_(kv: torch.Tensor, ring: torch.Tensor, places: Places, row_format: RowFormat, rotary_dims: int) -> None:
    """See ``dsv4.ops.attend.paged.write_ring_``."""
    T, K = kv.shape
    if kv.numel():
        kv = (kv.float() if kv.dtype == torch.float64 else kv).contiguous()
        store_rows_of_ring[(triton.cdiv(T, RING_ROWS),)](
            raw_bits(kv), ring, places.slot, places.position, places.first, T,
            L=ring.shape[1], K=K, R=rotary_dims, FORMAT=row_format, BYTES=ring.shape[2],
            ROWS=RING_ROWS, WIDTH=max(2, triton.next_power_of_2(K)), num_warps=4,
        )  # fmt: skip


def _config(dtype: torch.dtype, row_format: RowFormat, channels: int) -> Config:
    if dtype == torch.float32:
        return CONFIGS["float32"]
    name = CHOICES[row_format]
    return CONFIGS["narrow" if name == "deep" and channels > MOST_DEEP else name]


def _as_stored(kv: torch.Tensor, row_format: RowFormat, rotary_dims: int) -> torch.Tensor:
    """The step's own rows, [T, bytes] uint8. Those that are stored as they are have their bytes already."""
    if row_format == str(kv.dtype).removeprefix("torch."):
        return kv.contiguous().view(torch.uint8)
    return pack(kv, row_format, rotary_dims)


class _Plan(NamedTuple):
    """How lists are cut. heads: of a program; window_units, units: of the window, and of entries at most; piece_units:
    of the entries of a piece; most: entries that a token sees at most, by the shapes of picks or the table."""

    heads: int
    head_blocks: int
    window_units: int
    units: int
    piece_units: int
    most: int

    @staticmethod
    def of(config: Config, H: int, window: int, ratio: int, table_width: int, num_picks: int | None) -> _Plan:
        heads = min(config.heads, max(16, triton.next_power_of_2(H)))
        most = 0
        if ratio:
            most = table_width * PAGE_TOKENS // ratio if num_picks is None else num_picks
        units = triton.cdiv(most, config.keys)
        piece_units = PIECE_KEYS // config.keys if num_picks is None else min(units, PICKED_KEYS // config.keys)
        return _Plan(heads, triton.cdiv(H, heads), triton.cdiv(window, config.keys), units, max(1, piece_units), most)

    def cut(self, num_tokens: int) -> tuple[bool, int, int, int]:
        """Return whether a token is one piece at most; into how many parts it is cut, how many units of entries each
        has, and how many parts before them one of the window. The same bits come out however it is cut."""
        pieces = max(1, triton.cdiv(self.units, self.piece_units))
        units = self.window_units + self.units
        if units > pieces and num_tokens * self.head_blocks * pieces < BUSY_PROGRAMS:
            return False, units, 1, self.window_units
        return pieces == 1, pieces, self.piece_units, 0  # the first piece has the window
