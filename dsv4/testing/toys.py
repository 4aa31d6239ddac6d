"""Toy models that run in milliseconds and in which every idea of the architecture matters.

Sizes all differ from one another, so that a swapped dimension does not pass. The window and the indexer's
choice are far shorter than a test's sequence, and every parameter is random: biases, sinks, norm weights and
mixes have values that move the logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dsv4.config.model import (
    AttentionConfig,
    HyperConnectionConfig,
    IndexerConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from dsv4.model.init import new_model
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import BackendChoice

# Of seeds 0 to 399 the one with the widest margins: in the tests' sequences no expert and no entry is chosen over
# another by less than 3e-5, and nothing lies within 1e-5 of a clamp, where the gradient jumps. That is ten times
# float32 rounding, so that nothing but rounding hangs on the order of a sum.
TOKEN_SEED = 231
NORM_SPREAD = 0.3  # standard deviation of norm weights around 1


def flash_like() -> ModelConfig:
    """Return a toy that opens with two window layers, as Flash does."""
    return ModelConfig(
        vocab_size=101,
        hidden_size=40,
        layer_kinds=("window", "window", "csa", "hca", "csa", "hca"),
        mtp_kinds=("window",),
        attention=AttentionConfig(
            num_heads=6, head_dim=26, rotary_dims=14, q_rank=28, o_groups=2, o_rank=10, window=16
        ),
        # With few indexer heads all of them may be silent, and entries tie at a score of exactly 0.
        indexer=IndexerConfig(num_heads=18, head_dim=32, top_k=8),
        rope=RopeConfig(theta=10000, compress_theta=160000, factor=4, original_context=256, beta_fast=32, beta_slow=1),
        hyper_connections=HyperConnectionConfig(streams=3, sinkhorn_iterations=20, eps=1e-6),
        moe=MoEConfig(
            num_experts=9,
            experts_per_token=5,
            expert_dim=22,
            routed_scale=1.5,
            swiglu_limit=3.0,  # in a hundred gates and linear parts one or two lie beyond
            num_hash_layers=2,
        ),
        max_context=1024,
        norm_eps=1e-6,
        initializer_range=0.2,  # with 40 channels no sub-layer is drowned by another
        bos_token_id=0,
        eos_token_id=1,
        storage="float32",
    )


def pro_like() -> ModelConfig:
    """Return a toy that opens with two HCA layers, as Pro does, with the released number of streams."""
    small = flash_like()
    return replace(
        small,
        layer_kinds=("hca", "hca", "csa", "hca", "csa"),
        hyper_connections=replace(small.hyper_connections, streams=4),
    )


def tiny_model(vocab_size: int, *, max_context: int = 512) -> Transformer:
    """Return a model so small that thousands of requests run: a window layer, a CSA layer and an MTP block."""
    toy = flash_like()
    config = replace(
        toy,
        vocab_size=vocab_size,
        hidden_size=12,
        layer_kinds=("window", "csa"),
        attention=replace(toy.attention, num_heads=2, head_dim=6, rotary_dims=4, q_rank=8, o_rank=3, window=5),
        indexer=replace(toy.indexer, num_heads=3, top_k=2),
        hyper_connections=replace(toy.hyper_connections, streams=2, sinkhorn_iterations=3),
        moe=replace(toy.moe, num_experts=3, experts_per_token=2, expert_dim=7, num_hash_layers=0),
        max_context=max_context,
    )
    model = toy_model(config).requires_grad_(False).eval()
    model.head.weight.mul_(6)
    return model


def toy_model(config: ModelConfig, seed: int = 0, *, backend: BackendChoice = "auto") -> Transformer:
    """Return a float32 model whose every parameter is random; the same seed gives the same model."""
    model = new_model(config, seed, backend=backend)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_base", "_scale", "ape", "attn_sink", "gate.bias")):
                parameter.normal_(generator=generator)
            elif name.endswith("norm.weight"):
                parameter.normal_(1.0, NORM_SPREAD, generator=generator)
        model.head.weight.mul_(0.5)  # logits of magnitude 0.5
    return model


def toy_token_ids(config: ModelConfig, batch_size: int, num_tokens: int, seed: int = TOKEN_SEED) -> torch.Tensor:
    """Return random token ids, [B, T] int64; fewer tokens of the same seed are the first of more tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (num_tokens, batch_size), generator=generator).T.contiguous()
