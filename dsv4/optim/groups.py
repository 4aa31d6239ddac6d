"""Which optimiser updates a parameter, and which matrices of it Muon treats as independent (report 2.4).

The report gives AdamW the embedding, the head, all RMSNorm weights, and the hyper-connections' static biases and
gating factors; everything else is Muon's. Two small things are no matrices that multiply activations, and are
AdamW's here: attention sinks and the compressors' position biases. "Logically independent" is the report's phrase
(algorithm 1): each expert, and each group of the grouped output; heads if asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from dsv4.config.model import ModelConfig

Kind = Literal["adamw", "muon", "none"]

Parts = Literal["whole", "experts", "output groups", "heads", "indexer heads"]
"""What a parameter's independent matrices are; they lie one after another in its rows or its first dimension."""


@dataclass(frozen=True)
class Rule:
    """pattern: of the whole name, ``*`` standing for anything."""

    pattern: str
    kind: Kind
    parts: Parts = "whole"


RULES: tuple[Rule, ...] = (
    Rule("embed.weight", "adamw"),
    Rule("head.weight", "adamw"),
    Rule("*norm.weight", "adamw"),
    Rule("*hc_*_base", "adamw"),
    Rule("*hc_*_scale", "adamw"),
    Rule("*.attn_sink", "adamw"),
    Rule("*.ape", "adamw"),
    Rule("*hc_*_fn", "muon"),
    Rule("*.attn.wq_a.weight", "muon"),
    Rule("*.attn.wq_b.weight", "muon", "heads"),
    Rule("*.attn.wkv.weight", "muon"),
    Rule("*.attn.wo_a.weight", "muon", "output groups"),
    Rule("*.attn.wo_b.weight", "muon"),
    Rule("*.compressor.wkv.weight", "muon"),
    Rule("*.compressor.wgate.weight", "muon"),
    Rule("*.indexer.wq_b.weight", "muon", "indexer heads"),
    Rule("*.indexer.weights_proj.weight", "muon"),
    Rule("*.ffn.gate.weight", "muon"),
    Rule("*.ffn.experts.w?", "muon", "experts"),
    Rule("*.ffn.shared_experts.w?.weight", "muon"),
    Rule("mtp.*.?_proj.weight", "muon"),
    Rule("*.ffn.gate.bias", "none"),  # set by the balancing rule, not by gradients
)


@dataclass(frozen=True)
class Groups:
    """muon: parameter names and into how many matrices each divides. adamw: parameter names."""

    muon: dict[str, int]
    adamw: tuple[str, ...]


def assign(names: Iterable[str], model: ModelConfig, *, per_head: bool) -> Groups:
    """Put each parameter of a model into its group, in the order of ``names``.

    per_head: divide the query matrices, the indexer's too, into their heads. Raises ``ValueError`` naming every
    parameter that no rule or more than one rule is for.
    """
    rules = {name: [rule for rule in RULES if fnmatchcase(name, rule.pattern)] for name in names}
    wrong = [f"{name} fits {len(fitting)} rules; expected one" for name, fitting in rules.items() if len(fitting) != 1]
    if wrong:
        raise ValueError("\n".join(wrong))
    number: dict[Parts, int] = {
        "whole": 1,
        "experts": model.moe.num_experts,
        "output groups": model.attention.o_groups,
        "heads": model.attention.num_heads if per_head else 1,
        "indexer heads": model.indexer.num_heads if per_head else 1,
    }
    return Groups(
        muon={name: number[rule.parts] for name, (rule,) in rules.items() if rule.kind == "muon"},
        adamw=tuple(name for name, (rule,) in rules.items() if rule.kind == "adamw"),
    )


def is_indexer(name: str) -> bool:
    """Whether a parameter belongs to a lightning indexer, which learns from a loss of its own."""
    return ".indexer." in name
