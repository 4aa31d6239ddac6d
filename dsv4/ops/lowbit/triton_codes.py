"""Numbers as their bits: float32 and bfloat16, and codes of E4M3, E2M1 and E8M0, in the registers of a kernel.

Integer arithmetic throughout, so that nothing hangs on a device's own 8-bit casts. bfloat16 goes in and out as the
upper half of float32's bits, held in int16.
"""

# Kernels are a language of their own, in which a constexpr is a number.

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ABS = tl.constexpr(0x7FFFFFFF)
_INF = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_MOST = tl.constexpr(0x7F7FFFFF)  # the largest float32


def raw_bits(x: torch.Tensor) -> torch.Tensor:
    """x as kernels take it: bfloat16 by its bits."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@triton.jit
def bits_of(x):
    """The bits of x in float32, int32; of bfloat16, which comes as int16, they are the upper half."""
    if x.dtype == tl.int16:
        return x.to(tl.int32) << 16
    else:
        return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def number_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def cast(y, dtype: tl.constexpr):
    """y float32 rounded to ``dtype``; int16 stands for bfloat16, to which it rounds by its bits, ties to even."""
    if dtype == tl.int16:
        bits = y.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + (bits >> 16 & 1)
        rounded = tl.where((bits & _ABS) > _INF, bits | 0x400000, rounded)
        return (rounded >> 16).to(tl.int16)
    else:
        return y.to(dtype)


@triton.jit
def size_of(bits):
    """The bits of the size of a number for the scale of its group: 0 of NaN, and the largest of infinity."""
    size = bits & _ABS
    return tl.minimum(tl.where(size > _INF, 0, size), _MOST)


@triton.jit
def scale_of(most, IS_FP4: tl.constexpr):
    """The E8M0 scale of a group by the bits of its largest size: exponents less, and one more if the mantissa is above.

    The code's largest is 1.75 x 2^8, or 1.5 x 2^2; its floor has the scale 2^-22, or 2^-126.
    """
    above: tl.constexpr = 0x3FFFFF if IS_FP4 else 0x1FFFFF  # what carries into the exponent from such a mantissa up
    return tl.maximum((most + above >> 23) - (2 if IS_FP4 else 8), 1 if IS_FP4 else 105)


@triton.jit
def code_of(bits, scale, IS_FP4: tl.constexpr):
    """The code, with its sign, of the number of these bits over its E8M0 scale; an infinite one has the largest.

    Code and float32 differ in the bias of exponents and in bits of the mantissa, all but 3 or 1 of which are rounded
    off, ties to even; below the code's least exponent, one more for each power of two.
    """
    kept: tl.constexpr = 1 if IS_FP4 else 3
    least: tl.constexpr = 127 if IS_FP4 else 121  # the exponent of the least normal number, as float32 has it
    size = bits & _ABS
    exponent = tl.maximum(size >> 23, 1)
    mantissa = (size & 0x7FFFFF) | tl.where(size >> 23 > 0, 0x800000, 0)
    above = exponent - scale + (127 - least)
    shift = tl.minimum(23 - kept + tl.maximum(-above, 0), 25)  # by 25 all round to zero
    half = (1 << (shift - 1)) - 1 + (mantissa >> shift & 1)
    code = (mantissa + half >> shift) + (tl.maximum(above, 0) << kept)
    if IS_FP4:  # has no NaN: 0, and the scale says so
        code = tl.where(size >= _INF, tl.where(size > _INF, 0, 7), code)
    else:
        code = tl.where(size >= _INF, tl.where(size > _INF, 127, 126), code)
    return code | tl.where(bits < 0, 8 if IS_FP4 else 128, 0)


@triton.jit
def value_of(code, IS_FP4: tl.constexpr):
    """The value of a code with its sign, float32."""
    kept: tl.constexpr = 1 if IS_FP4 else 3
    least: tl.constexpr = 127 if IS_FP4 else 121
    unit: tl.constexpr = 0.5 if IS_FP4 else 0.001953125  # of what is not normal
    size = code & (7 if IS_FP4 else 127)
    small = (size.to(tl.float32) * unit).to(tl.int32, bitcast=True)
    value = tl.where(size < (1 << kept), small, (size << (23 - kept)) + (least - 1 << 23))
    if not IS_FP4:
        value = tl.where(size == 127, _NAN, value)
    return number_of(value | (code & (8 if IS_FP4 else 128)) << (28 if IS_FP4 else 24))


@triton.jit
def factor_of(scale):
    """The number of an E8M0 scale, float32: the least is subnormal, and 255 no number."""
    bits = tl.where(scale == 0, 0x400000, scale << 23)
    return number_of(tl.where(scale == 255, _NAN, bits))


@triton.jit
def group_scales(bits, IS_FP4: tl.constexpr):
    """The scales of groups [G, WIDTH], [G]: of those with a NaN, 255 in E2M1, to be stored; and one to divide by."""
    scale = scale_of(tl.max(size_of(bits), axis=1), IS_FP4)
    stored = scale
    if IS_FP4:
        stored = tl.where(tl.max(bits & _ABS, axis=1) > _INF, 255, scale)
    return scale, stored
