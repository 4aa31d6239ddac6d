"""What of a model is rounded as released, and models whose weights are codes alone.

    fp8   every linear map that the release stores in FP8, its routed experts too: weights in blocks, inputs in groups
    fp4   routed experts in FP4, the others in FP8, what is stored in bfloat16 so, and cache rows, entries and the
          indexer as the released code rounds

In training the weights stay what they are and are rounded for each product (``set_rounding``). ``pack`` turns a model
into one that holds the codes alone. Both compute the same bits where no gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from dsv4.accounting.tensors import inventory
from dsv4.config.model import ModelConfig, Storage
from dsv4.model.expert_store import StoredExperts
from dsv4.model.linear import Linear, Norm, PackedLinear, quantised
from dsv4.model.moe import Experts, PackedExperts, Router
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import resolve
from dsv4.ops.lowbit import Packed

Rounding = Literal["none", "fp8", "fp4"]
_OF_VALUES = ".wo_a"  # the map that the released code makes of its weight's values, without rounding its input


def set_rounding(model: Transformer, rounding: Rounding) -> None:
    """Let the maps of a model round as described above from now on, or, with ``none``, no more. Nothing is stored."""
    if rounding not in ("none", "fp8", "fp4"):
        raise ValueError(f"rounding is {rounding!r}; expected 'none', 'fp8' or 'fp4'")
    if is_packed(model):
        raise ValueError(f"rounding is {rounding!r} for a model that holds codes alone; expected one with weights")
    maps: frozenset[str] = frozenset()
    if rounding != "none":  # raises where sizes do not divide
        maps = quantised_maps(replace(model.config, storage=rounding))
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            kept = "bfloat16" if rounding == "fp4" else None
            module.rounds = "fp8" if rounding != "none" and name in maps else kept
        elif isinstance(module, (Norm, Router)):
            module.is_narrow = rounding == "fp4"
        elif isinstance(module, Experts):
            module.rounds = None if rounding == "none" else rounding
    model.rounds = rounding == "fp4"


def is_packed(model: nn.Module) -> bool:
    """Whether a model holds weights as codes alone."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def rounds_weights(model: nn.Module) -> bool:
    """Whether a model rounds weights each time they are used, see ``set_rounding``."""
    return any(isinstance(module, (Linear, Experts)) and module.rounds is not None for module in model.modules())


@lru_cache(maxsize=4)
def quantised_maps(config: ModelConfig) -> frozenset[str]:
    """Return the names of the maps that the config's storage quantises, each routed expert's matrices by themselves."""
    return frozenset(spec.name.removesuffix(".scale") for spec in inventory(config) if spec.role == "scale")


def pack(model: Transformer) -> Transformer:
    """Turn a model of plain weights into one that holds codes, in place, and return it: for inference alone.

    The codes are those of the instruct releases. What is left of the weights becomes bfloat16, as it is stored there,
    and so do the activations.
    """
    set_rounding(model, "none")
    model.requires_grad_(False)

    def matrix(name: str, module: Linear) -> Packed:
        return quantised(module.weight, "fp8", resolve("auto", module.weight.device))

    def experts(name: str, module: Experts) -> PackedExperts:
        where = resolve("auto", module.w1.device)
        return PackedExperts(*(quantised(w, "fp4", where) for w in (module.w1, module.w2, module.w3)))

    replace_maps(model, "fp4", matrix, experts)
    for spec in inventory(model.config):
        if spec.dtype == "BF16" and spec.role != "scale":
            _cast(model, spec.name)
    model.activation_dtype = torch.bfloat16
    return model.eval()


def replace_maps(
    model: Transformer,
    storage: Storage,
    matrix: Callable[[str, Linear], Packed],
    experts: Callable[[str, Experts], PackedExperts | StoredExperts],
) -> None:
    """Put codes in the place of all that ``storage`` quantises: what ``matrix`` and ``experts`` give for a name."""
    config = replace(model.config, storage=storage)
    maps = quantised_maps(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name in maps:
            model.set_submodule(name, PackedLinear(matrix(name, module), has_values=name.endswith(_OF_VALUES)))
        elif isinstance(module, Experts):
            model.set_submodule(name, experts(name, module))
    model.config, model.rounds = config, True


def _cast(model: Transformer, name: str) -> None:
    """Give a parameter the dtype in which the release stores it."""
    parameter = model.get_parameter(name)
    parameter.data = parameter.data.to(torch.bfloat16)
