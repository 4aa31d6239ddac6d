"""A matrix in codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from dsv4.ops.lowbit.tables import BLOCK, FP4_GROUP, NAN_SCALE

Kind = Literal["fp4", "fp8"]

SCALE_DTYPES = {"fp4": (torch.uint8,), "fp8": (torch.uint8, torch.float32)}


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix [..., O, I] in codes; what comes before O is a stack of matrices.

    fp4: codes [..., O, I / 2] uint8, two E2M1 a byte, the low nibble the even column; scales [..., O, I / 32] uint8.
    fp8: codes [..., O, I] uint8, E4M3; scales [..., ceil(O / 128), ceil(I / 128)] uint8, or float32 (Base).
    Scales of uint8 are E8M0.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    kind: Kind

    def __post_init__(self) -> None:
        """Check kind, dtypes and shapes; what scales hold only ``check_scales`` reads."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(get_args(Kind))}")
        self._check_codes()
        if self.scales.dtype not in SCALE_DTYPES[self.kind]:
            wanted = " or ".join(map(str, SCALE_DTYPES[self.kind]))
            raise ValueError(f"scales has dtype {self.scales.dtype}; expected {wanted} in {self.kind}")
        *stack, rows, columns = self.shape
        wanted = [*stack, -(-rows // BLOCK), -(-columns // BLOCK)]
        if self.kind == "fp4":
            wanted = [*stack, rows, columns // FP4_GROUP]
        if list(self.scales.shape) != wanted:
            held = f"{self.kind} codes {list(self.codes.shape)}"
            raise ValueError(f"scales has shape {list(self.scales.shape)}; expected {wanted} beside {held}")

    @property
    def shape(self) -> torch.Size:
        """[..., O, I]."""
        *rows, width = self.codes.shape
        return torch.Size([*rows, 2 * width if self.kind == "fp4" else width])

    def one(self, index: int) -> Packed:
        """Return one matrix of a stack."""
        return Packed(self.codes[index], self.scales[index], self.kind)

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def check_scales(self) -> None:
        """Raise ``ValueError`` unless each scale is a number. Reads them all."""
        in_bytes = self.scales.dtype == torch.uint8
        is_bad = self.scales == NAN_SCALE if in_bytes else ~self.scales.isfinite()
        if bool(is_bad.any()):
            first = is_bad.nonzero()[0].tolist()
            held = f"{self.scales[tuple(first)].item()} at {first}, and {int(is_bad.sum())} such of {is_bad.numel()}"
            raise ValueError(f"scales holds {held}; expected {'0 to 254 (E8M0)' if in_bytes else 'finite numbers'}")

    def _check_codes(self) -> None:
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes has dtype {self.codes.dtype}; expected torch.uint8")
        if self.codes.dim() < 2 or 0 in self.codes.shape[-2:]:
            raise ValueError(f"codes has shape {list(self.codes.shape)}; expected at least one row and column")
        if self.kind == "fp4" and self.codes.shape[-1] % (FP4_GROUP // 2):
            wanted = f"[..., O, I / 2] with I a multiple of {FP4_GROUP}"
            raise ValueError(f"codes has shape {list(self.codes.shape)}; expected {wanted} in fp4")
