"""The specification of low precision: one number at a time, by tables of what each code stands for.

Each function does all of a row's or block's numbers in Python, which computes in float64: exact for what is divided or
multiplied by a power of two.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Iterator
from itertools import product

import torch

from dsv4.ops.lowbit.packed import Packed
from dsv4.ops.lowbit.tables import BLOCK, E2M1, E4M3, FP4_GROUP, NAN_SCALE, Code

LARGEST_FLOAT = 2.0**128 - 2.0**104


def quantise_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_rows``."""
    return _encoded(x, group, E4M3)


def quantise_fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_fp4``; codes and scales."""
    codes, scales = _encoded(w, FP4_GROUP, E2M1)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def quantise_blocks(w: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_blocks``; codes and scales."""
    w = w.float()
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales = torch.empty(_block_counts(w.shape), dtype=scale_dtype, device=w.device)
    for at, block in _blocks(w.shape):
        values = [value for row in w[block].tolist() for value in row]
        if scale_dtype == torch.uint8:
            scales[at] = byte = scale_of(values, E4M3)
            scaled = [value / power(byte) for value in values]
        else:
            scales[at] = scale = _single(max(_single(E4M3.floor), *map(abs, values)) / E4M3.largest)
            scaled = [_single(value / scale) for value in values]
        codes[block] = torch.tensor([nearest(value, E4M3) for value in scaled]).to(codes).reshape(w[block].shape)
    return codes, scales


def dequantise(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.dequantise``."""
    if packed.kind == "fp4":
        return _decoded(_split_nibbles(packed.codes), packed.scales, FP4_GROUP, E2M1).to(dtype)
    w = torch.empty(packed.shape, dtype=torch.float64, device=packed.codes.device)
    for at, block in _blocks(packed.shape):
        stored = packed.scales[at].item()
        scale = stored if packed.scales.dtype == torch.float32 else power(int(stored))
        values = [[value_of(number, E4M3) * scale for number in row] for row in packed.codes[block].tolist()]
        w[block] = torch.tensor(values, dtype=torch.float64)
    return w.float().to(dtype)


def reblock(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.reblock``; codes, scales, and how many values each block lost, int64."""
    given = _split_nibbles(packed.codes)
    codes = torch.empty_like(given)
    scales = torch.empty(_block_counts(packed.shape), dtype=torch.uint8, device=given.device)
    lost = torch.zeros_like(scales, dtype=torch.int64)
    for at, block in _blocks(packed.shape):
        own = packed.scales.repeat_interleave(FP4_GROUP, dim=-1)[block].tolist()
        scales[at] = byte = max(max(map(max, own)) - 6, 0)
        for i, row in enumerate(given[block].tolist()):
            wanted = [value_of(c, E2M1) * 2.0 ** (s - byte) for c, s in zip(row, own[i], strict=True)]
            made = [nearest(value, E4M3) for value in wanted]
            codes[block][i] = torch.tensor(made).to(codes)
            lost[at] += sum(value_of(c, E4M3) != value for c, value in zip(made, wanted, strict=True))
    return codes, scales, lost


def round_rows(x: torch.Tensor, group: int, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_rows``."""
    rounded = x.clone()
    rounded[..., :channels] = _decoded(*_encoded(x[..., :channels], group, E4M3), group, E4M3)
    return rounded


def round_index(x: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_index``."""
    turned = hadamard(x.to(torch.promote_types(x.dtype, torch.float32))) * x.shape[-1] ** -0.5
    return round_fp4(turned.to(x.dtype), x.dtype)


def round_fp4(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_fp4``."""
    return _decoded(*_encoded(w, FP4_GROUP, E2M1), FP4_GROUP, E2M1).to(dtype)


def round_blocks(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_blocks``."""
    return dequantise(Packed(*quantise_blocks(w, torch.uint8), "fp8"), dtype)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The sums of ``dsv4.ops.hadamard``, in the order of H(2n) = [[H, H], [H, -H]]: so do all backends here."""
    if x.shape[-1] == 1:
        return x
    a, b = (hadamard(half) for half in x.chunk(2, dim=-1))
    return torch.cat([a + b, a - b], dim=-1)


# One row or one number, which the rows of the cache share


def encode(row: list[float], group: int, code: Code) -> tuple[list[int], list[int]]:
    """Return the codes of a row, signs included, and the E8M0 scales of its groups.

    A group with a NaN has the scale NaN where the code has none.
    """
    codes, scales = [], []
    for first in range(0, len(row), group):
        values = row[first : first + group]
        scale = scale_of(values, code)
        codes += [nearest(value / power(scale), code) for value in values]
        has_nan = any(math.isnan(value) for value in values)
        scales.append(NAN_SCALE if has_nan and not code.has_nan else scale)
    return codes, scales


def decode(codes: list[int], scales: list[int], group: int, code: Code) -> list[float]:
    """Return the values of a row of codes."""
    return [value_of(c, code) * power(scales[i // group]) for i, c in enumerate(codes)]


def scale_of(values: list[float], code: Code) -> int:
    """The E8M0 scale of a group. An infinite value is cut off like the largest."""
    most = max([code.floor, *(abs(value) for value in values if not math.isnan(value))])
    return math.ceil(math.log2(min(most, LARGEST_FLOAT) / code.largest)) + 127


def nearest(value: float, code: Code) -> int:
    """The code of the nearest value, the even one of two. NaN is E4M3's last code, and 0 in E2M1."""
    is_negative = math.copysign(1.0, value) < 0
    return _nearest_size(abs(value), code) % code.sign + code.sign * is_negative


def value_of(number: int, code: Code) -> float:
    """The value of a code, its sign included."""
    size = number % code.sign
    value = code.values[size] if size < len(code.values) else math.nan
    return -value if number >= code.sign else value


def power(scale: int) -> float:
    """The value of an E8M0 scale."""
    return math.nan if scale == NAN_SCALE else 2.0 ** (scale - 127)


def _nearest_size(size: float, code: Code) -> int:
    if math.isnan(size):
        return len(code.values)
    size = min(size, code.largest)
    above = bisect_left(code.values, size)
    return min(max(above - 1, 0), above, key=lambda number: (abs(code.values[number] - size), number % 2))


def _single(x: float) -> float:
    """x rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


# Tensors


def _encoded(x: torch.Tensor, group: int, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [encode(row, group, code) for row in x.float().reshape(-1, x.shape[-1]).tolist()]
    widths = x.shape[-1], -(-x.shape[-1] // group)
    codes, scales = (
        torch.tensor([row[i] for row in rows], dtype=torch.uint8, device=x.device).reshape(*x.shape[:-1], widths[i])
        for i in (0, 1)
    )
    return codes, scales


def _decoded(codes: torch.Tensor, scales: torch.Tensor, group: int, code: Code) -> torch.Tensor:
    rows = zip(*(one.reshape(-1, one.shape[-1]).tolist() for one in (codes, scales)), strict=True)
    values = [decode(numbers, own, group, code) for numbers, own in rows]
    return torch.tensor(values, dtype=torch.float64, device=codes.device).float().reshape(codes.shape)


def _split_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    return torch.stack([nibbles % 16, nibbles // 16], dim=-1).flatten(-2)


def _block_counts(shape: torch.Size) -> tuple[int, ...]:
    *stack, rows, columns = shape
    return *stack, -(-rows // BLOCK), -(-columns // BLOCK)


def _blocks(shape: torch.Size) -> Iterator[tuple[tuple[int, ...], tuple[int | slice, ...]]]:
    """Each block's place in the scales, and its part of the matrix."""
    for at in product(*map(range, _block_counts(shape))):
        down, right = (slice(i * BLOCK, (i + 1) * BLOCK) for i in at[-2:])
        yield at, (*at[:-2], down, right)
