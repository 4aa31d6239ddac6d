"""Our parameters under the released tensor names. One rule: stacked experts are one tensor each in a file.

    layers.3.ffn.experts.w1 [E, F, D]  <->  layers.3.ffn.experts.0.w1.weight [F, D], ...experts.1..., ...

Every other name is the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

_STACKED = re.compile(r"(.*\.experts)\.(w[123])$")


def released_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every released name with the part of the model it names, a view that can be read or filled."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor = tensor.detach()
        stacked = _STACKED.match(name)
        if stacked is None:
            yield name, tensor
        else:
            for expert in range(tensor.shape[0]):
                yield f"{stacked[1]}.{expert}.{stacked[2]}.weight", tensor[expert]
