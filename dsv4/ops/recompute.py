"""Keep a cheap activation out of memory: form it again in backward instead (report 3.5.4).

What is dear to compute is kept, what is cheap beside its size is not: the streams between a layer's two
sub-layers (one small mix of the layer's input and output), and the shared expert's activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Recomputed:
    """A tensor that backward forms again: at the first use of a pass, and lets go after the last.

    ``again`` must give the same values in the same layout from tensors that are kept anyway.
    """

    def __init__(self, again: Callable[[], torch.Tensor]) -> None:
        self._again, self._num_saved, self._num_used = again, 0, 0
        self._made: torch.Tensor | None = None

    @contextmanager
    def instead_of(self, tensor: torch.Tensor) -> Iterator[None]:
        """Inside, operations that would keep ``tensor`` or a view of it for backward keep this.

        May be entered again, for other operations on the same tensor: it is formed once for all of them.
        """
        if not (torch.is_grad_enabled() and tensor.requires_grad):
            yield
            return
        storage = tensor.untyped_storage()._cdata  # itself, not where it lies: on no device all lie nowhere

        def pack(saved: torch.Tensor) -> torch.Tensor | _View:
            if saved.untyped_storage()._cdata != storage:
                return saved
            self._num_saved += 1
            return _View(saved.shape, saved.stride(), int(saved.storage_offset()))

        def unpack(kept: torch.Tensor | _View) -> torch.Tensor:
            if isinstance(kept, torch.Tensor):
                return kept
            return self._use().as_strided(kept.shape, kept.stride, kept.offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _use(self) -> torch.Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = self._again()
        made, self._num_used = self._made, self._num_used + 1
        if self._num_used == self._num_saved:
            self._made, self._num_used = None, 0
        return made


class _View(NamedTuple):
    """Where a tensor that would have been kept lies in the one that is formed again."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
