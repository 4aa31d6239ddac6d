"""Low precision on a GPU: what every product rounds first, what training rounds of its weights, and reading codes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.case import BANDWIDTH, Case
from dsv4.device import best
from dsv4.ops.hadamard import portable as hadamard_portable
from dsv4.ops.hadamard import triton as hadamard
from dsv4.ops.lowbit import Packed, portable, triton

HIDDEN = {"flash": 4096, "pro": 7168}
EXPERT = {"flash": (2048, 4096), "pro": (3072, 7168)}  # one matrix of an expert
TOKENS = (64, 4096)
INDEX_ROWS = 64  # heads of the indexer, a query each
INDEX_DIM = 128


def cases() -> list[Case]:
    """Rows of activations, queries of the indexer, and weights in both codes, of Flash and Pro."""
    return [*_activations(), *_index_rows(), *_weights()]


def _activations() -> list[Case]:
    made = []
    for size, width in HIDDEN.items():
        for tokens in TOKENS:
            shape, numbers, given = f"{size} {tokens} tokens", tokens * width, [(tokens, width)]
            made.append(_case("lowbit.round_rows", shape, given, 4 * numbers, _round_rows))
            made.append(_case("lowbit.quantise_rows", shape, given, 3 * numbers + numbers // 128, _quantise_rows))
    return made


def _round_rows(ops, x: torch.Tensor) -> object:
    return ops.round_rows(x, 128, x.shape[-1])


def _quantise_rows(ops, x: torch.Tensor) -> object:
    return ops.quantise_rows(x, 128)


def _index_rows() -> list[Case]:
    made = []
    for tokens in TOKENS:
        given, num_bytes = [(tokens, INDEX_ROWS, INDEX_DIM)], 4 * tokens * INDEX_ROWS * INDEX_DIM
        shape = f"flash and pro {tokens} tokens"
        flops = num_bytes // 4 * 8  # seven sums a number, and the factor
        made.append(_case("lowbit.round_index", shape, given, num_bytes, lambda ops, x: ops.round_index(x), flops))
        made.append(
            Case(
                kernel="hadamard.hadamard",
                shape=shape,
                num_bytes=num_bytes,
                flops=flops,
                mark=BANDWIDTH,
                make=_maker(lambda x: hadamard.hadamard(x), given),
                twins={"portable": _maker(lambda x: hadamard_portable.hadamard(x), given)},
            )
        )
    return made


def _weights() -> list[Case]:
    made = []
    for size, (rows, columns) in EXPERT.items():
        given, numbers = [(16, rows, columns)], 16 * rows * columns
        shape = f"{size} 16 matrices of {rows} x {columns}"
        nibbles = numbers // 2 + numbers // 32
        made += [
            _case("lowbit.round_fp4", shape, given, 4 * numbers, lambda ops, w: ops.round_fp4(w, torch.bfloat16)),
            _case("lowbit.round_blocks", shape, given, 4 * numbers, lambda ops, w: ops.round_blocks(w, torch.bfloat16)),
            _case("lowbit.quantise_fp4", shape, given, 2 * numbers + nibbles, lambda ops, w: ops.quantise_fp4(w)),
            _case(
                "lowbit.quantise_blocks", shape, given, 3 * numbers, lambda ops, w: ops.quantise_blocks(w, torch.uint8)
            ),
            _reading("fp4", shape, given, nibbles + 2 * numbers),
            _reading("fp8", shape, given, 3 * numbers),
        ]
    return made


def _case(kernel: str, shape: str, given, num_bytes: int, run: Callable, flops: int = 0) -> Case:
    """A case whose twin is ``portable``, called alike with what ``given`` has the shapes of."""
    return Case(
        kernel=kernel, shape=shape, num_bytes=num_bytes, flops=flops, mark=BANDWIDTH,
        make=_maker(lambda *tensors: run(triton, *tensors), given),
        twins={"portable": _maker(lambda *tensors: run(portable, *tensors), given)},
    )  # fmt: skip


def _maker(run: Callable, shapes) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        tensors = [torch.randn(shape, dtype=torch.bfloat16, device=best()) for shape in shapes]
        return lambda: run(*tensors)

    return make


def _reading(kind, shape: str, given, num_bytes: int) -> Case:
    """Packed weights to bfloat16."""

    def maker(ops) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            w = torch.randn(given[0], dtype=torch.bfloat16, device=best())
            made = triton.quantise_fp4(w) if kind == "fp4" else triton.quantise_blocks(w, torch.uint8)
            packed = Packed(*made, kind)
            return lambda: ops.dequantise(packed, torch.bfloat16)

        return make

    return Case(
        kernel="lowbit.dequantise", shape=f"{shape}, {kind}", num_bytes=num_bytes, mark=BANDWIDTH,
        make=maker(triton), twins={"portable": maker(portable)},
    )  # fmt: skip
