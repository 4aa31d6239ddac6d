"""Runs of kernels, recorded once and played again: a played step costs its kernels, and no Python around them.

A tape holds the calls with the memory they read and wrote. New inputs are copied to where the recorded ones were, and
results appear where the recorded ones did. Nothing may depend on values in Python meanwhile, only on shapes: a tape
that saw a number being read, a result whose size depends on values, or a copy from one device to another, says so
and is not to be played.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4 import native

_MAKES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # memory that something else fills
INT32 = "i"  # of Python's arrays
Input = torch.Tensor | array
_Result = TypeVar("_Result")
_PICKS = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Tape(TorchDispatchMode):
    """Records what its thread computes while entered: kernels through ``native.call``, the rest by torch's dispatch."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and saying so would import the compiler, which takes a second."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.unplayable: str | None = None  # what stands against playing it
        self._calls: list[tuple[Callable[..., object], Sequence[Any]]] = []
        self._kept: list[Any] = []  # tensors whose memory the calls know by address

    def __enter__(self) -> Tape:
        native.recorders.now.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        native.recorders.now.remove(self)
        super().__exit__(*error)

    def add(self, run: Callable[..., object], arguments: Sequence[Any], keeps: Sequence[Any]) -> None:
        """Hold a call that has just been made, and what its arguments point to."""
        self._calls.append((run, arguments))
        self._kept += keeps

    def play(self) -> None:
        """Make all calls again."""
        if not _profiler_enabled():  # telling it costs as much as a small kernel
            for run, arguments in self._calls:
                run(*arguments)
            return
        for run, arguments in self._calls:
            with record_function(getattr(run, "__name__", str(run))):
                run(*arguments)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = _tensors((result,))
        self._kept += made
        given = _tensors((*args, *kwargs.values()))
        places = {x.device for x in (*made, *given)}
        if _reads_numbers(func, args) or (given and not made) or len(places) > 1:
            self.unplayable = self.unplayable or str(func)
        elif func._schema.is_mutable:
            self.add(func, args, []) if not kwargs else self.add(_with(func, kwargs), args, [])
        elif func.overloadpacket.__name__ not in _MAKES and not _are_views(made, (*args, *kwargs.values())):
            self.add(_again, (func, args, kwargs, result), [])
        return result


class Player(Generic[_Result]):
    """A function, recorded once for each key and played from then on.

    ``function(key, *inputs)`` computes from its inputs, which are tensors; the key decides their shapes and whatever
    else it depends on. What a call returns is overwritten by the next one of the same key. At most ``most`` tapes are
    kept, those used last.
    """

    def __init__(self, function: Callable[..., _Result], most: int) -> None:
        self._function, self._most = function, most
        self._kept: OrderedDict[Hashable, tuple[Tape, Sequence[Input], _Result]] = OrderedDict()

    def __call__(self, key: Hashable, *inputs: Input) -> _Result:
        """Return what ``function(key, *inputs)`` does. inputs: tensors, or arrays of int32, which become ones."""
        found = self._kept.get(key)
        if found is None:
            return self._record(key, inputs)
        tape, own, result = found
        self._kept.move_to_end(key)
        if tape.unplayable is not None:
            return self._function(key, *map(as_tensor, inputs))
        for mine, given in zip(own, inputs, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(as_tensor(given))
            else:
                assert isinstance(given, array), f"input is {type(given)}; expected the array it was recorded with"
                memoryview(mine)[:] = memoryview(given)
        tape.play()
        return result

    def _record(self, key: Hashable, inputs: Sequence[Input]) -> _Result:
        own = [given.clone() if isinstance(given, torch.Tensor) else array(INT32, given) for given in inputs]
        with Tape() as tape:
            result = self._function(key, *map(as_tensor, own))
        self._kept[key] = tape, own, result
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return result


def as_tensor(given: Input) -> torch.Tensor:
    """Return a tensor as it is, an array as one that shares its memory."""
    return given if isinstance(given, torch.Tensor) else torch.frombuffer(given, dtype=torch.int32)


def _again(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """Compute once more what torch computed, into the same memory."""
    made = func(*args, **kwargs)
    for old, new in zip(_tensors((result,)), _tensors((made,)), strict=True):
        old.copy_(new)


def _with(func: Any, kwargs: dict[str, Any]) -> Callable[..., object]:
    return lambda *args: func(*args, **kwargs)


def _reads_numbers(func: Any, args: Sequence[Any]) -> bool:
    """Whether a number decides what follows or the size of a result. A list of places does neither, a mask does."""
    if func.overloadpacket in _PICKS:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return any(tag in func.tags for tag in _TAGS)


def _are_views(made: Sequence[torch.Tensor], given: Sequence[Any]) -> bool:
    """Whether all results share the memory of an argument."""
    held = {x.untyped_storage().data_ptr() for x in _tensors(given)}
    return all(x.untyped_storage().data_ptr() in held for x in made)


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among values, and in lists of them: a schema nests no deeper."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += (x for x in value if isinstance(x, torch.Tensor))
    return found
