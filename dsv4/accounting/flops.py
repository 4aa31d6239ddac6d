"""FLOPs per token of DeepSeek-V4: decoding, processing a prompt, training.

Counted: matrix products, 2 FLOPs a multiply-add, each with the precision of its operands (``cost``).
Not counted: norms, rotations, softmaxes, the pooling inside compressors, Hadamard transforms, the Sinkhorn
iterations, the choice of the top k, conversions between formats. Each is linear in an activation.

Conventions, one per line:
- A matrix stored in FP4 or FP8 multiplies FP8 activations: fp8. One exception: the released code widens ``wo_a``
  to BF16 before it multiplies, so it counts as bf16.
- Everything stored in BF16 or F32 (head, router, compressors, hyper-connections): bf16.
- Core attention, H heads of K channels: 2 H K per attended key for the score and 2 H K for the value, bf16.
- Indexer, I heads of J channels: 2 I J per scored entry in the precision of its keys, which is FP4 after
  post-training (storage fp4), FP8 before it (storage fp8), BF16 in models trained here; and 2 I per scored
  entry to add the heads up, bf16.
- A layer's streams: N x D for the input mix, N x D + N x N x D for the output mix, bf16.
- A query at token n (counted from 1) sees min(n, W) window entries, floor(n / 128) HCA entries, and the
  min(P, floor(n / 4)) CSA entries the indexer picks among floor(n / 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dsv4.accounting.cost import Cost, CostKind, Precision
from dsv4.accounting.parameters import activated_share
from dsv4.accounting.tensors import Kind, TensorSpec, inventory
from dsv4.config.model import RATIO, LayerKind, ModelConfig, Storage

COST_KIND: dict[Kind, CostKind] = {
    "attention": "projections",
    "compressor": "compressor",
    "indexer": "indexer",
    "routed_experts": "experts",
    "shared_experts": "shared",
    "router": "router",
    "hyper_connections": "hyper_connections",
    "head": "head",
    "mtp_projections": "mtp",
}

INDEX_PRECISION: dict[Storage, Precision] = {"fp4": "fp4", "fp8": "fp8", "bfloat16": "bf16", "float32": "bf16"}


Part = Literal["main", "mtp"]


@dataclass(frozen=True, kw_only=True)
class Visible:
    """How many entries queries see, summed over the queries of a step."""

    queries: int
    window: int
    csa_scored: int
    csa_picked: int
    hca: int


@dataclass(frozen=True, kw_only=True)
class MatrixGroup:
    """Matrices that cost alike, and their parameters in all."""

    part: Part
    kind: Kind
    precision: Precision
    is_head: bool  # runs where logits are wanted, not at every token
    parameters: int


def visible_at(config: ModelConfig, context: int) -> Visible:
    """Count what one query sees that is token number ``context`` of its sequence, counted from 1."""
    scored = context // RATIO["csa"]
    return Visible(
        queries=1,
        window=min(context, config.attention.window),
        csa_scored=scored,
        csa_picked=min(scored, config.indexer.top_k),
        hca=context // RATIO["hca"],
    )


def visible_in(config: ModelConfig, length: int) -> Visible:
    """Count what all queries of a sequence see together."""
    return Visible(
        queries=length,
        window=_sum_capped(length, 1, config.attention.window),
        csa_scored=_sum_capped(length, RATIO["csa"], length),
        csa_picked=_sum_capped(length, RATIO["csa"], config.indexer.top_k),
        hca=_sum_capped(length, RATIO["hca"], length),
    )


def decode(config: ModelConfig, context: int) -> tuple[Cost, ...]:
    """Cost one decoded token that sees ``context`` tokens, itself included. Without MTP."""
    return decode_each(config, (context,))[0]


def decode_each(config: ModelConfig, contexts: Sequence[int]) -> tuple[tuple[Cost, ...], ...]:
    """Cost one decoded token at each of several context lengths; the matrices cost the same at all of them."""
    matrices = _matrices(config, 1, heads=1)
    for context in contexts:
        _check_length("context", context)
    return tuple((*matrices, *_entries(config, visible_at(config, context))) for context in contexts)


def prefill(config: ModelConfig, length: int) -> tuple[Cost, ...]:
    """Cost a whole prompt. The head runs once, for the last token. Without MTP."""
    _check_length("length", length)
    return (*_matrices(config, length, heads=1), *_entries(config, visible_in(config, length)))


def training(config: ModelConfig, length: int) -> tuple[Cost, ...]:
    """Cost forward and backward of a whole sequence, MTP block included, recomputation excluded.

    A product costs its forward once more for each of its two operands that needs a gradient: 3 times the
    forward in all. The indexer learns from its own loss on entries that were picked, with its inputs
    detached: its matrices need a weight gradient only (2 times the forward), its scores are computed for
    every visible entry and differentiated for the picked ones. Newton-Schulz steps belong to the
    optimizer step, not to a token, and are not counted.
    """
    _check_length("length", length)
    visible = visible_in(config, length)
    costs = [*_matrices(config, length, heads=length), *_core(config, visible)]
    result = [_times(cost, 2 if cost.kind == "indexer" else 3) for cost in costs]
    result += _index_scores(config, visible.csa_scored)
    result += [_times(cost, 2) for cost in _index_scores(config, visible.csa_picked)]
    return (*result, *(_times(cost, 3) for cost in mtp(config, length)))


def mtp(config: ModelConfig, length: int) -> tuple[Cost, ...]:
    """Cost the forward of the MTP blocks over a sequence, each with a pass of its own through the head."""
    num_blocks = len(config.mtp_kinds)
    if not num_blocks:
        return ()
    visible = visible_in(config, length)
    costs = _products(config, "mtp", length, heads=length)
    costs += [cost for cost in _products(config, "main", 0, heads=num_blocks * length) if cost.kind == "head"]
    costs += [_attention(config, kind, visible) for kind in config.mtp_kinds]
    costs += [_mixing(config, 2 * num_blocks, num_blocks * length, length)]
    return tuple(Cost(kind="mtp", flops=cost.flops, precision=cost.precision) for cost in costs)


def _matrices(config: ModelConfig, queries: int, heads: int) -> tuple[Cost, ...]:
    """Every matrix of the main model times ``queries`` tokens; the head and its stream mix ``heads`` times."""
    products = _products(config, "main", queries, heads)
    return (*products, _mixing(config, 2 * config.num_layers, heads, queries))


def _products(config: ModelConfig, part: Part, queries: int, heads: int) -> list[Cost]:
    return [
        Cost(
            kind=COST_KIND[group.kind],
            flops=int(
                2 * group.parameters * (heads if group.is_head else queries) * activated_share(config, group.kind)
            ),
            precision=group.precision,
        )
        for group in _matrix_groups(config)
        if group.part == part
    ]


@lru_cache(maxsize=4)
def _matrix_groups(config: ModelConfig) -> tuple[MatrixGroup, ...]:
    """Add up the parameters of matrices that cost alike; remembered, for Pro has 72,000 matrices."""
    sums: dict[tuple[Part, Kind, Precision, bool], int] = {}
    for tensor in inventory(config):
        if tensor.role == "matrix":
            is_head = tensor.kind == "head" or tensor.name.endswith("hc_head_fn")
            key = ("mtp" if tensor.is_mtp else "main", tensor.kind, _precision(tensor), is_head)
            sums[key] = sums.get(key, 0) + tensor.parameters
    return tuple(
        MatrixGroup(part=part, kind=kind, precision=precision, is_head=is_head, parameters=total)
        for (part, kind, precision, is_head), total in sums.items()
    )


def _precision(tensor: TensorSpec) -> Precision:
    if tensor.name.endswith("wo_a.weight") or tensor.dtype in ("BF16", "F32"):
        return "bf16"
    return "fp8"


def _mixing(config: ModelConfig, sublayers: int, heads: int, queries: int) -> Cost:
    """The streams' input and output mixes of sub-layers, and the collapse before a head."""
    N, D = config.hyper_connections.streams, config.hidden_size
    products = sublayers * queries * (2 * N * D + N * N * D) + heads * N * D
    return Cost(kind="hyper_connections", flops=2 * products, precision="bf16")


def _entries(config: ModelConfig, visible: Visible) -> tuple[Cost, ...]:
    return (*_core(config, visible), *_index_scores(config, visible.csa_scored))


def _core(config: ModelConfig, visible: Visible) -> tuple[Cost, ...]:
    return tuple(_attention(config, kind, visible) for kind in config.layer_kinds)


def _attention(config: ModelConfig, kind: LayerKind, visible: Visible) -> Cost:
    keys = visible.window + {"window": 0, "csa": visible.csa_picked, "hca": visible.hca}[kind]
    flops = 4 * config.attention.num_heads * config.attention.head_dim * keys
    return Cost(kind="attention", flops=flops, precision="bf16")


def _index_scores(config: ModelConfig, entries: int) -> tuple[Cost, ...]:
    per_layer = 2 * config.indexer.num_heads * entries * config.layer_kinds.count("csa")
    return (
        Cost(kind="indexer", flops=per_layer * config.indexer.head_dim, precision=INDEX_PRECISION[config.storage]),
        Cost(kind="indexer", flops=per_layer, precision="bf16"),
    )


def _times(cost: Cost, factor: int) -> Cost:
    return Cost(kind=cost.kind, flops=cost.flops * factor, precision=cost.precision)


def _sum_capped(length: int, ratio: int, cap: int) -> int:
    """Sum min(cap, floor(n / ratio)) over n = 1 .. length."""
    full = min(length // ratio, cap)  # the last value reached
    first = full * ratio  # the first n that has it
    before = ratio * full * (full - 1) // 2  # ratio copies of each smaller value
    return before + full * (length - first + 1) if full else 0


def _check_length(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1 token")
