"""Everything this package can say about a model from its config alone, as one value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.accounting import flops
from dsv4.accounting.activations import activation_bytes
from dsv4.accounting.cache import CACHE_FORMATS, CacheFormat, bytes_per_token, cache_bytes, state_bytes
from dsv4.accounting.cost import Cost, CostKind, flops_by_kind, total_flops, total_fp8_equivalent
from dsv4.accounting.memory import TrainingMemory, training_memory
from dsv4.accounting.parameters import Parameters, parameters
from dsv4.accounting.tensors import Dtype, count_by_dtype, inventory, num_shards, total_bytes
from dsv4.config.model import LayerKind, ModelConfig

TRAINING_TOKENS = 4096  # length of the sequence whose training is accounted, unless one context is asked for


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What the weights take on disk."""

    tensors: int
    tensors_by_dtype: dict[Dtype, int]
    total_bytes: int
    shards: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs per token."""

    flops: float
    fp8_equivalent: float
    by_kind: dict[CostKind, float]


@dataclass(frozen=True, kw_only=True)
class AtContext:
    """What one length of context costs."""

    context: int
    decode: Work  # of the last token
    prefill: Work  # averaged over the tokens of a prompt this long
    cache_bytes: dict[CacheFormat, int]  # entries, rings and tails of one sequence


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All accounts of one model."""

    layers: dict[LayerKind, int]
    pattern: str
    mtp_blocks: int
    hash_layers: int
    parameters: Parameters
    checkpoint: Checkpoint
    training_tokens: int
    training: Work
    training_memory: TrainingMemory
    activation_bytes: int  # of training_tokens, in bfloat16
    cache_bytes_per_token: dict[CacheFormat, float]
    cache_state_bytes: dict[CacheFormat, int]
    at_context: tuple[AtContext, ...]


def summarize(config: ModelConfig, contexts: Sequence[int]) -> Summary:
    """Compute every account of a model, decoding and prefill at the given context lengths.

    Training is of a sequence of 4K tokens, or of the one context if there is only one.
    """
    tokens = contexts[0] if len(contexts) == 1 else min(TRAINING_TOKENS, config.max_context)
    tensors = inventory(config)
    return Summary(
        layers=dict(Counter(config.layer_kinds)),
        pattern=compact_pattern(config.layer_kinds),
        mtp_blocks=len(config.mtp_kinds),
        hash_layers=config.moe.num_hash_layers,
        parameters=parameters(config),
        checkpoint=Checkpoint(
            tensors=len(tensors),
            tensors_by_dtype=count_by_dtype(tensors),
            total_bytes=total_bytes(tensors),
            shards=num_shards(config),
        ),
        training_tokens=tokens,
        training=_work(flops.training(config, tokens), tokens),
        training_memory=training_memory(config),
        activation_bytes=activation_bytes(config, tokens),
        cache_bytes_per_token={form: float(bytes_per_token(config, form)) for form in CACHE_FORMATS},
        cache_state_bytes={form: state_bytes(config, form) for form in CACHE_FORMATS},
        at_context=tuple(_at_context(config, context) for context in contexts),
    )


def compact_pattern(kinds: Sequence[str]) -> str:
    """Write a layer pattern briefly: repeated layers and repeated pairs are counted.

    >>> compact_pattern(("window", "window", "csa", "hca", "csa", "hca", "csa"))
    'window x2, (csa hca) x2, csa'
    """
    parts = []
    at = 0
    while at < len(kinds):
        single = _repeats(kinds, at, 1)
        pair = _repeats(kinds, at, 2)
        if single == 1 and pair > 1:
            parts.append(f"({kinds[at]} {kinds[at + 1]}) x{pair}")
            at += 2 * pair
        else:
            parts.append(kinds[at] if single == 1 else f"{kinds[at]} x{single}")
            at += single
    return ", ".join(parts)


def _repeats(kinds: Sequence[str], at: int, period: int) -> int:
    """How often the ``period`` kinds at ``at`` follow each other."""
    unit = tuple(kinds[at : at + period])
    count = 1
    while tuple(kinds[at + count * period : at + (count + 1) * period]) == unit:
        count += 1
    return count


def _at_context(config: ModelConfig, context: int) -> AtContext:
    return AtContext(
        context=context,
        decode=_work(flops.decode(config, context), 1),
        prefill=_work(flops.prefill(config, context), context),
        cache_bytes={form: cache_bytes(config, form, context) for form in CACHE_FORMATS},
    )


def _work(costs: tuple[Cost, ...], tokens: int) -> Work:
    return Work(
        flops=total_flops(costs) / tokens,
        fp8_equivalent=total_fp8_equivalent(costs) / tokens,
        by_kind={kind: value / tokens for kind, value in flops_by_kind(costs).items()},
    )
