"""Numbers as their bits: float32 and bfloat16, and codes of E4M3, E2M1 and E8M0, in the registers of a kernel.

Arithmetic of float32 and integers, so that nothing hangs on a device's own 8-bit casts. bfloat16 goes in and out as the
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
_E4M3 = tl.constexpr(0x87F00000 - (1 << 32))  # sign, the exponent's four lower bits, the mantissa's three upper ones


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
def scale_of(most, IS_FP4: tl.constexpr, IS_KEY: tl.constexpr = False):
    """The E8M0 scale of a group by the bits of its largest size: exponents less, and one more if the mantissa is above.

    The code's largest is 1.75 x 2^8, or 1.5 x 2^2; its floor has the scale 2^-22, or 2^-126 in FP4 and in keys. An
    infinite size has the exponent to which the largest float32 carries.
    """
    above: tl.constexpr = 0x3FFFFF if IS_FP4 else 0x1FFFFF  # what carries into the exponent from such a mantissa up
    return tl.maximum((most + above >> 23) - (2 if IS_FP4 else 8), 1 if IS_FP4 or IS_KEY else 105)


@triton.jit
def code_of(bits, scale, IS_FP4: tl.constexpr):
    """The code, with its sign, of the number of these bits over its E8M0 scale: exact, for it is a power of two."""
    return nearest_code(number_of(bits) * factor_of(254 - scale), bits, IS_FP4)


@triton.jit
def nearest_code(y, bits, IS_FP4: tl.constexpr):
    """The code of y float32, rounded to nearest, ties to even; of an infinite one, the largest. The sign is in bits.

    Steps and code number alike: a step is the last digit of the code, and its exponent goes on where the mantissa ends.
    """
    size, step = _size_and_step(y, IS_FP4)
    dropped: tl.constexpr = 22 if IS_FP4 else 20
    least: tl.constexpr = 298 if IS_FP4 else 1128  # of the first step's exponent, where the code has it
    step_bits = step.to(tl.int32, bitcast=True)
    code = (size + step).to(tl.int32, bitcast=True) - step_bits + (step_bits >> dropped) - least
    if IS_FP4:
        return code | (bits >> 28) & 8
    else:
        return tl.where(y != y, 127, code) | (bits >> 24) & 128


@triton.jit
def nearest_value(bits, scale, IS_FP4: tl.constexpr):
    """What ``value_of`` makes of ``code_of``, without the code: the number over its scale, rounded."""
    y = number_of(bits) * factor_of(254 - scale)
    size, step = _size_and_step(y, IS_FP4)
    value = size + step - step
    if not IS_FP4:  # a group of E2M1 with a NaN has it in its scale
        value = tl.where(y != y, float("nan"), value)
    return number_of(value.to(tl.int32, bitcast=True) | bits & -2147483648)


@triton.jit
def _size_and_step(y, IS_FP4: tl.constexpr):
    """The size of y float32, at most the code's largest, and 2^23 times the distance of codes there.

    To add the second rounds the first to the codes, ties to even, since it has no more digits; and the distance does
    not shrink below the least normal number. The size of what is no number is 0 in E2M1, and else whatever.
    """
    up: tl.constexpr = 22 if IS_FP4 else 20  # digits that the mantissa of the code has less
    least: tl.constexpr = 0x4A800000 if IS_FP4 else 0x46800000  # 2^22, or 2^14
    size = tl.abs(y)
    size = tl.minimum(tl.maximum(size, 0.0), 6.0) if IS_FP4 else tl.minimum(size, 448.0)
    exponent = size.to(tl.int32, bitcast=True) & 0x7F800000
    return size, number_of(tl.maximum(exponent + (up << 23), least))


@triton.jit
def value_of(code, IS_FP4: tl.constexpr):
    """The value of a code with its sign, float32.

    With the bits of a code where float32 has sign, exponent and mantissa, it is the value over the difference in bias,
    normal or not; in E4M3 only what would be 480 is no number.
    """
    if IS_FP4:
        return number_of(code << 22 & 7 << 22 | code << 28 & -2147483648) * (2.0**126)
    else:
        value = number_of((code << 24 >> 4) & _E4M3) * (2.0**120)
        return tl.where(tl.abs(value) == 480.0, float("nan"), value)


@triton.jit
def factor_of(scale):
    """The number of an E8M0 scale, float32: the least is subnormal, and 255 no number."""
    bits = tl.where(scale == 0, 0x400000, scale << 23)
    return number_of(tl.where(scale == 255, _NAN, bits))


@triton.jit
def group_scales(bits, IS_FP4: tl.constexpr, IS_KEY: tl.constexpr = False):
    """The scales of groups [G, WIDTH], [G]: one to divide by; and one to store, 255 for a NaN without a code."""
    scale = scale_of(most_of(bits, 1), IS_FP4, IS_KEY)
    stored = scale
    if IS_FP4 or IS_KEY:
        stored = tl.where(tl.max(bits & _ABS, axis=1) > _INF, 255, scale)
    return scale, stored


@triton.jit
def most_of(bits, axis: tl.constexpr):
    """The bits of the largest size along an axis; NaN is none."""
    most = tl.maximum(tl.max(tl.abs(number_of(bits)), axis=axis), 0.0)  # a maximum with NaN is the other
    return most.to(tl.int32, bitcast=True)
