"""The reference runtime's ``inference/config.json``: the same values under other names.

Three fields are not in the file and take the runtime's own defaults, the only three whose defaults are the
released values: ``scale_dtype`` "fp8", ``n_mtp_layers`` 1, ``norm_eps`` 1e-6. The defaults the runtime
has for rotary and routing fields are not the released values, so those fields must be present.

Four things the runtime does not know come from the released ``config.json``: ``bos_token_id`` 0, ``eos_token_id``
1, ``initializer_range`` 0.02, and the longest context, which is ``original_seq_len`` x ``rope_factor``.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv4.config.fields import names, read_model
from dsv4.config.model import ModelConfig
from dsv4.config.reader import Reader
from dsv4.config.released import kinds_from_ratios, refuse_relatives, storage_from_expert_dtype

DEFAULTS: dict[str, object] = {"scale_dtype": "fp8", "n_mtp_layers": 1, "norm_eps": 1e-6}


def from_runtime(data: Mapping[str, object]) -> ModelConfig:
    """Turn the reference runtime's config into a ``ModelConfig``."""
    refuse_relatives(data)
    reader = Reader({**DEFAULTS, **data})
    reader.check_names(names("runtime"))
    num_layers, num_mtp = reader.integer("n_layers"), reader.integer("n_mtp_layers")
    layer_kinds, mtp_kinds = kinds_from_ratios(reader, num_layers, num_mtp, "n_layers + n_mtp_layers")
    result = read_model(
        reader,
        "runtime",
        model__layer_kinds=layer_kinds,
        model__mtp_kinds=mtp_kinds,
        model__storage=storage_from_expert_dtype(reader),
        model__max_context=_max_context(data.get("original_seq_len"), data.get("rope_factor")),
        model__initializer_range=0.02,
        model__bos_token_id=0,
        model__eos_token_id=1,
    )
    return reader.finish("inference config", result)


def _max_context(original: object, factor: object) -> int | None:
    """Multiply, if both are numbers; that they are is reported where they are read."""
    if isinstance(original, int) and isinstance(factor, (int, float)):
        return int(original * factor)
    return None
