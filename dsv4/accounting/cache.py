"""Bytes of the key-value cache: what every token adds, and what every sequence holds at any length.

A CSA layer adds one entry and one indexer key per 4 tokens, an HCA layer one entry per 128. Window layers
add nothing: every layer, MTP blocks included, holds a ring of W tokens. Compressors also hold the
projections of tokens that are not yet in an entry: the tail.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Literal, get_args

from dsv4.config.model import RATIO, ModelConfig

CacheFormat = Literal["float32", "bfloat16", "packed", "packed-fp8"]
"""How rows are stored.

``float32``, ``bfloat16``: every channel alike. ``packed``: rows mix FP8 with BF16 rotary channels, indexer
keys are FP4. ``packed-fp8``: the same rows, indexer keys in FP8.
"""

CACHE_FORMATS: tuple[CacheFormat, ...] = get_args(CacheFormat)

ROW_GROUP = 64  # channels of a cached row that share an FP8 scale
INDEX_GROUP = 32  # channels of an indexer key that share a scale
TAIL_BYTES = 4  # tails are F32 in every format

GQA_HEADS, GQA_HEAD_DIM = 8, 128
"""The grouped-query attention the report compares with (section 2.3.4): BF16, 8 heads of 128."""


def row_bytes(config: ModelConfig, cache_format: CacheFormat) -> int:
    """Return the bytes of one key-value row.

    Packed: one FP8 byte per plain channel, two BF16 bytes per rotary channel, one E8M0 scale
    per 64 plain channels, the scales padded to 8 bytes. Released models: 448 + 128 + 8 = 584.
    """
    head_dim, rotary_dims = config.attention.head_dim, config.attention.rotary_dims
    if cache_format in ("float32", "bfloat16"):
        return head_dim * (4 if cache_format == "float32" else 2)
    plain = head_dim - rotary_dims
    return plain + 2 * rotary_dims + 8 * ceil(plain / ROW_GROUP / 8)


def index_row_bytes(config: ModelConfig, cache_format: CacheFormat) -> int:
    """Return the bytes of one indexer key: with E8M0 scales per 32 channels, 68 in FP4 and 132 in FP8 if released."""
    head_dim = config.indexer.head_dim
    match cache_format:
        case "float32":
            return 4 * head_dim
        case "bfloat16":
            return 2 * head_dim
        case "packed":
            return ceil(head_dim / 2) + ceil(head_dim / INDEX_GROUP)
        case "packed-fp8":
            return head_dim + ceil(head_dim / INDEX_GROUP)


def entry_bytes(config: ModelConfig, cache_format: CacheFormat, context: int) -> int:
    """Return the bytes of all compressed entries of one sequence, whole entries only."""
    row, index = row_bytes(config, cache_format), index_row_bytes(config, cache_format)
    csa = config.layer_kinds.count("csa") * (context // RATIO["csa"]) * (row + index)
    return csa + config.layer_kinds.count("hca") * (context // RATIO["hca"]) * row


def bytes_per_token(config: ModelConfig, cache_format: CacheFormat) -> Fraction:
    """Return the bytes a token adds, averaged over 128 tokens: a fraction, for an entry is shared by 4 or 128."""
    return Fraction(entry_bytes(config, cache_format, RATIO["hca"]), RATIO["hca"])


def window_bytes(config: ModelConfig, cache_format: CacheFormat, spare: int = 0) -> int:
    """Return the bytes of one sequence's window rings, of ``spare`` rows more than the window each."""
    num_rings = config.num_layers + len(config.mtp_kinds)
    return num_rings * (config.attention.window + spare) * row_bytes(config, cache_format)


def tail_bytes(config: ModelConfig, spare: int = 0) -> int:
    """Return the bytes of one sequence's compressor tails: projection and gate of each waiting token, in F32.

    HCA waits for up to 128 tokens of K channels. CSA holds the last block beside the one in progress, 8 tokens
    of 2 K channels, and the indexer's compressor as many of 2 J. Each has room for ``spare`` tokens more.
    """
    K, J = config.attention.head_dim, config.indexer.head_dim
    hca = config.layer_kinds.count("hca") * (RATIO["hca"] + spare) * K
    csa = config.layer_kinds.count("csa") * (2 * RATIO["csa"] + spare) * 2 * (K + J)
    return 2 * TAIL_BYTES * (hca + csa)


def state_bytes(config: ModelConfig, cache_format: CacheFormat, spare: int = 0) -> int:
    """Return the bytes one sequence holds whatever its length: rings and tails."""
    return window_bytes(config, cache_format, spare) + tail_bytes(config, spare)


def engine_bytes(
    config: ModelConfig, cache_format: CacheFormat, *, num_slots: int, num_pages: int, spare: int = 0
) -> int:
    """Return all bytes of an engine's cache: slots, and pages of 128 tokens."""
    return num_slots * state_bytes(config, cache_format, spare) + num_pages * page_bytes(config, cache_format)


def cache_bytes(config: ModelConfig, cache_format: CacheFormat, context: int) -> int:
    """Return all cache bytes of one sequence of ``context`` tokens."""
    return entry_bytes(config, cache_format, context) + state_bytes(config, cache_format)


def page_bytes(config: ModelConfig, cache_format: CacheFormat) -> int:
    """Return the bytes of a page: the entries of 128 tokens of one sequence in all layers."""
    return entry_bytes(config, cache_format, RATIO["hca"])


def gqa_bytes_per_token(num_layers: int) -> int:
    """Return the bytes per token of a BF16 cache of grouped-query attention: keys and values of 8 heads of 128."""
    return num_layers * 2 * GQA_HEADS * GQA_HEAD_DIM * 2
