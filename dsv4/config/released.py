"""The ``config.json`` released with the weights: ``from_released`` and its inverse ``to_released``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from dsv4.config.fields import names, read_model, write_fields
from dsv4.config.model import RATIO, LayerKind, ModelConfig, Storage
from dsv4.config.reader import Reader

QUANTIZATION: dict[str, object] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
"""``quantization_config`` of every release, Base included."""

YARN = {
    "type": "",
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "original_max_position_embeddings": "original_context",
}
"""Names in ``rope_scaling`` and in ``RopeConfig``; ``type`` has none there and is always "yarn"."""

OPTIONAL = ("expert_dtype", "quantization_config", "torch_dtype", "dtype")

KIND: dict[int, LayerKind] = {ratio: kind for kind, ratio in RATIO.items()}


def refuse_relatives(data: Mapping[str, object]) -> None:
    """Refuse the two released relatives of V4 by name, before their fields are called unknown."""
    architectures = data.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    if "text_config" in data or data.get("model_type") == "deepseek_v41" or "DeepseekV41ForCausalLM" in listed:
        raise ValueError(
            "this is a DeepSeek-V4.1 config; expected DeepSeek-V4: V4.1 shares compressed keys and selections across "
            "layers, adds Engram tables and drops the stream head, so its weights mean nothing to this model"
        )
    dspark = [name for name in data if name.startswith("dspark_")]
    if dspark:
        raise ValueError(
            f"this is a DSpark checkpoint (it has {dspark[0]}); expected an MTP block or none: the mtp.* tensors of a "
            "DSpark checkpoint are a three-stage block drafter without the MTP block's e_proj and h_proj"
        )


def from_released(data: Mapping[str, object]) -> ModelConfig:
    """Turn a released ``config.json`` into a ``ModelConfig``.

    The first release had no ``expert_dtype``: with a ``quantization_config`` that means "fp4". A file with
    neither describes weights of its ``torch_dtype``. ``rope_scaling: null`` means no YaRN.
    """
    refuse_relatives(data)
    reader = Reader(data)
    reader.check_names(names("released"), OPTIONAL)
    reader.string("transformers_version")  # bookkeeping of whoever wrote the file: any version will do
    reader.boolean("use_cache")
    num_layers, num_mtp = reader.integer("num_hidden_layers"), reader.integer("num_nextn_predict_layers")
    layer_kinds, mtp_kinds = kinds_from_ratios(
        reader, num_layers, num_mtp, "num_hidden_layers + num_nextn_predict_layers"
    )
    yarn = _yarn(reader)
    storage = _storage(reader)
    result = read_model(
        reader, "released", model__layer_kinds=layer_kinds, model__mtp_kinds=mtp_kinds, model__storage=storage, **yarn
    )
    return reader.finish("config.json", result)


def to_released(config: ModelConfig) -> dict[str, object]:
    """Write a ``ModelConfig`` as a released ``config.json``, every key in the released order."""
    special: dict[str, object] = {
        "num_hidden_layers": config.num_layers,
        "num_nextn_predict_layers": len(config.mtp_kinds),
        "rope_scaling": {name: _short(getattr(config.rope, ours)) if ours else "yarn" for name, ours in YARN.items()},
        "transformers_version": "4.57.1",
        "use_cache": True,
        "compress_ratios": [RATIO[kind] for kind in (*config.layer_kinds, *config.mtp_kinds)],
    }
    special["torch_dtype"] = "float32" if config.storage == "float32" else "bfloat16"
    if config.storage in ("fp4", "fp8"):
        special |= {"expert_dtype": config.storage, "quantization_config": dict(QUANTIZATION)}
    return {name: _short(value) if "theta" in name else value for name, value in write_fields(config, special).items()}


def kinds_from_ratios(
    reader: Reader, num_layers: int | None, num_mtp: int | None, expected_length: str
) -> tuple[tuple[LayerKind, ...] | None, tuple[LayerKind, ...] | None]:
    """Split ``compress_ratios`` into the kinds of the layers and of the MTP blocks, which come last."""
    ratios = reader.sequence("compress_ratios")
    if ratios is None:
        return None, None
    kinds: list[LayerKind] = []
    for index, ratio in enumerate(ratios):
        if isinstance(ratio, int) and not isinstance(ratio, bool) and ratio in KIND:
            kinds.append(KIND[ratio])
        else:
            reader.problems.append(f"compress_ratios[{index}] is {ratio!r}; expected 0, 4 or 128")
    if num_layers is None or num_mtp is None:
        return None, None
    if len(ratios) != num_layers + num_mtp:
        reader.problems.append(
            f"compress_ratios has {len(ratios)} entries; expected {expected_length} = {num_layers} + {num_mtp}"
        )
    if len(kinds) != num_layers + num_mtp:
        return None, None
    return tuple(kinds[:num_layers]), tuple(kinds[num_layers:])


def storage_from_expert_dtype(reader: Reader) -> Storage | None:
    """Read ``expert_dtype``: "fp4" in the instruct releases, "fp8" in the base releases."""
    value = reader.string("expert_dtype")
    if value is None or value in ("fp4", "fp8"):
        return cast(Storage | None, value)
    return reader.problem("expert_dtype", "'fp4' or 'fp8'")


def _yarn(reader: Reader) -> dict[str, object]:
    """Read ``rope_scaling`` as ``rope__`` fields."""
    if "rope_scaling" in reader.data and reader.data["rope_scaling"] is None:
        context = reader.data.get("max_position_embeddings")
        return {
            "rope__factor": 1.0,
            "rope__original_context": context if isinstance(context, int) else None,
            "rope__beta_fast": 32,
            "rope__beta_slow": 1,
        }
    nested = reader.nested("rope_scaling")
    if nested is None:
        return {f"rope__{ours}": None for ours in YARN.values() if ours}
    nested.check_names(YARN)
    nested.constant("type", "yarn")
    values: dict[str, object] = {f"rope__{name}": nested.number(name) for name in ("factor", "beta_fast", "beta_slow")}
    values["rope__original_context"] = nested.integer("original_max_position_embeddings")
    reader.absorb(nested)
    return values


def _storage(reader: Reader) -> Storage | None:
    quantised = "quantization_config" in reader.data
    dtype = _unquantised_dtype(reader)
    if quantised and dtype == "float32":
        reader.problem("torch_dtype", "'bfloat16' beside a quantization_config")
    nested = reader.nested("quantization_config")
    if nested is not None:
        nested.check_names(QUANTIZATION)
        for name, expected in QUANTIZATION.items():
            nested.constant(name, expected)
        reader.absorb(nested)
    if "expert_dtype" not in reader.data:
        return "fp4" if quantised else dtype
    if not quantised:
        return reader.problem("expert_dtype", "no such field in a config without quantization_config")
    return storage_from_expert_dtype(reader)


def _unquantised_dtype(reader: Reader) -> Storage | None:
    """Read ``torch_dtype``, or ``dtype``, its newer name."""
    field = "dtype" if "torch_dtype" not in reader.data and "dtype" in reader.data else "torch_dtype"
    if field not in reader.data:
        reader.problems.append("missing field torch_dtype")
        return None
    value = reader.string(field)
    if value is None or value in ("bfloat16", "float32"):
        return cast(Storage | None, value)
    return reader.problem(field, "'bfloat16' or 'float32'")


def _short(value: object) -> object:
    """Write 10000.0 as 10000, as the released files do for rotary numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
