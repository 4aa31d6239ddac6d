"""One step: gradients of all micro-batches, then, if nothing speaks against it, the update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch

from dsv4.config.train import Phase, TrainConfig
from dsv4.model.moe import MoE
from dsv4.model.precision import set_rounding
from dsv4.model.transformer import Transformer
from dsv4.optim.optimizer import Norms, Optimizer
from dsv4.train.anticipatory import Routing, Work
from dsv4.train.loss import Sums, backward, choose, count
from dsv4.train.nonfinite import NonFiniteError, first_module, last_parameter
from dsv4.train.schedule import Plan


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step found out. Its update waits for ``apply``."""

    numbers: dict[str, float | None]  # losses in nats a token, and the indexers' measures
    norms: Norms
    load: torch.Tensor  # [layers, E] slots of each expert, those of padding left out
    model: Transformer
    optimizer: Optimizer
    plan: Plan
    bias_speed: float

    def apply(self) -> None:
        """Take the step: parameters by their gradients, routing biases towards balance."""
        self.optimizer.step(self.plan.lr, train=self.plan.phase.train)
        self.optimizer.zero_grad()
        if self.plan.phase.train == "all":
            move_biases(self.model, self.load, self.bias_speed)

    @property
    def loss(self) -> float:
        loss = self.numbers["loss"]
        assert loss is not None
        return loss

    def record(self) -> dict[str, object]:
        """The part that is logged."""
        used = self.load[self.load.sum(dim=1) > 0]  # a warm-up leaves the MTP block out
        return {
            **self.numbers,
            "grad_norm": self.norms.main,
            "indexer_grad_norm": self.norms.indexer or None,
            "expert_load": [round(x, 4) for x in (used.amax(dim=1) / used.mean(dim=1)).tolist()],
        }


def train_step(
    model: Transformer, optimizer: Optimizer, config: TrainConfig, work: Work, teacher: Transformer | None = None
) -> StepResult:
    """Form and clip the gradients of a step. teacher: of ``config.distill``; the indexer's warm-up asks it nothing.

    Raises ``NonFiniteError``, with the layer where it began, if a loss or a gradient is not finite; nothing has
    changed then, and the gradients are dropped.
    """
    only_indexer = work.plan.phase.train == "indexer"
    _freeze(model, only_indexer)
    set_precision(model, work.plan.phase)
    optimizer.zero_grad()  # those of a step that was not taken
    counts = count(work.batches)
    sums = Sums(model, has_teacher=teacher is not None)
    for i, batch in enumerate(work.batches):
        forced = None if work.routing is None else work.routing[i]
        backward(model, batch, work.plan, config, counts, forced, sums, teacher)
    norms = optimizer.clip(config.optimizer.clip_norm)
    if not (sums.are_finite() and all(map(math.isfinite, norms))):
        _refuse_nonfinite(model, optimizer, work, sums, norms)
    return StepResult(
        numbers=sums.numbers(trains_all=not only_indexer),
        norms=norms,
        load=sums.load,
        model=model,
        optimizer=optimizer,
        plan=work.plan,
        bias_speed=config.loss.bias_speed,
    )


@torch.no_grad()
def choose_experts(model: Transformer, work: Work) -> list[Routing]:
    """Choose the experts of every layer for each micro-batch, by the parameters as they are."""
    set_precision(model, work.plan.phase)
    return [choose(model, batch, work.plan) for batch in work.batches]


def set_precision(model: Transformer, phase: Phase) -> None:
    """Let a model round as a phase of the schedule says. It is set for each step: nothing of it is stored."""
    set_rounding(model, "none" if phase.precision == "plain" else phase.precision)


@torch.no_grad()
def move_biases(model: Transformer, load: torch.Tensor, speed: float) -> None:
    """Move each routing bias by ``speed`` towards balance: up where an expert got less than the mean (V3).

    load: [layers, E] slots of each expert, over the whole step. Hash layers have no bias.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for moe, slots in zip(layers, load, strict=True):
        if moe.gate.bias is not None:
            slots = slots.to(moe.gate.bias.device)
            moe.gate.bias.add_(speed * torch.sign(slots.mean() - slots))


def _freeze(model: Transformer, only_indexer: bool) -> None:
    """Let gradients reach everything that learns, or the indexer alone. Routing biases never learn by gradients."""
    for name, parameter in model.named_parameters():
        if not name.endswith("gate.bias"):
            parameter.requires_grad_(not only_indexer or ".indexer." in name)


def _refuse_nonfinite(model: Transformer, optimizer: Optimizer, work: Work, sums: Sums, norms: Norms) -> NoReturn:
    loss = float(sums.loss)
    # With every layer's output finite, only the head lies before a loss that is not.
    where = last_parameter(model) if math.isfinite(loss) else "the head, or the fold and norm before it"
    if math.isfinite(loss) and not math.isfinite(sums.distill_kl):
        where = "the teacher"
    optimizer.zero_grad()
    for i, batch in enumerate(work.batches):
        forced = None if work.routing is None else work.routing[i]
        module = first_module(model, lambda batch=batch, forced=forced: choose(model, batch, work.plan, forced))
        if module is not None:
            where = module
            break
    raise NonFiniteError(
        f"step {work.plan.step}: loss {loss:.4g}, gradient norm {norms.main:.4g}; expected finite numbers. It "
        f"began in {where or 'the loss itself'}. The step was not taken: weights and optimiser are as before it"
    )
