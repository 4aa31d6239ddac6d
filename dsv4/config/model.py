"""What a DeepSeek-V4 model is: sizes, layer pattern, storage. No torch.

Every number a model needs is a field here. The layer pattern is data (``layer_kinds``), never
arithmetic on a layer's index. The released ``config.json`` maps onto these classes field for field
(``dsv4.config.load``); NOTATION.md lists the names side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

LayerKind = Literal["window", "csa", "hca"]
"""What a layer attends to: the sliding window alone, or the window plus compressed entries."""

RATIO: dict[LayerKind, int] = {"window": 0, "csa": 4, "hca": 128}
"""Tokens folded into one compressed entry (report 2.3.1 and 2.3.2; ``compress_ratios`` in the release)."""

Storage = Literal["fp4", "fp8", "bfloat16", "float32"]
"""How a checkpoint stores its matrices.

``fp4``: routed experts in packed FP4, other matrices FP8, scales E8M0 (the instruct releases).
``fp8``: experts FP8 too, scales F32 (the base releases). ``bfloat16`` and ``float32``: no scales (models
trained here).
"""


def _not_positive(owner: str, **values: float) -> list[str]:
    return [f"{owner}.{name} is {value}; expected a positive number" for name, value in values.items() if not value > 0]


def _not_dividing(small_name: str, small: int, large_name: str, large: int) -> list[str]:
    """A non-positive divisor is reported by ``_not_positive`` alone."""
    if small > 0 and large % small:
        return [f"{small_name} is {small}; expected a divisor of {large_name} = {large}"]
    return []


def _refuse(problems: list[str]) -> None:
    """Raise one ValueError, a line per problem."""
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary frequencies: window layers plain, compressed layers YaRN; no amplitude factor (mscale) anywhere."""

    theta: float  # base of window layers and of the MTP block
    compress_theta: float  # base of every rotation inside CSA and HCA layers
    factor: float  # YaRN: context extension, 1.0 switches YaRN off
    original_context: int  # YaRN: context length before extension
    beta_fast: float  # YaRN: rotations above which a frequency is left alone
    beta_slow: float  # YaRN: rotations below which a frequency is divided by ``factor``

    def __post_init__(self) -> None:
        problems = _not_positive("rope", **vars(self))
        if 0 < self.factor < 1:
            problems.append(f"rope.factor is {self.factor}; expected at least 1")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Low-rank queries, one shared key-value head, grouped low-rank output (report 2.3)."""

    num_heads: int  # H
    head_dim: int  # K; key and value are the same vector
    rotary_dims: int  # R, the last R of K channels
    q_rank: int  # Q
    o_groups: int  # G; heads are grouped in order
    o_rank: int  # O, per group
    window: int  # W tokens a query sees uncompressed, itself included

    def __post_init__(self) -> None:
        problems = _not_positive("attention", **vars(self))
        problems += _not_dividing("attention.o_groups", self.o_groups, "attention.num_heads", self.num_heads)
        if self.rotary_dims % 2 or self.rotary_dims > self.head_dim:
            problems.append(
                f"attention.rotary_dims is {self.rotary_dims}; expected an even number of at most "
                f"attention.head_dim = {self.head_dim}"
            )
        _refuse(problems)

    @property
    def group_dim(self) -> int:
        """Width of one output group: the channels of its H / G heads."""
        return self.num_heads * self.head_dim // self.o_groups


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """The lightning indexer of CSA layers (report 2.3.1, equations 13 to 17)."""

    num_heads: int  # I
    head_dim: int  # J
    top_k: int  # P compressed entries a query keeps

    def __post_init__(self) -> None:
        problems = _not_positive("indexer", **vars(self))
        if self.head_dim > 0 and self.head_dim & (self.head_dim - 1):
            problems.append(
                f"indexer.head_dim is {self.head_dim}; expected a power of two (it passes a Hadamard transform)"
            )
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class HyperConnectionConfig:
    """Manifold-constrained hyper-connections (report 2.2)."""

    streams: int  # N residual streams
    sinkhorn_iterations: int  # row-and-column rounds, the first of them a softmax
    eps: float  # added to sigmoids, to the softmax and to every Sinkhorn denominator

    def __post_init__(self) -> None:
        _refuse(_not_positive("hyper_connections", **vars(self)))


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """DeepSeekMoE: one shared expert, routed experts, the first layers routed by a table of token ids."""

    num_experts: int  # E
    experts_per_token: int  # A
    expert_dim: int  # F, also the shared expert's width
    routed_scale: float  # multiplies the normalised routing weights
    swiglu_limit: float  # clamp: up to +-limit, gate to at most limit; routed and shared alike
    num_hash_layers: int  # layers 0 .. n-1 look their experts up by token id

    def __post_init__(self) -> None:
        values = {k: v for k, v in vars(self).items() if k != "num_hash_layers"}
        problems = _not_positive("moe", **values)
        if self.experts_per_token > self.num_experts:
            problems.append(
                f"moe.experts_per_token is {self.experts_per_token}; expected at most moe.num_experts = "
                f"{self.num_experts}"
            )
        if self.num_hash_layers < 0:
            problems.append(f"moe.num_hash_layers is {self.num_hash_layers}; expected 0 or more")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole DeepSeek-V4 model. Presets are in ``dsv4.config.presets``, files in ``dsv4.config.load``."""

    vocab_size: int  # V
    hidden_size: int  # D
    layer_kinds: tuple[LayerKind, ...]  # one per layer
    mtp_kinds: tuple[LayerKind, ...]  # one per MTP block; the release has one, of kind "window"
    attention: AttentionConfig
    indexer: IndexerConfig
    rope: RopeConfig
    hyper_connections: HyperConnectionConfig
    moe: MoEConfig
    max_context: int  # longest sequence, tokens
    norm_eps: float  # of every RMS normalisation
    initializer_range: float  # standard deviation of fresh matrices
    bos_token_id: int
    eos_token_id: int
    storage: Storage

    def __post_init__(self) -> None:
        problems = _not_positive(
            "model",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_context=self.max_context,
            norm_eps=self.norm_eps,
            initializer_range=self.initializer_range,
            num_layers=len(self.layer_kinds),
        )
        _refuse(problems + self._layer_problems() + self._size_problems())

    def _layer_problems(self) -> list[str]:
        problems = []
        for name, kinds in (("layer_kinds", self.layer_kinds), ("mtp_kinds", self.mtp_kinds)):
            for index, kind in enumerate(kinds):
                if kind not in RATIO:
                    problems.append(f"{name}[{index}] is {kind!r}; expected one of {', '.join(RATIO)}")
        if len(self.mtp_kinds) > 1 or any(kind != "window" for kind in self.mtp_kinds):
            problems.append(f"mtp_kinds is {self.mtp_kinds}; expected () or ('window',)")
        if self.moe.num_hash_layers > self.num_layers:
            problems.append(
                f"moe.num_hash_layers is {self.moe.num_hash_layers}; expected at most the {self.num_layers} layers"
            )
        return problems

    def _size_problems(self) -> list[str]:
        problems = []
        if self.attention.rotary_dims > self.indexer.head_dim:
            problems.append(
                f"attention.rotary_dims is {self.attention.rotary_dims}; expected at most indexer.head_dim = "
                f"{self.indexer.head_dim} (the indexer rotates the same number of channels)"
            )
        for name in ("bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                problems.append(f"{name} is {getattr(self, name)}; expected 0 <= id < vocab_size = {self.vocab_size}")
        if self.storage not in get_args(Storage):
            problems.append(f"storage is {self.storage!r}; expected one of {', '.join(get_args(Storage))}")
        if self.storage == "fp4":
            problems += _not_dividing("the FP4 scale group", 32, "hidden_size", self.hidden_size)
            problems += _not_dividing("the FP4 scale group", 32, "moe.expert_dim", self.moe.expert_dim)
        return problems

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    def is_hash_layer(self, layer: int) -> bool:
        """Whether the main layer of this index routes by its table of token ids."""
        return layer < self.moe.num_hash_layers
