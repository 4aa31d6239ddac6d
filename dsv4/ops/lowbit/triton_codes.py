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
def cast_exact(y, dtype: tl.constexpr):
    """The same where nothing is to be rounded: of values of codes, which have few digits."""
    if dtype == tl.int16:
        return (y.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    else:
        return y.to(dtype)


@triton.jit
def size_of(bits):
    """The bits of the size of a number for the scale of its group: 0 of NaN."""
    size = bits & _ABS
    return tl.where(size > _INF, 0, size)


@triton.jit
def scale_of(most, IS_FP4: tl.constexpr):
    """The E8M0 scale of a group by the bits of its largest size: exponents less, and one more if the mantissa is above.

    The code's largest is 1.75 x 2^8, or 1.5 x 2^2; its floor has the scale 2^-22, or 2^-126.
    """
    above: tl.constexpr = 0x3FFFFF if IS_FP4 else 0x1FFFFF  # what carries into the exponent from such a mantissa up
    most = tl.minimum(most, _MOST)  # of an infinite one
    return tl.maximum((most + above >> 23) - (2 if IS_FP4 else 8), 1 if IS_FP4 else 105)


@triton.jit
def code_of(bits, scale, IS_FP4: tl.constexpr):
    """The code, with its sign, of the number of these bits over its E8M0 scale: exact, for it is a power of two."""
    return nearest_code(number_of(bits) * factor_of(254 - scale), IS_FP4) | sign_of(bits, IS_FP4)


@triton.jit
def nearest_code(y, IS_FP4: tl.constexpr):
    """The code of the size of y float32, rounded to nearest, ties to even; of an infinite one, the largest.

    Code and float32 differ in the bias of exponents and in bits of the mantissa, all but 3 or 1 of which are rounded
    off. What is smaller than the code's least normal number rounds when it is added to a number whose last bit is worth
    the code's last.
    """
    dropped: tl.constexpr = 22 if IS_FP4 else 20
    bias: tl.constexpr = 252 if IS_FP4 else 960  # of exponents, where the code has them
    least: tl.constexpr = 0x3F800000 if IS_FP4 else 0x3C800000  # 1, or 2^-6
    size = y.to(tl.int32, bitcast=True) & _ABS
    rounded = (size + ((1 << (dropped - 1)) - 1) + (size >> dropped & 1) >> dropped) - bias
    large: tl.constexpr = 4194304.0 if IS_FP4 else 16384.0  # 2^22, or 2^14
    small = (number_of(size) + large).to(tl.int32, bitcast=True) & 15
    code = tl.where(size < least, small, rounded)
    if IS_FP4:  # has no NaN: 0, and the scale says so
        return tl.where(size >= _INF, tl.where(size > _INF, 0, 7), code)
    else:
        return tl.where(size >= _INF, tl.where(size > _INF, 127, 126), code)


@triton.jit
def nearest_value(bits, scale, IS_FP4: tl.constexpr):
    """What ``value_of`` makes of ``code_of``, without the code: the number over its scale, rounded."""
    dropped: tl.constexpr = 22 if IS_FP4 else 20
    least: tl.constexpr = 0x3F800000 if IS_FP4 else 0x3C800000
    large: tl.constexpr = 4194304.0 if IS_FP4 else 16384.0
    size = (number_of(bits) * factor_of(254 - scale)).to(tl.int32, bitcast=True) & _ABS
    rounded = size + ((1 << (dropped - 1)) - 1) + (size >> dropped & 1) >> dropped << dropped
    small = number_of(size) + large - large
    value = tl.minimum(tl.where(size < least, small, number_of(rounded)), 6.0 if IS_FP4 else 448.0)
    if not IS_FP4:  # a group of E2M1 with a NaN has it in its scale
        value = tl.where(size > _INF, float("nan"), value)
    return number_of(value.to(tl.int32, bitcast=True) | bits & -2147483648)


@triton.jit
def sign_of(bits, IS_FP4: tl.constexpr):
    """The sign of a number of these bits, where a code has it."""
    return tl.where(bits < 0, 8 if IS_FP4 else 128, 0)


@triton.jit
def value_of(code, IS_FP4: tl.constexpr):
    """The value of a code with its sign, float32: its bits as those of a float32, which has another bias."""
    size = code & (7 if IS_FP4 else 127)
    value = number_of(size << (22 if IS_FP4 else 20)) * (2.0**126 if IS_FP4 else 2.0**120)
    bits = value.to(tl.int32, bitcast=True)
    if not IS_FP4:
        bits = tl.where(size == 127, _NAN, bits)
    return number_of(bits | (code & (8 if IS_FP4 else 128)) << (28 if IS_FP4 else 24))


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
