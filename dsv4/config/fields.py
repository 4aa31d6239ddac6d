"""One row per field of a released config: its name there, in the reference runtime and in ``ModelConfig``.

The rows are in the order of the released ``config.json``. Fields that need more than a name and a type
(storage, layer pattern, YaRN in the released form) are ``special`` and handled in ``released`` and ``runtime``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dsv4.config.model import (
    AttentionConfig,
    HyperConnectionConfig,
    IndexerConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from dsv4.config.reader import Reader


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a config file. An empty name means: no such field on that side."""

    kind: Literal["constant", "integer", "number", "special"]
    released: str = ""
    runtime: str = ""
    ours: str = ""  # "room.field"; the room "model" is ModelConfig itself
    value: object = None  # of a constant


def _constant(released: str, runtime: str, value: object) -> Field:
    return Field(kind="constant", released=released, runtime=runtime, value=value)


def _integer(released: str, runtime: str, ours: str) -> Field:
    return Field(kind="integer", released=released, runtime=runtime, ours=ours)


def _number(released: str, runtime: str, ours: str) -> Field:
    return Field(kind="number", released=released, runtime=runtime, ours=ours)


def _special(released: str, runtime: str) -> Field:
    return Field(kind="special", released=released, runtime=runtime)


FIELDS = (
    #         config.json                 inference/config.json  ModelConfig, or the value it must have
    _constant("architectures", "", ["DeepseekV4ForCausalLM"]),
    _constant("model_type", "", "deepseek_v4"),
    _constant("attention_bias", "", False),
    _constant("attention_dropout", "", 0.0),
    _integer("bos_token_id", "", "model.bos_token_id"),
    _integer("eos_token_id", "", "model.eos_token_id"),
    _special("expert_dtype", "expert_dtype"),
    _number("hc_eps", "hc_eps", "hyper_connections.eps"),
    _integer("hc_mult", "hc_mult", "hyper_connections.streams"),
    _integer("hc_sinkhorn_iters", "hc_sinkhorn_iters", "hyper_connections.sinkhorn_iterations"),
    _integer("head_dim", "head_dim", "attention.head_dim"),
    _constant("hidden_act", "", "silu"),
    _integer("hidden_size", "dim", "model.hidden_size"),
    _integer("index_head_dim", "index_head_dim", "indexer.head_dim"),
    _integer("index_n_heads", "index_n_heads", "indexer.num_heads"),
    _integer("index_topk", "index_topk", "indexer.top_k"),
    _number("initializer_range", "", "model.initializer_range"),
    _integer("max_position_embeddings", "", "model.max_context"),
    _integer("moe_intermediate_size", "moe_inter_dim", "moe.expert_dim"),
    _integer("n_routed_experts", "n_routed_experts", "moe.num_experts"),
    _constant("n_shared_experts", "n_shared_experts", 1),
    _constant("norm_topk_prob", "", True),
    _integer("num_attention_heads", "n_heads", "attention.num_heads"),
    _integer("num_experts_per_tok", "n_activated_experts", "moe.experts_per_token"),
    _special("num_hidden_layers", "n_layers"),
    _integer("num_hash_layers", "n_hash_layers", "moe.num_hash_layers"),
    _constant("num_key_value_heads", "", 1),
    _special("num_nextn_predict_layers", "n_mtp_layers"),
    _integer("o_groups", "o_groups", "attention.o_groups"),
    _integer("o_lora_rank", "o_lora_rank", "attention.o_rank"),
    _integer("q_lora_rank", "q_lora_rank", "attention.q_rank"),
    _integer("qk_rope_head_dim", "rope_head_dim", "attention.rotary_dims"),
    _special("quantization_config", ""),
    _number("rms_norm_eps", "norm_eps", "model.norm_eps"),
    _special("rope_scaling", ""),
    _number("rope_theta", "rope_theta", "rope.theta"),
    _number("compress_rope_theta", "compress_rope_theta", "rope.compress_theta"),
    _number("", "rope_factor", "rope.factor"),
    _integer("", "original_seq_len", "rope.original_context"),
    _number("", "beta_fast", "rope.beta_fast"),
    _number("", "beta_slow", "rope.beta_slow"),
    _number("routed_scaling_factor", "route_scale", "moe.routed_scale"),
    _constant("scoring_func", "score_func", "sqrtsoftplus"),
    _constant("topk_method", "", "noaux_tc"),
    _integer("sliding_window", "window_size", "attention.window"),
    _number("swiglu_limit", "swiglu_limit", "moe.swiglu_limit"),
    _constant("tie_word_embeddings", "", False),
    _special("torch_dtype", ""),
    _special("dtype", ""),  # the newer name of torch_dtype; read, never written
    _special("transformers_version", ""),
    _special("use_cache", ""),
    _integer("vocab_size", "vocab_size", "model.vocab_size"),
    _special("compress_ratios", "compress_ratios"),
    _constant("", "dtype", "fp8"),
    _constant("", "scale_fmt", "ue8m0"),
    _constant("", "scale_dtype", "fp8"),
)

Flavour = Literal["released", "runtime"]

ROOMS: dict[str, Callable[..., object]] = {
    "attention": AttentionConfig,
    "indexer": IndexerConfig,
    "rope": RopeConfig,
    "hyper_connections": HyperConnectionConfig,
    "moe": MoEConfig,
}


def name_in(field: Field, flavour: Flavour) -> str:
    """Return the field's name in a flavour of file, or an empty string."""
    return field.released if flavour == "released" else field.runtime


def names(flavour: Flavour) -> tuple[str, ...]:
    """List every field name of a flavour, in file order."""
    return tuple(name_in(field, flavour) for field in FIELDS if name_in(field, flavour))


def read_model(reader: Reader, flavour: Flavour, **values: object) -> ModelConfig | None:
    """Read every plain field of a file and build the config.

    ``values`` holds what is not in the file or not plain: "room.field" with ``__`` for the dot. The problems
    of every room are collected, under the file's own field names.
    """
    rooms: dict[str, dict[str, object]] = {room: {} for room in (*ROOMS, "model")}
    for name, value in values.items():
        room, _, ours = name.partition("__")
        rooms[room][ours] = value
    for field in FIELDS:
        name = name_in(field, flavour)
        if name and field.kind == "constant":
            reader.constant(name, field.value)
        elif name and field.ours:
            room, _, ours = field.ours.partition(".")
            rooms[room][ours] = reader.integer(name) if field.kind == "integer" else reader.number(name)
    start = len(reader.problems)
    built = {room: reader.build(make, **rooms[room]) for room, make in ROOMS.items()}
    model = reader.build(ModelConfig, **rooms["model"], **built)
    reader.problems[start:] = [_rename(problem, flavour) for problem in reader.problems[start:]]
    return model


def write_fields(config: ModelConfig, special: dict[str, object]) -> dict[str, object]:
    """Write the released form in the released order; special fields absent from ``special`` are left out."""
    result: dict[str, object] = {}
    for field in FIELDS:
        if field.kind == "constant":
            result[field.released] = field.value
        elif field.kind == "special":
            result |= {field.released: special[field.released]} if field.released in special else {}
        else:
            room, _, ours = field.ours.partition(".")
            result[field.released] = getattr(config if room == "model" else getattr(config, room), ours)
    del result[""]
    return result


def _rename(problem: str, flavour: Flavour) -> str:
    """Say a config class's complaint in the names of the file it came from."""
    for field in FIELDS:
        name = name_in(field, flavour)
        if name and field.ours:
            problem = re.sub(rf"(?<![\w.])(model\.)?{re.escape(field.ours.removeprefix('model.'))}\b", name, problem)
    problem = problem.replace("rope.original_context", "rope_scaling.original_max_position_embeddings")
    return re.sub(r"(?<!\w)rope\.", "rope_scaling.", problem)
