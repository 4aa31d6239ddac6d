"""The one linear map: its weight is cast to the dtype of the activations here and nowhere else.

A map is plain, or rounds as released: its weight to FP8, and x in groups of 128. In training the weight stays what it
is and is rounded for each product; for inference it is held in codes alone (``PackedLinear``). A weight that is stored
in bfloat16 is then taken as bfloat16 too.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from dsv4.native import wants_gradient
from dsv4.ops.backend import Backend, resolve
from dsv4.ops.linear import linear
from dsv4.ops.lowbit import Kind, Packed, dequantise, quantise_blocks, quantise_fp4, round_blocks, round_fp4, round_rows


class Linear(nn.Module):
    """y = x W^T, no bias. weight: [out, in]; x: [..., in]; computes and returns in the dtype of x.

    rounds: the codes that the weight is rounded to, with straight-through gradients, or ``bfloat16``, which rounds no
    input; None for none.
    """

    def __init__(self, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs, dtype=dtype))
        self.rounds: Kind | Literal["bfloat16"] | None = None

    def forward(self, x: torch.Tensor, backend: Backend) -> torch.Tensor:
        of_product = of_sequences(backend)
        if self.rounds in (None, "bfloat16"):
            return linear(x, self.matrix(x.dtype, backend), backend=of_product)
        if wants_gradient(x, self.weight):
            return linear(round_rows(x, backend=backend), self.matrix(x.dtype, backend), backend=of_product)
        return linear(x, self.packed(backend), backend=of_product)

    def wide(self, x: torch.Tensor, backend: Backend) -> torch.Tensor:
        """The same map multiplied and returned in float32, where the released code widens: router and compressors."""
        return linear(x, self.matrix(x.dtype, backend), wide=True, backend=of_sequences(backend))

    def matrix(self, dtype: torch.dtype, backend: Backend) -> torch.Tensor:
        """The weight's values, for products that do not round x: as it is, or rounded in ``dtype``."""
        if self.rounds == "bfloat16":
            return self.weight.to(torch.bfloat16)
        return self.weight if self.rounds is None else rounded(self.weight, self.rounds, dtype, backend)

    def packed(self, backend: Backend) -> Packed:
        """The weight in the codes that it rounds to."""
        assert self.rounds in ("fp4", "fp8"), "this map has no codes"
        return quantised(self.weight, self.rounds, backend)


class PackedLinear(nn.Module):
    """A linear map whose weight is codes and scales, [out, in]; x is rounded to E4M3 in groups of 128 first.

    has_values: its values are kept beside in bfloat16, for products that the released code makes of those.
    """

    values: torch.Tensor | None

    def __init__(self, weight: Packed, *, has_values: bool = False) -> None:
        super().__init__()
        self.kind: Kind = weight.kind
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("values", _values(weight) if has_values else None, persistent=False)

    @property
    def weight(self) -> Packed:
        """The weight as ``dsv4.ops.linear`` takes it."""
        return Packed(self.get_buffer("codes"), self.get_buffer("scales"), self.kind)

    def forward(self, x: torch.Tensor, backend: Backend) -> torch.Tensor:
        return linear(x, self.weight, backend=of_sequences(backend))

    def matrix(self, dtype: torch.dtype, backend: Backend) -> torch.Tensor:
        """The values, in bfloat16 whatever ``dtype`` is: nothing is left to compute."""
        assert self.values is not None, "no values are kept of this weight"
        return self.values

    def packed(self, backend: Backend) -> Packed:
        """The weight."""
        return self.weight


class Norm(nn.Module):
    """The weight of an RMS normalisation, [D]. is_narrow: it is taken as bfloat16, whatever it is held in."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_narrow = False
        self._parameters["weight"] = nn.Parameter(torch.empty(width, dtype=dtype))

    @property
    def weight(self) -> torch.Tensor:
        """As it is used."""
        held = self._parameters["weight"]
        assert held is not None
        return held.to(torch.bfloat16) if self.is_narrow else held


def of_sequences(backend: Backend) -> Backend:
    """The backend of the products of whole sequences: not those in C, which serve no gradient.

    So a model computes the same bits in training and in evaluation. An engine's products have their own fixed order.
    """
    return "portable" if backend == "native" else backend


def _values(weight: Packed) -> torch.Tensor:
    if weight.codes.is_meta:  # shapes alone
        return torch.empty(weight.shape, dtype=torch.bfloat16, device="meta")
    return dequantise(weight, torch.bfloat16, backend=resolve("auto", weight.codes.device))


def quantised(weight: torch.Tensor, kind: Kind, backend: Backend) -> Packed:
    """Return a weight, or a stack of them, in codes."""
    return quantise_fp4(weight, backend=backend) if kind == "fp4" else quantise_blocks(weight, backend=backend)


def rounded(weight: torch.Tensor, kind: Kind, dtype: torch.dtype, backend: Backend) -> torch.Tensor:
    """Return the values of those codes in ``dtype``, with a straight-through gradient."""
    run = round_fp4 if kind == "fp4" else round_blocks
    return run(weight, dtype=dtype, backend=backend)
