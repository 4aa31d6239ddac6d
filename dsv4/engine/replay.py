"""Steps of few tokens on an accelerator: what they give it to do is captured once, as a graph, and then replayed.

Launching a kernel from Python takes longer than a small kernel; a graph launches all of a step's at once.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from dsv4 import device as devices
from dsv4.native.tape import Input, Tape, as_tensor

_Result = TypeVar("_Result")


class Graph(Protocol):
    """A captured run."""

    def replay(self) -> None: ...


class _Seen:
    """A key that has run once. waits: what in it waits for the device, if anything does."""

    def __init__(self, waits: str | None) -> None:
        self.waits = waits


class _Captured(Generic[_Result]):
    """A graph with the memory that it reads and writes."""

    def __init__(self, graph: Graph, own: Sequence[torch.Tensor], result: _Result) -> None:
        self._graph, self._own, self._result = graph, own, result

    def replay(self, inputs: Sequence[Input]) -> _Result:
        for mine, given in zip(self._own, inputs, strict=True):
            mine.copy_(as_tensor(given))
        self._graph.replay()
        return self._result


class Replayer(Generic[_Result]):
    """What ``native.tape.Player`` is on a CPU: ``function(key, *inputs)``, captured once for each key.

    The first call of a key runs, so that kernels are compiled, and sees whether something waits for the device, as no
    graph can: such a key is run every time. The second call captures. What a call returns is overwritten by the next
    one of the same key. At most ``most`` graphs are kept, those used last.
    """

    def __init__(self, function: Callable[..., _Result], most: int, device: torch.device) -> None:
        self._function, self._most, self._device = function, most, device
        self._kept: OrderedDict[Hashable, _Seen | _Captured[_Result]] = OrderedDict()

    def __call__(self, key: Hashable, *inputs: Input) -> _Result:
        """Return what ``function(key, *inputs)`` does. inputs: tensors, or arrays of int32, which become ones."""
        found = self._kept.get(key)
        if isinstance(found, _Captured):
            self._kept.move_to_end(key)
            return found.replay(inputs)
        given = [self._on_device(one) for one in inputs]
        if found is None:
            with Tape() as tape:
                result = self._function(key, *given)
            self._keep(key, _Seen(tape.unplayable))
            return result
        if found.waits is not None:
            return self._function(key, *given)
        graph, result = devices.capture(lambda: self._function(key, *given), self._device)
        captured = _Captured(graph, given, result)
        self._keep(key, captured)
        return captured.replay(inputs)

    def _keep(self, key: Hashable, found: _Seen | _Captured[_Result]) -> None:
        self._kept[key] = found
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _on_device(self, given: Input) -> torch.Tensor:
        """A copy of an input, whose memory a graph can keep."""
        if isinstance(given, array):
            return as_tensor(given).to(self._device, copy=True)
        return given.clone()
