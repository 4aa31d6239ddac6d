"""The models this package knows by name: the four released ones, two small ones to train, a tiny one to test, and two
whose weights do not matter, to measure the engine.

A preset is a plain function that returns a whole ``ModelConfig``; a variant is a ``replace`` of another.
The layer pattern is written out as data, in the order of the released ``compress_ratios``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from dsv4.config.model import (
    AttentionConfig,
    HyperConnectionConfig,
    IndexerConfig,
    LayerKind,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)

PAIR: tuple[LayerKind, ...] = ("csa", "hca")
FLASH_LAYERS: tuple[LayerKind, ...] = ("window", "window", *(PAIR * 20), "csa")  # 43
PRO_LAYERS: tuple[LayerKind, ...] = ("hca", "hca", *(PAIR * 29), "csa")  # 61
MINI_LAYERS: tuple[LayerKind, ...] = ("window", "window", "csa", "hca", "csa", "hca", "csa", "hca", "csa")
NANO_LAYERS: tuple[LayerKind, ...] = ("window", "window", "csa", "hca", "csa")
SMOKE_LAYERS: tuple[LayerKind, ...] = ("window", "window", "csa", "hca", "csa")
BENCH_LAYERS: tuple[LayerKind, ...] = ("window", "window", *(PAIR * 3))  # 8


def flash() -> ModelConfig:
    """DeepSeek-V4-Flash: 284B parameters, 13B activated."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=4096,
        layer_kinds=FLASH_LAYERS,
        mtp_kinds=("window",),
        attention=AttentionConfig(
            num_heads=64, head_dim=512, rotary_dims=64, q_rank=1024, o_groups=8, o_rank=1024, window=128
        ),
        indexer=IndexerConfig(num_heads=64, head_dim=128, top_k=512),
        rope=RopeConfig(
            theta=10000, compress_theta=160000, factor=16, original_context=65536, beta_fast=32, beta_slow=1
        ),
        hyper_connections=HyperConnectionConfig(streams=4, sinkhorn_iterations=20, eps=1e-6),
        moe=MoEConfig(
            num_experts=256,
            experts_per_token=6,
            expert_dim=2048,
            routed_scale=1.5,
            swiglu_limit=10.0,
            num_hash_layers=3,
        ),
        max_context=1048576,
        norm_eps=1e-6,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=1,
        storage="fp4",
    )


def pro() -> ModelConfig:
    """DeepSeek-V4-Pro: 1.6T parameters, 49B activated."""
    small = flash()
    return replace(
        small,
        hidden_size=7168,
        layer_kinds=PRO_LAYERS,
        attention=replace(small.attention, num_heads=128, q_rank=1536, o_groups=16),
        indexer=replace(small.indexer, top_k=1024),
        moe=replace(small.moe, num_experts=384, expert_dim=3072, routed_scale=2.5),
    )


def flash_base() -> ModelConfig:
    """DeepSeek-V4-Flash-Base: Flash with FP8 experts and F32 scales."""
    return replace(flash(), storage="fp8")


def pro_base() -> ModelConfig:
    """DeepSeek-V4-Pro-Base: Pro with FP8 experts and F32 scales."""
    return replace(pro(), storage="fp8")


def mini() -> ModelConfig:
    """A model of about 250M parameters for one GPU: every idea of Flash, every size smaller."""
    return ModelConfig(
        vocab_size=32768,
        hidden_size=768,
        layer_kinds=MINI_LAYERS,
        mtp_kinds=("window",),
        attention=AttentionConfig(
            num_heads=8, head_dim=256, rotary_dims=64, q_rank=384, o_groups=4, o_rank=256, window=128
        ),
        indexer=IndexerConfig(num_heads=16, head_dim=128, top_k=256),
        rope=RopeConfig(
            theta=10000, compress_theta=160000, factor=16, original_context=4096, beta_fast=32, beta_slow=1
        ),
        hyper_connections=HyperConnectionConfig(streams=4, sinkhorn_iterations=20, eps=1e-6),
        moe=MoEConfig(
            num_experts=32,
            experts_per_token=4,
            expert_dim=256,
            routed_scale=1.5,
            swiglu_limit=10.0,
            num_hash_layers=3,
        ),
        max_context=65536,
        norm_eps=1e-6,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=1,
        storage="bfloat16",
    )


def nano() -> ModelConfig:
    """A model of about 10M parameters that trains on a laptop CPU in minutes: ``dsv4 train demo``.

    Its indexer is in proportion to Flash's: keys have a quarter of an entry's channels, and a token at a million tokens
    would spend 72% of its FLOPs on them, 65% in Flash. Keys rotate all their channels, so rows rotate as many.
    """
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        layer_kinds=NANO_LAYERS,
        mtp_kinds=("window",),
        attention=AttentionConfig(
            num_heads=4, head_dim=128, rotary_dims=32, q_rank=128, o_groups=2, o_rank=128, window=128
        ),
        indexer=IndexerConfig(num_heads=2, head_dim=32, top_k=64),
        rope=RopeConfig(theta=10000, compress_theta=160000, factor=4, original_context=1024, beta_fast=32, beta_slow=1),
        hyper_connections=HyperConnectionConfig(streams=4, sinkhorn_iterations=20, eps=1e-6),
        moe=MoEConfig(
            num_experts=8,
            experts_per_token=2,
            expert_dim=128,
            routed_scale=1.5,
            swiglu_limit=10.0,
            num_hash_layers=1,
        ),
        max_context=4096,
        norm_eps=1e-6,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=1,
        storage="bfloat16",
    )


def smoke() -> ModelConfig:
    """A model of about 300K parameters, for tests: it runs through a whole schedule in seconds."""
    large = nano()
    return replace(
        large,
        vocab_size=512,
        hidden_size=40,
        layer_kinds=SMOKE_LAYERS,
        attention=AttentionConfig(
            num_heads=2, head_dim=80, rotary_dims=16, q_rank=24, o_groups=2, o_rank=14, window=16
        ),
        indexer=IndexerConfig(num_heads=8, head_dim=32, top_k=8),
        rope=replace(large.rope, original_context=128),
        moe=replace(large.moe, num_experts=4, expert_dim=28, num_hash_layers=1),
        max_context=512,
    )


def nano_long() -> ModelConfig:
    """Nano at a million tokens, to measure what their length costs; its weights do not matter."""
    return replace(nano(), max_context=1048576)


def bench_engine() -> ModelConfig:
    """A model of 246M parameters (MTP block apart) for ``dsv4 bench engine``, with the contexts of Flash."""
    large = flash()
    return replace(
        large,
        hidden_size=512,
        layer_kinds=BENCH_LAYERS,
        attention=AttentionConfig(
            num_heads=8, head_dim=128, rotary_dims=64, q_rank=256, o_groups=4, o_rank=128, window=128
        ),
        indexer=IndexerConfig(num_heads=16, head_dim=64, top_k=128),
        moe=replace(large.moe, num_experts=32, experts_per_token=4, expert_dim=256),
        storage="bfloat16",
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "flash": flash,
    "pro": pro,
    "flash-base": flash_base,
    "pro-base": pro_base,
    "mini": mini,
    "nano": nano,
    "smoke": smoke,
    "nano-1m": nano_long,
    "bench-engine": bench_engine,
}


def preset(name: str) -> ModelConfig:
    """Return the preset of this name; a ValueError suggests the nearest known one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]()
