"""Low precision on the CPU, each operation one C kernel (``native/lowbit.c``).

Activations are read once and written once: a decoding step rounds one token before every linear map. ``portable``
serves other dtypes and devices.
"""

from __future__ import annotations

import torch

from dsv4 import native
from dsv4.ops.lowbit import portable
from dsv4.ops.lowbit.packed import Packed
from dsv4.ops.lowbit.tables import BLOCK, FP4_GROUP

DTYPES = (torch.float32, torch.bfloat16)
FP8, FP4, FP8_FLOAT = 2, 3, 4  # kinds of codes in ``native/packed.h``; 0 is float32 and 1 bfloat16
FEW = 1 << 15  # numbers that are not worth splitting over threads


def kind_of(packed: Packed) -> int:
    """Return the number by which kernels know a kind of codes."""
    if packed.kind == "fp4":
        return FP4
    return FP8 if packed.scales.dtype == torch.uint8 else FP8_FLOAT


def quantise_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_rows``."""
    if not native.serves(x):
        return portable.quantise_rows(x, group)
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    scales = torch.empty(*x.shape[:-1], -(-x.shape[-1] // group), dtype=torch.uint8)
    native.call("dsv4_quantise_rows", *_rows(x), group, native.is_bfloat16(x), _threads(x), x, codes, scales)
    return codes, scales


def round_rows(x: torch.Tensor, group: int, channels: int) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_rows``."""
    if not native.serves(x):
        return portable.round_rows(x, group, channels)
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    native.call("dsv4_round_rows", *_rows(x), channels, group, native.is_bfloat16(x), _threads(x), x, y)
    return y


def round_index(x: torch.Tensor) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_index``."""
    if not native.serves(x):
        return portable.round_index(x)
    x, y, factor = x.contiguous(), torch.empty(x.shape, dtype=x.dtype), x.shape[-1] ** -0.5
    native.call("dsv4_round_index", *_rows(x), native.is_bfloat16(x), _threads(x), factor, x, y)
    return y


def quantise_fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_fp4``; codes and scales."""
    if not native.serves(w):
        return portable.quantise_fp4(w)
    w = w.contiguous()
    *rows, columns = w.shape
    nibbles, scales = (torch.empty(*rows, columns // share, dtype=torch.uint8) for share in (2, FP4_GROUP))
    native.call("dsv4_quantise_fp4", *_rows(w), native.is_bfloat16(w), _threads(w), w, nibbles, scales)
    return nibbles, scales


def quantise_blocks(w: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dsv4.ops.lowbit.quantise_blocks``; codes and scales."""
    if not native.serves(w):
        return portable.quantise_blocks(w, scale_dtype)
    w = w.contiguous()
    *stack, rows, columns = w.shape
    codes = torch.empty(w.shape, dtype=torch.uint8)
    scales = torch.empty(*stack, -(-rows // BLOCK), -(-columns // BLOCK), dtype=scale_dtype)
    flags = native.is_bfloat16(w), int(scale_dtype == torch.float32)
    native.call("dsv4_quantise_blocks", *_matrices(w), *flags, _threads(w), w, codes, scales)
    return codes, scales


def dequantise(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.dequantise``."""
    if packed.codes.device.type != "cpu" or dtype not in DTYPES:
        return portable.dequantise(packed, dtype)
    w, codes, scales = torch.empty(packed.shape, dtype=dtype), packed.codes.contiguous(), packed.scales.contiguous()
    if packed.kind == "fp4":
        native.call("dsv4_dequantise_fp4", *_rows(w), native.is_bfloat16(w), _threads(w), codes, scales, w)
    else:
        flags = int(scales.dtype == torch.float32), native.is_bfloat16(w)
        native.call("dsv4_dequantise_blocks", *_matrices(w), *flags, _threads(w), codes, scales, w)
    return w


def round_fp4(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_fp4``."""
    if not native.serves(w) or dtype not in DTYPES:
        return portable.round_fp4(w, dtype)
    w, y = w.contiguous(), torch.empty(w.shape, dtype=dtype)
    native.call("dsv4_round_fp4", *_rows(w), native.is_bfloat16(w), native.is_bfloat16(y), _threads(w), w, y)
    return y


def round_blocks(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``dsv4.ops.lowbit.round_blocks``."""
    if not native.serves(w) or dtype not in DTYPES:
        return portable.round_blocks(w, dtype)
    w, y = w.contiguous(), torch.empty(w.shape, dtype=dtype)
    native.call("dsv4_round_blocks", *_matrices(w), native.is_bfloat16(w), native.is_bfloat16(y), _threads(w), w, y)
    return y


def _threads(x: torch.Tensor) -> int:
    return torch.get_num_threads() if x.numel() > FEW else 1


def _rows(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _matrices(w: torch.Tensor) -> tuple[int, int, int]:
    return w.shape[:-2].numel(), w.shape[-2], w.shape[-1]
