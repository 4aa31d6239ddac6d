"""Our parameters under the released tensor names. One rule: stacked experts are one tensor each in a file.

    layers.3.ffn.experts.w1 [E, F, D]  <->  layers.3.ffn.experts.0.w1.weight [F, D], ...experts.1..., ...

Codes and scales stand under the names of the weight and of its scale:

    layers.3.attn.wq_a.codes             <->  layers.3.attn.wq_a.weight
    layers.3.attn.wq_a.scales            <->  layers.3.attn.wq_a.scale

Every other name is the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from dsv4.model.expert_store import StoredExperts

_STACKED = re.compile(r"(.*\.experts)\.(w[123])(?:\.(codes|scales))?$")
_STORED = {None: "weight", "codes": "weight", "scales": "scale"}


def expert_names(experts: str, expert: int, *, has_scales: bool = False) -> tuple[str, ...]:
    """Return the released names of w1, w2 and w3 of one of the experts that a module holds, by the module's name.

    has_scales: and then those of their scales.
    """
    lasts = ("weight", "scale") if has_scales else ("weight",)
    return tuple(f"{experts}.{expert}.{w}.{last}" for last in lasts for w in ("w1", "w2", "w3"))


def released_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every released name with the part of the model it names, a view that can be read or filled; codes as bytes.

    Experts that are no parameters come last, as they are stored, and are not to be filled.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor = tensor.detach()
        stacked = _STACKED.match(name)
        if stacked is not None:
            for expert in range(tensor.shape[0]):
                yield f"{stacked[1]}.{expert}.{stacked[2]}.{_STORED[stacked[3]]}", tensor[expert]
            continue
        of, _, last = name.rpartition(".")
        yield (f"{of}.{_STORED[last]}" if last in ("codes", "scales") else name), tensor
    for name, module in model.named_modules():
        if isinstance(module, StoredExperts):
            for expert in range(module.sizes[0]):
                names = expert_names(name, expert, has_scales=module.kind is not None)
                yield from zip(names, module.source.tensors(expert), strict=True)
