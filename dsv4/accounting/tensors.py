"""Every tensor of a checkpoint, from the config alone: name, stored shape, dtype, file.

The names and the layout are those of the released safetensors files: file 1 holds the embedding, file
``l + 2`` all of layer ``l``, then one file for the head and the final norm, then one per MTP block.
The kinds of storage are described (``dsv4.config.model.Storage``): ``fp4`` and ``fp8`` store a matrix
next to its ``.scale``; ``bfloat16`` and ``float32`` store the same names without scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod
from typing import Literal

from dsv4.config.model import RATIO, LayerKind, ModelConfig

Dtype = Literal["BF16", "F32", "F8_E4M3", "F8_E8M0", "I64", "I8"]
"""Element types by their safetensors names."""

ITEM_BYTES: dict[Dtype, int] = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I64": 8, "I8": 1}

Kind = Literal[
    "embedding",
    "head",
    "attention",
    "compressor",
    "indexer",
    "router",
    "routed_experts",
    "shared_experts",
    "hyper_connections",
    "norms",
    "mtp_projections",
    "hash_table",
]
"""What a tensor belongs to. The two norms inside attention count as attention, a compressor's as compressor's."""

Role = Literal["matrix", "vector", "added", "table", "scale"]
"""What a tensor does.

``matrix``: multiplies activations. ``vector``: one dimension, or the embedding's rows when ``table``.
``added``: a two-dimensional bias (the compressors' position table ``ape``). ``table``: read by index.
``scale``: dequantises the matrix before it and holds no parameters.
"""

FP8_BLOCK = 128  # an FP8 matrix has one scale per block of 128 x 128 elements
FP4_GROUP = 32  # an FP4 matrix has one scale per 32 input elements of a row


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]  # as stored; packed FP4 holds two elements a byte
    dtype: Dtype
    logical_shape: tuple[int, ...]  # as used
    kind: Kind
    role: Role
    shard: int  # 1-based file number

    @property
    def parameters(self) -> int:
        """Learned numbers in this tensor: packed FP4 counts two a byte, scales and hash tables none."""
        return 0 if self.role == "scale" or self.kind == "hash_table" else prod(self.logical_shape)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def is_mtp(self) -> bool:
        return self.name.startswith("mtp.")


@lru_cache(maxsize=4)
def inventory(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """List every tensor of a checkpoint in file order; within a layer, in the order of use.

    The last few results are remembered: Pro has 145,116 tensors and every account starts from this list.
    """
    specs = _walk(config)
    if config.storage == "float32":
        specs = (replace(spec, dtype="F32") if spec.dtype == "BF16" else spec for spec in specs)
    return tuple(specs)


def num_shards(config: ModelConfig) -> int:
    """Count the files: embedding, one per layer, head, one per MTP block."""
    return 1 + config.num_layers + 1 + len(config.mtp_kinds)


def shard_name(shard: int, total: int) -> str:
    """Name the safetensors file of a 1-based shard number."""
    return f"model-{shard:05d}-of-{total:05d}.safetensors"


def count_by_dtype(tensors: Iterable[TensorSpec]) -> dict[Dtype, int]:
    """Count tensors of each dtype."""
    return dict(Counter(tensor.dtype for tensor in tensors))


def total_bytes(tensors: Iterable[TensorSpec]) -> int:
    """Sum the stored bytes: ``metadata.total_size`` of the index file."""
    return sum(tensor.num_bytes for tensor in tensors)


def _walk(config: ModelConfig) -> Iterator[TensorSpec]:
    V, D = config.vocab_size, config.hidden_size
    yield _plain("embed.weight", (V, D), "BF16", "embedding", "table", 1)
    for layer, kind in enumerate(config.layer_kinds):
        yield from _block(config, f"layers.{layer}.", kind, config.is_hash_layer(layer), layer + 2)
    shard = config.num_layers + 2
    yield _plain("norm.weight", (D,), "BF16", "norms", "vector", shard)
    yield _plain("head.weight", (V, D), "BF16", "head", "matrix", shard)
    yield from _stream_head(config, "", shard)
    for index, kind in enumerate(config.mtp_kinds):
        yield from _mtp(config, f"mtp.{index}.", kind, shard + 1 + index)


def _plain(name: str, shape: tuple[int, ...], dtype: Dtype, kind: Kind, role: Role, shard: int) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype, logical_shape=shape, kind=kind, role=role, shard=shard)


def _matrix(config: ModelConfig, name: str, shape: tuple[int, int], kind: Kind, shard: int) -> Iterator[TensorSpec]:
    """A quantised matrix and its scale, or one BF16 matrix when nothing is quantised. ``name`` has no suffix."""
    rows, columns = shape
    weight, scale = name + ".weight", name + ".scale"
    if config.storage in ("bfloat16", "float32"):
        yield _plain(weight, shape, "BF16", kind, "matrix", shard)
    elif config.storage == "fp4" and kind == "routed_experts":
        packed = (rows, columns // 2)
        yield TensorSpec(
            name=weight, shape=packed, dtype="I8", logical_shape=shape, kind=kind, role="matrix", shard=shard
        )
        yield _plain(scale, (rows, columns // FP4_GROUP), "F8_E8M0", kind, "scale", shard)
    else:
        blocks = (ceil(rows / FP8_BLOCK), ceil(columns / FP8_BLOCK))
        yield _plain(weight, shape, "F8_E4M3", kind, "matrix", shard)
        yield _plain(scale, blocks, "F8_E8M0" if config.storage == "fp4" else "F32", kind, "scale", shard)


def _norm(name: str, width: int, kind: Kind, shard: int) -> TensorSpec:
    return _plain(name + ".weight", (width,), "BF16", kind, "vector", shard)


def _block(config: ModelConfig, prefix: str, kind: LayerKind, is_hash: bool, shard: int) -> Iterator[TensorSpec]:
    """One layer, or the part of an MTP block that is a layer."""
    D = config.hidden_size
    yield from _stream_mix(config, prefix + "hc_attn_", shard)
    yield _norm(prefix + "attn_norm", D, "norms", shard)
    yield from _attention(config, prefix + "attn.", shard)
    if kind != "window":
        yield from _compressor(config, prefix + "attn.compressor.", kind, shard)
    if kind == "csa":
        yield from _indexer(config, prefix + "attn.indexer.", shard)
    yield from _stream_mix(config, prefix + "hc_ffn_", shard)
    yield _norm(prefix + "ffn_norm", D, "norms", shard)
    yield from _moe(config, prefix + "ffn.", is_hash, shard)


def _stream_mix(config: ModelConfig, prefix: str, shard: int) -> Iterator[TensorSpec]:
    """Hyper-connections around one sub-layer: N + N + N x N coefficients from N x D channels."""
    N = config.hyper_connections.streams
    width = N * (N + 2)
    yield _plain(prefix + "fn", (width, N * config.hidden_size), "F32", "hyper_connections", "matrix", shard)
    yield _plain(prefix + "base", (width,), "F32", "hyper_connections", "vector", shard)
    yield _plain(prefix + "scale", (3,), "F32", "hyper_connections", "vector", shard)


def _stream_head(config: ModelConfig, prefix: str, shard: int) -> Iterator[TensorSpec]:
    """The collapse of N streams into one before the final norm."""
    N = config.hyper_connections.streams
    yield _plain(prefix + "hc_head_fn", (N, N * config.hidden_size), "F32", "hyper_connections", "matrix", shard)
    yield _plain(prefix + "hc_head_base", (N,), "F32", "hyper_connections", "vector", shard)
    yield _plain(prefix + "hc_head_scale", (1,), "F32", "hyper_connections", "vector", shard)


def _attention(config: ModelConfig, prefix: str, shard: int) -> Iterator[TensorSpec]:
    D, attention = config.hidden_size, config.attention
    H, K, Q = attention.num_heads, attention.head_dim, attention.q_rank
    GO = attention.o_groups * attention.o_rank
    yield _plain(prefix + "attn_sink", (H,), "F32", "attention", "vector", shard)
    yield from _matrix(config, prefix + "wq_a", (Q, D), "attention", shard)
    yield _norm(prefix + "q_norm", Q, "attention", shard)
    yield from _matrix(config, prefix + "wq_b", (H * K, Q), "attention", shard)
    yield from _matrix(config, prefix + "wkv", (K, D), "attention", shard)
    yield _norm(prefix + "kv_norm", K, "attention", shard)
    yield from _matrix(config, prefix + "wo_a", (GO, attention.group_dim), "attention", shard)
    yield from _matrix(config, prefix + "wo_b", (D, GO), "attention", shard)


def _compressor(config: ModelConfig, prefix: str, kind: LayerKind, shard: int) -> Iterator[TensorSpec]:
    yield from _pooling(config, prefix, kind, config.attention.head_dim, "compressor", shard)


def _pooling(
    config: ModelConfig, prefix: str, layer_kind: LayerKind, width: int, kind: Kind, shard: int
) -> Iterator[TensorSpec]:
    """A compressor of entries ``width`` wide; with overlap (CSA) each token gives two halves."""
    D = config.hidden_size
    channels = 2 * width if layer_kind == "csa" else width
    yield _plain(prefix + "wkv.weight", (channels, D), "BF16", kind, "matrix", shard)
    yield _plain(prefix + "wgate.weight", (channels, D), "BF16", kind, "matrix", shard)
    yield _plain(prefix + "ape", (RATIO[layer_kind], channels), "F32", kind, "added", shard)
    yield _norm(prefix + "norm", width, kind, shard)


def _indexer(config: ModelConfig, prefix: str, shard: int) -> Iterator[TensorSpec]:
    num_heads, head_dim = config.indexer.num_heads, config.indexer.head_dim
    yield from _matrix(config, prefix + "wq_b", (num_heads * head_dim, config.attention.q_rank), "indexer", shard)
    yield _plain(prefix + "weights_proj.weight", (num_heads, config.hidden_size), "BF16", "indexer", "matrix", shard)
    yield from _pooling(config, prefix + "compressor.", "csa", head_dim, "indexer", shard)


def _moe(config: ModelConfig, prefix: str, is_hash: bool, shard: int) -> Iterator[TensorSpec]:
    D, E, F = config.hidden_size, config.moe.num_experts, config.moe.expert_dim
    yield _plain(prefix + "gate.weight", (E, D), "BF16", "router", "matrix", shard)
    if is_hash:
        shape = (config.vocab_size, config.moe.experts_per_token)
        yield _plain(prefix + "gate.tid2eid", shape, "I64", "hash_table", "table", shard)
    else:
        yield _plain(prefix + "gate.bias", (E,), "F32", "router", "vector", shard)
    for expert in range(E):
        yield from _swiglu(config, f"{prefix}experts.{expert}.", (F, D), "routed_experts", shard)
    yield from _swiglu(config, prefix + "shared_experts.", (F, D), "shared_experts", shard)


def _swiglu(config: ModelConfig, prefix: str, shape: tuple[int, int], kind: Kind, shard: int) -> Iterator[TensorSpec]:
    """Gate ``w1`` and up ``w3`` [F, D], down ``w2`` [D, F]."""
    F, D = shape
    yield from _matrix(config, prefix + "w1", (F, D), kind, shard)
    yield from _matrix(config, prefix + "w2", (D, F), kind, shard)
    yield from _matrix(config, prefix + "w3", (F, D), kind, shard)


def _mtp(config: ModelConfig, prefix: str, kind: LayerKind, shard: int) -> Iterator[TensorSpec]:
    """The prediction block: two projections, a layer, a stream collapse and a norm; embedding and head are shared."""
    D = config.hidden_size
    for side in ("e", "h"):
        yield _norm(f"{prefix}{side}norm", D, "norms", shard)
        yield from _matrix(config, f"{prefix}{side}_proj", (D, D), "mtp_projections", shard)
    yield from _block(config, prefix, kind, False, shard)
    yield _norm(prefix + "norm", D, "norms", shard)
    yield from _stream_head(config, prefix, shard)
