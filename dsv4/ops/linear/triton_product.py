"""The product in the middle of maps and of experts: a tile of a weight's rows by a tile of tokens, over all channels.

The weight is the left factor, for two reasons. The tensor cores take that one from registers, where codes become
numbers. (FP8 goes there straight; FP4, whose scales change within a step, the compiler takes through shared memory once
more.) And its rows fill the 64 that they need at least, so that tokens may be as few as 16, and however many they are
at a time, the sums are made in the same order.

A weight may be numbers, or codes of ``Packed``:

    plain     any float dtype, rounded to that of the tokens
    whole     float32 beside tokens of 16 bits: the sum of three of their numbers, which have all of its 24 digits
    fp8       E4M3. Sums over a block's 128 columns are scaled, as the released rule has it, with any scales: a scale
              costs a product for each of the sums, which are few, instead of one for each code
    fp4       E2M1 by a power of two, in the dtype of the tokens: exact in bfloat16

A word or byte holds the codes of 4 or 2 neighbouring columns. What a product takes at once are those at the same place
of their words: 16 words give columns 0, 4, 8 ... of 64, and the tokens' channels come in that order, as
``rows_of_codes`` lays them. So loads are wide, and no code is cut out of a word but by shifts.

Codes become numbers as in ``lowbit.triton_codes.value_of``: exponent and mantissa, put at float32's place, are the
number by a power of two, subnormal or not. Here they are shifted there out of the word, together with the sign, for on
small batches these steps are what the time goes to.
"""

# Kernels are a language of their own, in which a constexpr is a number and tensors are cut by None.

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from dsv4.ops.lowbit.packed import Packed
from dsv4.ops.lowbit.tables import ACTIVATION_GROUP
from dsv4.ops.lowbit.triton_codes import bits_of, cast_exact, factor_of, group_scales, nearest_value, raw_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODE_STEP = 128  # columns of codes at a time: a block of FP8, a word of FP4's scales, a group of activations


class Config(NamedTuple):
    """A tile: tokens, rows of the weight and columns at a time; and the warps and stages of its kernel."""

    tokens: int
    rows: int
    step: int
    warps: int
    stages: int


CONFIGS = {
    # All of 16 bits take as many columns at a time, so that their sums are made alike. Here weights are all that is
    # read: a stage of two matrices is 18 KiB, and two programs of six stages fill a multiprocessor.
    "few": Config(16, 64, 64, 4, 6),
    "some": Config(64, 128, 64, 8, 4),
    # Two sums of 128 x 128 float32 are 128 registers a thread, and a stage of all three tiles is 48 KiB.
    "many": Config(128, 128, 64, 8, 4),
    # In FP4, two tiles of codes are 8 KiB and tokens 4 KiB; several programs share a multiprocessor.
    "few codes": Config(16, 64, CODE_STEP, 4, 4),
    "some codes": Config(64, 128, CODE_STEP, 8, 3),
    # What is decoded serves all tokens of a tile; registers for a pair of sums of FP8, and what they are of, just fail.
    "many codes": Config(128, 128, CODE_STEP, 8, 3),
    # float32 has no tensor cores here. The step is that of codes.
    "float32": Config(16, 32, 32, 4, 2),
    "float32 codes": Config(16, 32, CODE_STEP, 4, 2),
}
FEW, SOME = 16, 64  # tokens of an expert, or of a map, up to which a tile is small


class Coded(NamedTuple):
    """A weight, or a stack of them, as kernels take it. numbers: numbers or codes; scales: as ``kind`` wants them."""

    numbers: torch.Tensor
    scales: torch.Tensor
    kind: str


def as_read(weight: torch.Tensor | Packed) -> Coded:
    """Return a weight in memory as the kernels walk through it; what lies so already is not copied."""
    if not isinstance(weight, Packed):
        weight = weight.contiguous()
        return Coded(weight, weight, "plain")
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    if weight.kind == "fp8":
        return Coded(_words(codes), scales, "fp8")
    return Coded(codes, _words(scales), "fp4")


def config_of(dtype: torch.dtype, weight: Coded, tokens: float) -> Config:
    """The tile for so many tokens at a weight. Columns are taken in the same order whatever their number."""
    is_plain = weight.kind in ("plain", "whole")
    if dtype == torch.float32:
        return CONFIGS["float32" if is_plain else "float32 codes"]
    size = "few" if tokens <= FEW else "some" if tokens <= SOME else "many"
    config = CONFIGS[size if is_plain else f"{size} codes"]
    # A float32 weight, rounded on its way, takes twice the room of one in the tokens' dtype.
    is_wide = is_plain and weight.numbers.dtype == torch.float32
    return config._replace(step=config.step // 2) if is_wide else config


def _words(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n] as words [..., ceil(n / 4)]: a view where they are whole, as they are of released models."""
    missing = -numbers.shape[-1] % 4
    is_whole = missing == 0 and numbers.storage_offset() % 4 == 0
    return (numbers if is_whole else F.pad(numbers, (0, missing))).view(torch.int32)  # padding by none copies, too


def rows_of_codes(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [n, K] rounded to E4M3 in groups of 128 (``lowbit.round_rows``), as a weight of this kind reads it.

    Filled up with zeros to whole groups, [n, groups * 128], and of each 64 channels (fp8), or 32 (fp4), first every
    fourth, or second, from the first on, then those from the second on, and so forth.
    """
    x = x.contiguous()
    groups = triton.cdiv(x.shape[1], ACTIVATION_GROUP)
    y = torch.empty(len(x), groups * ACTIVATION_GROUP, dtype=x.dtype, device=x.device)
    if y.numel():
        parts, tile = len(x) * groups, 16
        _round_kernel[(triton.cdiv(parts, tile),)](
            raw_bits(x), raw_bits(y), parts, groups, x.shape[1], ACTIVATION_GROUP, tile, 4 if kind == "fp8" else 2,
            num_warps=4,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["parts"])
def _round_kernel(
    x, y, parts, groups, width: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, APART: tl.constexpr
):
    part = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    place = tl.arange(0, GROUP)[None, :]
    unit: tl.constexpr = 16 * APART
    channel = (part % groups * GROUP)[:, None] + place // unit * unit + place % 16 * APART + place % unit // 16
    is_part = (part < parts)[:, None]
    bits = bits_of(tl.load(x + (part // groups * width)[:, None] + channel, mask=is_part & (channel < width), other=0))
    scale, stored = group_scales(bits, False)
    made = nearest_value(bits, scale[:, None], False) * factor_of(stored)[:, None]
    tl.store(y + part[:, None] * GROUP + place, cast_exact(made, y.dtype.element_ty), mask=is_part)


@triton.jit
def tile_of(num_tiles, num_blocks, TOGETHER: tl.constexpr):
    """The tile of tokens and the block of rows of this program.

    So many neighbouring tiles take each block at once: they find it, and their own tokens, in the second-level cache.
    """
    program = tl.program_id(0)
    first = program // (TOGETHER * num_blocks) * TOGETHER
    size = tl.minimum(num_tiles - first, TOGETHER)
    left = program % (TOGETHER * num_blocks)
    return first + left % size, left // size


@triton.jit
def matrix_of(w, scales, index, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr):
    """Where matrix ``index`` of a stack of [N, K] and its scales begin."""
    index = index.to(tl.int64)
    if KIND == "fp4":
        return w + index * (N * (K // 2)), scales + index * (N * ((K + 127) // 128))
    elif KIND == "fp8":
        return w + index * (N * ((K + 3) // 4)), scales + index * ((N + 127) // 128 * ((K + 127) // 128))
    else:
        return w + index * (N * K), scales


@triton.jit
def products(
    acc, other, x, token, w, w_other, scales, scales_other, first_row, first_step, last_step,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, IS_TURNED: tl.constexpr, IS_PAIR: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """acc [rows, tokens] plus the product of a weight's rows from ``first_row`` on; of a pair, other plus that of both.

    token: where each token's channels begin in x. The weight is [N, K], or in memory [K, N] if it is turned. Rows past
    N give what the last one does. Of its columns, those of the steps from ``first_step`` to ``last_step``.
    """
    row = first_row + tl.arange(0, ROWS)
    if N % ROWS:
        row = tl.minimum(row, N - 1)
    for step in range(first_step, last_step):
        at = x + step * STEP + token
        if KIND == "fp8":
            channels = _apart(at, 0, 4, STEP), _apart(at, 1, 4, STEP), _apart(at, 2, 4, STEP), _apart(at, 3, 4, STEP)
        elif KIND == "fp4":
            channels = _apart(at, 0, 2, STEP), _apart(at, 1, 2, STEP)
        else:
            channels = (_channels(at, K - step * STEP, K % STEP == 0, STEP),)
        acc = _meet(acc, w, scales, row, first_row, channels, step, N, K, KIND, IS_TURNED, STEP)
        if IS_PAIR:
            other = _meet(other, w_other, scales_other, row, first_row, channels, step, N, K, KIND, IS_TURNED, STEP)
    return acc, other


@triton.jit
def _channels(x, left, IS_WHOLE: tl.constexpr, STEP: tl.constexpr):
    """[STEP, tokens], of ``left`` channels that there are."""
    column = tl.arange(0, STEP)[None, :]
    at = x[:, None] + column
    return tl.trans(tl.load(at) if IS_WHOLE else tl.load(at, mask=column < left, other=0.0))


@triton.jit
def _apart(x, i: tl.constexpr, APART: tl.constexpr, STEP: tl.constexpr):
    """The channels i, i + APART ... of STEP, [STEP / APART, tokens]."""
    word = tl.arange(0, STEP // APART)[None, :]
    return tl.trans(tl.load(x[:, None] + (word // 16 * (16 * APART) + i * 16 + word % 16)))


@triton.jit
def _meet(
    acc, w, scales, row, first_row, channels, step,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, IS_TURNED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """acc plus what the weight's columns of a step give."""
    dtype: tl.constexpr = channels[0].dtype
    if KIND == "fp8":
        words: tl.constexpr = (K + 3) // 4
        word = step * (STEP // 4) + tl.arange(0, STEP // 4)
        at = w + row.to(tl.int64)[:, None] * words + word[None, :]
        codes = tl.load(at, mask=(word < words)[None, :], other=0) if words % (STEP // 4) else tl.load(at)
        # A NaN among four codes makes all of them one: their row's sum is none in any case.
        unit = tl.where(((codes & 0x7F7F7F7F) + 0x01010101 & -0x7F7F7F80) != 0, float("nan"), 1.329227995784916e36)
        total = tl.dot(fp8_number(codes, unit, 0).to(dtype), channels[0], input_precision="ieee")
        for i in tl.static_range(1, 4):
            total = tl.dot(fp8_number(codes, unit, i).to(dtype), channels[i], total, input_precision="ieee")
        scale = tl.load(scales + first_row // 128 * ((K + 127) // 128) + step)  # a tile is inside of one block
        acc += total * (scale if scales.dtype.element_ty == tl.float32 else factor_of(scale.to(tl.int32)))
    elif KIND == "fp4":
        byte = step * (STEP // 2) + tl.arange(0, STEP // 2)
        at = w + row.to(tl.int64)[:, None] * (K // 2) + byte[None, :]
        given = tl.load(at, mask=(byte < K // 2)[None, :], other=0) if K % STEP else tl.load(at)
        codes = given.to(tl.int32)
        word = tl.load(scales + row * ((K + 127) // 128) + step)
        factor = factor_of(word & 255)[:, None]
        for i in tl.static_range(1, STEP // 32):  # 16 bytes share a scale
            own = factor_of(word >> 8 * i & 255)[:, None]
            factor = tl.where(tl.arange(0, STEP // 2)[None, :] < 16 * i, factor, own)
        acc = tl.dot(fp4_number(codes, factor).to(dtype), channels[0], acc, input_precision="ieee")
        acc = tl.dot(fp4_number(codes >> 4, factor).to(dtype), channels[1], acc, input_precision="ieee")
    else:
        column = step * STEP + tl.arange(0, STEP)
        if IS_TURNED:
            at = w + column.to(tl.int64)[None, :] * N + row[:, None]
        else:
            at = w + row.to(tl.int64)[:, None] * K + column[None, :]
        given = tl.load(at, mask=(column < K)[None, :], other=0) if K % STEP else tl.load(at)
        for _ in tl.static_range(3 if KIND == "whole" else 1):
            digits = given.to(dtype)
            acc = tl.dot(digits, channels[0], acc, input_precision="ieee")
            if KIND == "whole":
                given -= digits.to(tl.float32)
    return acc


@triton.jit
def fp8_number(codes, unit, i: tl.constexpr):
    """The value of the E4M3 code in byte i of a word, float32. unit: 2^120."""
    size = codes << 20 - 8 * i if i < 3 else codes >> 4
    return (size & 0x7F00000 | codes << 24 - 8 * i & -0x80000000).to(tl.float32, bitcast=True) * unit


@triton.jit
def fp4_number(code, factor):
    """The value of an E2M1 code in the low nibble, float32, by a factor."""
    return ((code & 7) << 22 | (code & 8) << 28).to(tl.float32, bitcast=True) * 8.507059173023462e37 * factor  # 2^126
