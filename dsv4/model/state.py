"""What a sequence carries between calls: the window, compressed entries, indexer keys and uncompressed tails.

Entries are appended to buffers that double, so a token costs a constant number of copies. Tensors enter a
state detached: gradients do not flow from one call into an earlier one.
"""

from __future__ import annotations

import torch

from dsv4.config.model import ModelConfig
from dsv4.ops.compress import Tail


class Growing:
    """Rows of vectors that grow together: [B, count, K] in a buffer of twice the room at most."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self.count = 0

    def extend(self, new: torch.Tensor) -> torch.Tensor:
        """Append new [B, n, K] and return everything, [B, count, K], new ones with their gradient."""
        old, total = self._buffer, self.count + new.shape[1]
        if old is None or total > old.shape[1]:
            self._buffer = new.new_empty(new.shape[0], max(total, 2 * self.count), new.shape[2])
            if old is not None:
                self._buffer[:, : self.count] = old[:, : self.count]
        assert self._buffer is not None
        self._buffer[:, self.count : total] = new.detach()
        before, self.count = self.count, total
        if new.requires_grad:
            return torch.cat([self._buffer[:, :before], new], dim=1)
        return self._buffer[:, :total]

    def num_bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes


class CompressorState:
    """The entries of one compressor and the tokens that are not an entry yet."""

    def __init__(self) -> None:
        self.entries = Growing()
        self.tail: Tail | None = None

    def num_bytes(self) -> int:
        tail = 0 if self.tail is None else self.tail.kv.nbytes + self.tail.gate.nbytes
        return self.entries.num_bytes() + tail


class LayerState:
    """One layer's share: the last ``window`` - 1 raw tokens, and the state of up to two compressors."""

    def __init__(self, window: int) -> None:
        self._kept = window - 1
        self._window: torch.Tensor | None = None
        self.compressor = CompressorState()
        self.indexer = CompressorState()

    def extend_window(self, kv: torch.Tensor) -> torch.Tensor:
        """Return the history followed by kv [B, T, K], and keep the last window - 1 of them."""
        source = kv if self._window is None else torch.cat([self._window, kv], dim=1)  # [B, h + T, K]
        first = max(0, source.shape[1] - self._kept)
        self._window = source[:, first:].detach().clone()
        return source

    def num_bytes(self) -> int:
        window = 0 if self._window is None else self._window.nbytes
        return window + self.compressor.num_bytes() + self.indexer.num_bytes()


class State:
    """All layers of ``batch_size`` sequences of equal length; made by ``Transformer.new_state``.

    ``length`` counts the tokens seen. A state belongs to the model that made it. ``is_whole`` is False while a
    call advances it, and stays False if that call fails half-way: such a state is refused afterwards.
    """

    def __init__(self, config: ModelConfig, batch_size: int, owner: object) -> None:
        self.batch_size = batch_size
        self.length = 0
        self.is_whole = True
        self.owner = owner
        self.layers = [LayerState(config.attention.window) for _ in config.layer_kinds]

    def num_bytes(self) -> int:
        """Return the memory held, in bytes."""
        return sum(layer.num_bytes() for layer in self.layers)
