"""The routed experts of a layer at the sizes of Flash and Pro: in bfloat16 with gradients and without, and in codes.

With few tokens all of the weights are read for little else; with many, products are what takes the time. In codes the
shared expert is there too, in FP8, as a layer is served.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import BANDWIDTH, EXPERTS, Case
from dsv4.device import best
from dsv4.ops.backend import Backend
from dsv4.ops.experts import experts, experts_with_shared, swiglu
from dsv4.ops.experts.store import Matrices
from dsv4.ops.lowbit import BLOCK, FP4_GROUP, Kind, Packed

MODELS = {"flash": (256, 4096, 2048), "pro": (384, 7168, 3072)}  # experts, width, and width of an expert
TOKENS = (64, 4096, 16384)
CHOICES, LIMIT = 6, 10.0
BALANCE = 165  # operations a byte of an H200: 790 TFLOP/s of bfloat16 over 4.8 TB/s
BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp4": 0.5 + 1 / FP4_GROUP}  # of a weight


def cases() -> list[Case]:
    """Each model, number of tokens and form of the weights; gradients in bfloat16; and the SwiGLU by itself."""
    found = []
    for model in MODELS:
        for tokens in TOKENS:
            found += [_case(model, tokens, form) for form in BYTES]
            found += [_case(model, tokens, "bfloat16", backward=True)] if tokens > TOKENS[0] else []
        found += [_swiglu(model, backward) for backward in (False, True)]
    return found


def _case(model: str, tokens: int, form: str, *, backward: bool = False) -> Case:
    E, D, F = MODELS[model]
    slots = tokens * CHOICES
    matrix = 3 * D * F
    used = E * (1 - (1 - CHOICES / E) ** tokens)  # experts that some token chose, on average
    is_coded = form != "bfloat16"
    # A product and a sum for each number of the matrices and slot; coming back, as many for inputs and for weights.
    flops = 2 * matrix * (slots + (tokens if is_coded else 0)) * (3 if backward else 1)
    weights = matrix * (used * BYTES[form] + (1 if is_coded else 0))
    # Tokens in and out; coming back also the gradient in and out, weights once more, and what is written of theirs.
    num_bytes = int(weights * (2 if backward else 1) + (matrix * E * 2 if backward else 0)) + 6 * tokens * D * (
        2 if backward else 1
    )

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        return lambda: _make(model, tokens, form, backward, backend)

    return Case(
        kernel=f"experts.{form}" + (".backward" if backward else ""),
        shape=f"{model} {tokens} tokens",
        make=maker("unproved"),
        num_bytes=num_bytes,
        flops=flops,
        twins={"portable": maker("portable")},
        mark=EXPERTS if tokens >= 4096 else None,
    )


def _make(model: str, tokens: int, form: str, backward: bool, backend: Backend) -> Callable[[], object]:
    E, D, F = MODELS[model]
    x = torch.randn(tokens, D, dtype=torch.bfloat16, device=best())
    chosen = torch.rand(tokens, E, device=best()).argsort(dim=-1)[:, :CHOICES].contiguous()
    weights = torch.rand(tokens, CHOICES, device=best())
    if form != "bfloat16":
        routed = Matrices.of_codes(*(_codes(form, E, *size) for size in ((F, D), (D, F), (F, D))))
        shared = Matrices.of_codes(*(_codes("fp8", *size) for size in ((F, D), (D, F), (F, D))))
        return lambda: experts_with_shared(x, chosen, weights, routed, shared, LIMIT, backend=backend)
    parts = [
        torch.randn(E, *size, dtype=torch.bfloat16, device=best()).mul_(size[1] ** -0.5)
        for size in ((F, D), (D, F), (F, D))
    ]
    leaves = [tensor.requires_grad_(backward) for tensor in (x, weights, *parts)]
    grad = torch.randn(tokens, D, device=best())

    def run() -> object:
        out = experts(x, chosen, weights, Matrices(tuple(parts)), LIMIT, backend=backend)
        return torch.autograd.grad(out, leaves, grad) if backward else out

    return run


def _codes(form: str, *shape: int) -> Packed:
    """Random codes, none of which is NaN, with scales that keep sums small."""
    kind: Kind = "fp4" if form == "fp4" else "fp8"
    *stack, rows, columns = shape
    if kind == "fp4":
        codes = torch.randint(256, (*stack, rows, columns // 2), dtype=torch.uint8, device=best())
        scales = torch.full((*stack, rows, columns // FP4_GROUP), 119, dtype=torch.uint8, device=best())
    else:
        codes = torch.randint(120, shape, dtype=torch.uint8, device=best())
        scales = torch.full((*stack, rows // BLOCK, columns // BLOCK), 112, dtype=torch.uint8, device=best())
    return Packed(codes, scales, kind)


def _swiglu(model: str, backward: bool) -> Case:
    F, tokens = MODELS[model][2], TOKENS[1]

    def maker(backend: Backend) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            shape = tokens, F
            gate, up, grad = (torch.randn(shape, dtype=torch.bfloat16, device=best()) for _ in range(3))
            leaves = [tensor.requires_grad_(backward) for tensor in (gate, up)]

            def run() -> object:
                out = swiglu(gate, up, LIMIT, backend=backend)
                return torch.autograd.grad(out, leaves, grad) if backward else out

            return run

        return make

    return Case(
        kernel="experts.swiglu" + (".backward" if backward else ""),
        shape=f"{model} {tokens} tokens",
        make=maker("unproved"),
        num_bytes=tokens * F * 2 * (8 if backward else 3),
        twins={"portable": maker("portable")},
        mark=BANDWIDTH,
    )
