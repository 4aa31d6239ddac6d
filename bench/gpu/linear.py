"""Linear maps on a GPU: of codes, at the sizes that Flash and Pro serve, and wide ones: router, compressor, head."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.linear import linear
from dsv4.ops.lowbit import BLOCK, FP4_GROUP, Kind, Packed

TOKENS = (64, 4096, 16384)
BALANCE = 165  # operations a byte of an H200: 790 TFLOP/s of bfloat16 over 4.8 TB/s
# Outputs and inputs.
CODED = {
    "flash wq_a": (1024, 4096),
    "flash wq_b": (32768, 1024),
    "flash wo_b": (4096, 8192),
    "flash shared w1": (2048, 4096),
    "pro wq_a": (1536, 7168),
    "pro wq_b": (65536, 1536),
    "pro wo_b": (7168, 16384),
    "pro shared w1": (3072, 7168),
}
FP4 = {"flash expert w1": (2048, 4096), "pro expert w1": (3072, 7168)}
WIDE = {"flash router": (256, 4096), "flash compressor": (1024, 4096), "pro router": (384, 7168)}
HEAD = {"flash head": (129280, 4096), "pro head": (129280, 7168)}  # of the tokens that are sampled
BYTES = {"fp8": 1.0, "fp4": 0.5 + 1 / FP4_GROUP, "bfloat16": 2.0, "float32": 4.0}  # of a weight


def cases() -> list[Case]:
    """FP8 by E8M0 scales, as released, and by float32 ones, as in the Base files; FP4; wide, served and trained."""
    found = [_case(name, size, tokens, "fp8") for name, size in CODED.items() for tokens in TOKENS]
    found += [_case(f"{name}, float32 scales", CODED[name], TOKENS[0], "fp8") for name in ("flash wo_b", "pro wo_b")]
    found += [_case(name, size, tokens, "fp4") for name, size in FP4.items() for tokens in TOKENS]
    found += [_case(name, size, tokens, "bfloat16") for name, size in WIDE.items() for tokens in TOKENS]
    found += [_case(name, size, TOKENS[1], "float32") for name, size in WIDE.items()]
    return found + [_case(name, size, TOKENS[0], "bfloat16") for name, size in HEAD.items()]


def _case(name: str, size: tuple[int, int], tokens: int, form: str) -> Case:
    (N, K), is_wide = size, form in ("bfloat16", "float32")
    flops = 2 * tokens * N * K
    num_bytes = int(N * K * BYTES[form]) + 2 * tokens * K + (4 if is_wide else 2) * tokens * N

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(name, size, tokens, form, backend)

    return Case(
        kernel=f"linear.wide, {form}" if is_wide else f"linear.{form}",
        shape=f"{name} {tokens} tokens",
        make=maker("unproved"),
        num_bytes=num_bytes,
        flops=flops,
        twins={"portable": maker("portable")},
        mark=0.5,
    )


def _make(name: str, size: tuple[int, int], tokens: int, form: str, backend: Backend) -> Callable[[], object]:
    N, K = size
    x = torch.randn(tokens, K, dtype=torch.bfloat16, device=best())
    if form in ("bfloat16", "float32"):
        plain = torch.randn(N, K, dtype=getattr(torch, form), device=best())
        return lambda: linear(x, plain, wide=True, backend=backend)
    kind: Kind = "fp4" if form == "fp4" else "fp8"
    if kind == "fp4":
        codes = torch.randint(256, (N, K // 2), dtype=torch.uint8, device=best())
        scales = torch.full((N, K // FP4_GROUP), 119, dtype=torch.uint8, device=best())
    else:
        codes = torch.randint(120, (N, K), dtype=torch.uint8, device=best())  # none of them NaN
        scales = torch.full((N // BLOCK, K // BLOCK), 112, dtype=torch.uint8, device=best())
        scales = torch.full_like(scales, 2.0**-15, dtype=torch.float32) if "float32" in name else scales
    packed = Packed(codes, scales, kind)
    return lambda: linear(x, packed, backend=backend)
