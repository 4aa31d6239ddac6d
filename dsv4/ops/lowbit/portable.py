"""Low precision through torch's own 8-bit dtypes; E2M1 by its midpoints.

Blocks are gone through band by band, 128 rows at a time, so that little is held besides the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from dsv4.ops.hadamard import portable as hadamard
from dsv4.ops.lowbit.packed import Packed
from dsv4.ops.lowbit.tables import BLOCK, E2M1, E4M3, FP4_GROUP, NAN_SCALE, Code

# Sizes from which the next code is nearer; a tie goes to the even code, so every other midpoint still rounds down.
E2M1_FROM = (0.25 + 2**-25, 0.75, 1.25 + 2**-23, 1.75, 2.5 + 2**-22, 3.5, 5.0 + 2**-21)
TINY = 2.0**-30  # a factor of E2M1 from which down E4M3 rounds all to zero


def quantise_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_rows``."""
    return encode(x, group, E4M3)


def quantise_fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_fp4``; codes and scales."""
    codes, scales = encode(w, FP4_GROUP, E2M1)
    return join_nibbles(codes), scales


def quantise_blocks(w: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_blocks``; codes and scales."""
    w = w.float()
    scales = _block_scales(w, scale_dtype)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for band, made, divisor in _bands(w, codes, scales):
        made.copy_(_e4m3_codes(band / divisor))
    return codes, scales


def dequantise(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.dequantise``."""
    if packed.kind == "fp4":
        return decode(split_nibbles(packed.codes, packed.shape[-1]), packed.scales, FP4_GROUP, E2M1).to(dtype)
    w = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    for band, made, factor in _bands(packed.codes, w, packed.scales):
        made.copy_(_values(band, E4M3) * factor)
    return w


def reblock(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.reblock``; codes, scales, and how many values each block lost, int64."""
    scales = (
        (_block_maxima(packed.scales.split(BLOCK, dim=-2), BLOCK // FP4_GROUP).int() - 6).clamp(min=0).to(torch.uint8)
    )
    codes = torch.empty(packed.shape, dtype=torch.uint8, device=packed.codes.device)
    lost = torch.empty_like(scales, dtype=torch.int64)
    bands = zip(packed.codes.split(BLOCK, dim=-2), packed.scales.split(BLOCK, dim=-2), strict=True)
    for i, (nibbles, own) in enumerate(bands):
        shift = own.int() - _spread(scales[..., i : i + 1, :], BLOCK // FP4_GROUP, own.shape[-1]).int()
        factor = torch.ldexp(torch.ones_like(shift, dtype=torch.float32), shift).clamp(min=TINY)
        values = _values(split_nibbles(nibbles, packed.shape[-1]), E2M1) * _spread(factor, FP4_GROUP, packed.shape[-1])
        made = _e4m3_codes(values)
        codes[..., i * BLOCK : (i + 1) * BLOCK, :] = made
        lost[..., i, :] = grouped(_values(made, E4M3) != values, BLOCK).sum(dim=(-3, -1))
    return codes, scales, lost


def round_rows(x: torch.Tensor, group: int, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_rows``."""
    first, rest = x.tensor_split([channels], dim=-1)
    return torch.cat([_rounded(first, group, E4M3, x.dtype), rest], dim=-1)


def round_index(x: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_index``."""
    return _rounded(hadamard.hadamard(x), FP4_GROUP, E2M1, x.dtype)


def round_fp4(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_fp4``."""
    return _rounded(w, FP4_GROUP, E2M1, dtype)


def round_blocks(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_blocks``."""
    return dequantise(Packed(*quantise_blocks(w, torch.uint8), "fp8"), dtype)


# Groups of rows, which the rows of the cache share


def encode(x: torch.Tensor, group: int, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of x [..., n], signs included, and the E8M0 scales [..., groups], both uint8.

    A group with a NaN has the scale NaN where the code has none.
    """
    parts = grouped(x.float(), group)
    scales = _scales(parts.abs().nan_to_num().amax(dim=-1), code)
    scaled = parts * _inverses(scales)[..., None]
    codes = _e2m1_codes(scaled) if code is E2M1 else _e4m3_codes(scaled)
    if not code.has_nan:
        scales = scales.masked_fill(parts.isnan().any(dim=-1), NAN_SCALE)
    return _ungrouped(codes, x.shape[-1]), scales


def decode(codes: torch.Tensor, scales: torch.Tensor, group: int, code: Code) -> torch.Tensor:
    """Return the values of codes [..., n] with E8M0 scales [..., groups], float32."""
    parts = grouped(_values(codes, code), group)
    return _ungrouped(parts * _numbers(scales)[..., None], codes.shape[-1])


def join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[..., n] codes of 4 bits as [..., ceil(n / 2)] bytes, the low nibble first."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | codes[..., 1::2] << 4


def split_nibbles(nibbles: torch.Tensor, n: int) -> torch.Tensor:
    """The n codes of bytes [..., ceil(n / 2)]."""
    return torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(-2)[..., :n]


def grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """[..., n] as [..., groups, group], the last one filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def _ungrouped(parts: torch.Tensor, n: int) -> torch.Tensor:
    """The first n numbers of groups [..., groups, group]."""
    return parts.flatten(-2)[..., :n]


def _spread(scales: torch.Tensor, group: int, n: int) -> torch.Tensor:
    """[..., groups] to the n columns they scale."""
    return scales.repeat_interleave(group, dim=-1)[..., :n]


def _rounded(x: torch.Tensor, group: int, code: Code, dtype: torch.dtype) -> torch.Tensor:
    return decode(*encode(x, group, code), group, code).to(dtype)


# Blocks


def _bands(
    x: torch.Tensor, made: torch.Tensor, scales: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Bands of 128 rows of x and of what is made of it, [..., 128, I], each with its scales as numbers [..., 1, I]."""
    wide = _spread(_numbers(scales), BLOCK, x.shape[-1])  # [..., O / 128, I]
    return zip(x.split(BLOCK, dim=-2), made.split(BLOCK, dim=-2), wide.split(1, dim=-2), strict=True)


def _block_scales(w: torch.Tensor, scale_dtype: torch.dtype) -> torch.Tensor:
    most = _block_maxima((band.abs().nan_to_num() for band in w.split(BLOCK, dim=-2)), BLOCK)
    return _scales(most, E4M3) if scale_dtype == torch.uint8 else most.clamp(min=E4M3.floor) / E4M3.largest


def _block_maxima(bands: Iterable[torch.Tensor], columns: int) -> torch.Tensor:
    """The largest of each block of so many columns of bands [..., 128, I]."""
    down = torch.stack([band.amax(dim=-2) for band in bands], dim=-2)  # [..., O / 128, I]
    return grouped(down, columns).amax(dim=-1)


# Numbers


def _scales(most: torch.Tensor, code: Code) -> torch.Tensor:
    """The E8M0 scales of groups whose largest sizes these are.

    frexp reads them off the bits, so that exact powers of two do not hang on a rounded logarithm.
    """
    mantissa, exponent = math.frexp(code.largest)
    own_mantissa, own_exponent = most.clamp(min=code.floor).frexp()
    return (own_exponent - exponent + (own_mantissa > mantissa) + 127).to(torch.uint8)


def _inverses(scales: torch.Tensor) -> torch.Tensor:
    """One over E8M0 scales of 1 to 253, float32."""
    return (254 - scales.int() << 23).view(torch.float32)


def _numbers(scales: torch.Tensor) -> torch.Tensor:
    """Scales of either kind as float32."""
    if scales.dtype == torch.float32:
        return scales
    return scales.view(torch.float8_e8m0fnu).float()


def _e4m3_codes(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn).view(torch.uint8)


def _e2m1_codes(scaled: torch.Tensor) -> torch.Tensor:
    codes, sizes = scaled.signbit().to(torch.uint8) * E2M1.sign, scaled.abs()
    for edge in E2M1_FROM:
        codes += sizes >= edge
    return codes


def _values(codes: torch.Tensor, code: Code) -> torch.Tensor:
    """The values of codes, signs included, as float32."""
    if code is not E2M1:
        return codes.view(torch.float8_e4m3fn).float()
    table = torch.tensor([*code.values, *(-value for value in code.values)], device=codes.device)
    return table[codes.int()]
