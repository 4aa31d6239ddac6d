"""Hyper-connections at the sizes of the released models, judged by the bytes of the streams.

The least that must move: reading sees the streams once and writes x; writing sees streams and y and writes streams.
Writing and reading at once sees what it wrote once more, to sum it up by weights that it knows only then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import BANDWIDTH, Case, compiled
from dsv4.device import best
from dsv4.ops import mhc
from dsv4.ops.backend import Backend

TOKENS, N, ITERATIONS = 4096, 4, 20
EPSILONS = {"norm_eps": 1e-6, "eps": 1e-6}
WIDTHS = {"flash": 4096, "pro": 7168}
ROWS = N * (2 + N)


def cases() -> list[Case]:
    """Reading, writing and the head forward; of a sub-layer and of a layer reading and writing forward and backward."""
    found = []
    for name, D in WIDTHS.items():
        for tokens in (TOKENS, 1):
            found += _of_shape(f"{name} {tokens} tokens", D, tokens)
    return found


def _of_shape(shape: str, D: int, tokens: int) -> list[Case]:
    of_streams, of_x = tokens * N * D * 2, tokens * D * 2
    of_fn, products = ROWS * N * D * 4, 2 * tokens * N * D * ROWS
    cases = [
        _case("mhc.pre", shape, _read, D, tokens, of_streams + of_x + of_fn, products),
        _case("mhc.post", shape, _write, D, tokens, 2 * of_streams + of_x, 2 * tokens * N * (N + 1) * D),
        _case("mhc.write_read", shape, _write_read, D, tokens, 3 * of_streams + 2 * of_x + of_fn, products),
        _case("mhc.head", shape, _head, D, tokens, of_streams + of_x + of_fn // (2 + N), products // (2 + N)),
    ]
    if tokens == TOKENS:
        # Forward as above; backward of writing: streams, their gradient and y in, gradients of both out; of reading:
        # streams, what the streams' own gradient is so far and x's in, the gradient out.
        num_bytes = 3 * of_streams + 2 * of_x + 3 * of_streams + 2 * of_x + 3 * of_streams + of_x + 3 * of_fn
        cases.append(_case("mhc sub-layer and backward", shape, _sublayer, D, tokens, num_bytes, 3 * products))
        # Both sub-layers of a layer, where the streams in between are written, read twice, and once more formed.
        num_bytes = 6 * of_streams + 4 * of_x + 14 * of_streams + 7 * of_x + 6 * of_fn
        cases.append(_case("mhc layer and backward", shape, _layer, D, tokens, num_bytes, 6 * products))
    return cases


def _case(
    kernel: str,
    shape: str,
    make: Callable[[Backend, int, int], Callable[[], object]],
    D: int,
    tokens: int,
    num_bytes: int,
    flops: int,
) -> Case:
    return Case(
        kernel=kernel,
        shape=shape,
        make=lambda: make("unproved", D, tokens),
        num_bytes=num_bytes,
        flops=flops,
        twins={
            "portable": lambda: make("portable", D, tokens),
            "compiled": compiled(lambda: make("reference", D, tokens)),
        },
        mark=BANDWIDTH if tokens == TOKENS else None,
    )


def _given(D: int, tokens: int, rows: int, scales: int) -> tuple[torch.Tensor, mhc.Mix, torch.Tensor]:
    device = best()
    streams = torch.randn(1, tokens, N, D, device=device, dtype=torch.bfloat16)
    fn = torch.randn(rows, N * D, device=device) / (N * D) ** 0.5
    mix = mhc.Mix(fn, torch.randn(rows, device=device), torch.ones(scales, device=device))
    return streams, mix, torch.ones(D, device=device)


def _read(backend: Backend, D: int, tokens: int) -> Callable[[], object]:
    streams, mix, weight = _given(D, tokens, ROWS, 3)
    return lambda: mhc.pre(streams, mix, weight, **EPSILONS, iterations=ITERATIONS, backend=backend)


def _write(backend: Backend, D: int, tokens: int) -> Callable[[], object]:
    streams, mix, weight = _given(D, tokens, ROWS, 3)
    reading = mhc.pre(streams, mix, weight, **EPSILONS, iterations=ITERATIONS, backend="portable")
    return lambda: mhc.post(reading, reading.x, backend=backend)


def _write_read(backend: Backend, D: int, tokens: int) -> Callable[[], object]:
    streams, mix, weight = _given(D, tokens, ROWS, 3)
    how = {**EPSILONS, "iterations": ITERATIONS}
    reading = mhc.pre(streams, mix, weight, **how, backend="portable")
    return lambda: mhc.write_read(reading, reading.x, mix, weight, **how, backend=backend)


def _head(backend: Backend, D: int, tokens: int) -> Callable[[], object]:
    streams, mix, weight = _given(D, tokens, N, 1)
    return lambda: mhc.head(streams, mix, weight, **EPSILONS, backend=backend)


def _sublayer(backend: Backend, D: int, tokens: int) -> Callable[[], object]:
    streams, mix, weight = _given(D, tokens, ROWS, 3)
    leaves = [x.requires_grad_() for x in (streams, *mix, weight)]
    grad = torch.randn_like(streams)

    def run() -> object:
        reading = mhc.pre(streams, mix, weight, **EPSILONS, iterations=ITERATIONS, backend=backend)
        return torch.autograd.grad(mhc.post(reading, reading.x, backend=backend), leaves, grad)

    return run


def _layer(backend: Backend, D: int, tokens: int) -> Callable[[], object]:
    streams, mix, weight = _given(D, tokens, ROWS, 3)
    leaves = [x.requires_grad_() for x in (streams, *mix, weight)]
    grad = torch.randn_like(streams)
    how = {**EPSILONS, "iterations": ITERATIONS}

    def run() -> object:
        first = mhc.pre(streams, mix, weight, **how, backend=backend)
        second = mhc.write_read(first, first.x, mix, weight, **how, backend=backend)
        return torch.autograd.grad(mhc.post(second, second.x, backend=backend), leaves, grad)

    return run
