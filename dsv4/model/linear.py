"""The one linear map: its weight is cast to the dtype of the activations here and nowhere else."""

from __future__ import annotations

import torch
from torch import nn

from dsv4.ops.backend import Backend
from dsv4.ops.linear import linear


class Linear(nn.Module):
    """y = x W^T, no bias. weight: [out, in]; x: [..., in]; computes and returns in the dtype of x."""

    def __init__(self, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs, dtype=dtype))

    def forward(self, x: torch.Tensor, backend: Backend = "portable") -> torch.Tensor:
        return linear(x, self.weight, backend=backend)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """The same map multiplied and returned in float32, where the released code widens: router and compressors."""
        return linear(x, self.weight, wide=True)


class Norm(nn.Module):
    """The weight of an RMS normalisation, [D]."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
