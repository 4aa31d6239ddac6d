"""Keep a cheap activation out of memory: form it again in backward instead (report 3.5.4).

What is dear to compute is kept, what is cheap beside its size is not: the streams between a layer's two
sub-layers (one small mix of the layer's input and output), and the shared expert's activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class _Maker:
    """Forms the tensor again at the first use of a backward pass and lets it go after the last."""

    def __init__(self, again: Callable[[], torch.Tensor]) -> None:
        self.again, self.num_saved, self.num_used = again, 0, 0
        self.made: torch.Tensor | None = None

    def use(self) -> torch.Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.again()
        made, self.num_used = self.made, self.num_used + 1
        if self.num_used == self.num_saved:
            self.made, self.num_used = None, 0
        return made


class _View(NamedTuple):
    maker: _Maker
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def recomputed(tensor: torch.Tensor, again: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Inside, operations that would keep ``tensor`` or a view of it for backward keep ``again`` instead.

    ``again`` must give the same values in the same layout from tensors that are kept anyway.
    """
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        yield
        return
    storage, maker = tensor.untyped_storage().data_ptr(), _Maker(again)

    def pack(saved: torch.Tensor) -> torch.Tensor | _View:
        if saved.untyped_storage().data_ptr() != storage:
            return saved
        maker.num_saved += 1
        return _View(maker, saved.shape, saved.stride(), int(saved.storage_offset()))

    def unpack(kept: torch.Tensor | _View) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        return kept.maker.use().as_strided(kept.shape, kept.stride, kept.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
