"""One optimiser over a model's named parameters: Muon for its matrices, AdamW for the rest (report 2.4).

A parameter without a gradient is left alone: no update, no weight decay, and its state stays as it is. A zero
gradient is a gradient. Weight decay is one number for both kinds, as the report states one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from dsv4.config.model import ModelConfig
from dsv4.config.train import OptimizerConfig, Train
from dsv4.optim import adamw, muon
from dsv4.optim.groups import assign, is_indexer

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Model(Protocol):
    """What an optimiser needs of a model."""

    config: ModelConfig

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class Norms(NamedTuple):
    """Norms of the gradient before it was clipped; 0 where nothing has a gradient."""

    main: float
    indexer: float


class Optimizer:
    """Updates the parameters of ``model`` in place. State is whole from the start: zeros, float32, on their device.

    Raises ``ValueError`` for a parameter that belongs to no group or is not float32 (float64 in tests).
    """

    def __init__(self, model: Model, config: OptimizerConfig) -> None:
        self._config = config
        self._parameters = dict(model.named_parameters())
        self._groups = assign(self._parameters, model.config, per_head=config.muon_per_head)
        _refuse(
            f"{name} has dtype {parameter.dtype}; expected torch.float32: the optimiser updates the masters"
            for name, parameter in self._parameters.items()
            if parameter.dtype not in (torch.float32, torch.float64)
        )
        self._momentum = {name: self._zeros(name) for name in self._groups.muon}
        self._mean = {name: self._zeros(name) for name in self._groups.adamw}
        self._square = {name: self._zeros(name) for name in self._groups.adamw}
        self._counts = dict.fromkeys(self._groups.adamw, 0)

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def clip(self, max_norm: float) -> Norms:
        """Scale gradients down to a norm of at most ``max_norm``: the indexers' apart from all others'.

        The indexers learn from a loss of their own, which must not shorten the step of the language model. A norm that
        is not finite scales nothing; what to do about it is the caller's to decide.
        """
        indexer = [grad for name, grad in self._grads() if is_indexer(name)]
        main = [grad for name, grad in self._grads() if not is_indexer(name)]
        return Norms(_clip_(main, max_norm), _clip_(indexer, max_norm))

    def step(self, learning_rate: float, *, train: Train = "all") -> None:
        """Update every parameter that has a gradient; with train = "indexer", the indexers' alone."""
        grads = {name: grad for name, grad in self._grads() if train == "all" or is_indexer(name)}
        c = self._config
        for name in grads.keys() & self._counts.keys():
            self._counts[name] += 1
        muon.step_(
            [self._stack(name, grad) for name, grad in grads.items() if name in self._momentum],
            learning_rate,
            momentum=c.muon_momentum,
            weight_decay=c.weight_decay,
            update_rms=c.muon_update_rms,
            dtype=DTYPES[c.muon_dtype],
        )
        adamw.step_(
            [self._moments(name, grad) for name, grad in grads.items() if name in self._counts],
            learning_rate,
            betas=c.adam_betas,
            eps=c.adam_eps,
            weight_decay=c.weight_decay,
        )

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the live state by name, each tensor of its parameter's shape; copy it to keep it."""
        named = {"muon.momentum": self._momentum, "adamw.mean": self._mean, "adamw.square": self._square}
        return {f"{kind}.{name}": tensor for kind, tensors in named.items() for name, tensor in tensors.items()}

    def state(self) -> dict[str, dict[str, int]]:
        """Return the rest of the state, for JSON: how many steps AdamW took with each of its parameters."""
        return {"adamw.steps": dict(self._counts)}

    def load_state(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Mapping[str, int]]) -> None:
        """Take over a state: the next steps are, bit for bit, those of the optimiser it was taken from.

        Raises ``ValueError``, before anything changes, naming every tensor and count that is missing, unknown or of
        another shape or dtype.
        """
        ours = self.state_tensors()
        counts = state.get("adamw.steps", {})
        _refuse(
            [
                *_differences("state", self.state(), state),
                *_differences("tensor", ours, tensors),
                *_differences("adamw.steps", self._counts, counts),
            ]
        )
        _refuse(
            f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}; expected {own.dtype} {list(own.shape)}"
            for name, own in ours.items()
            if tensors[name].dtype != own.dtype or tensors[name].shape != own.shape
        )
        for name, own in ours.items():
            own.copy_(tensors[name])
        self._counts.update(counts)

    def _zeros(self, name: str) -> torch.Tensor:
        return torch.zeros_like(self._parameters[name], requires_grad=False)

    def _grads(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Gradients of the parameters that are in a group and have one."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and (name in self._momentum or name in self._mean):
                yield name, parameter.grad

    def _stack(self, name: str, grad: torch.Tensor) -> muon.Stack:
        """View a parameter as its independent matrices: experts [E, F, D] as they are, rows [E * F, D] divided."""
        weight = self._parameters[name].detach()
        shape = (self._groups.muon[name], -1, weight.shape[-1])
        return muon.Stack(weight.view(shape), grad.view(shape), self._momentum[name].view(shape))

    def _moments(self, name: str, grad: torch.Tensor) -> adamw.Moments:
        weight = self._parameters[name].detach()
        return adamw.Moments(weight, grad, self._mean[name], self._square[name], self._counts[name])


def _clip_(grads: list[torch.Tensor], max_norm: float) -> float:
    """Scale gradients so that their common norm is at most ``max_norm``; return what it was."""
    norm = float(get_total_norm(grads))
    if max_norm < norm < math.inf:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm


def _differences(kind: str, ours: Iterable[str], given: Iterable[str]) -> list[str]:
    ours, given = set(ours), set(given)
    return [
        *(f"{kind} {name} is missing; expected it" for name in sorted(ours - given)),
        *(f"{kind} {name} is unknown; expected no such name" for name in sorted(given - ours)),
    ]


def _refuse(problems: Iterable[str]) -> None:
    """Raise one ValueError, a line per problem."""
    lines = list(problems)
    if lines:
        raise ValueError("\n".join(lines))
