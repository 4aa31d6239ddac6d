"""Anticipatory routing (report 4.2.3): features from today's parameters, experts chosen by those of dt steps ago.

The batches of step t are fetched at step t - dt, their experts chosen by a forward pass at once, and both wait in a
queue. For the first dt steps after it is switched on, what waits is younger than dt; from then on its age is dt
exactly, and asserted. When it is switched off, waiting batches are trained on in order, their choices forgotten.
With dt = 0 the choice is made by the very parameters that use it: training is the same to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dsv4.train.schedule import Plan, Position

if TYPE_CHECKING:
    from dsv4.data.batch import Batch

Routing = list[torch.Tensor]
"""The chosen experts of every layer, the MTP block's last: [B * T, A] int64 each."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One planned step with its data. before: where run and loader stood when its batches were fetched."""

    plan: Plan
    position: Position
    loader_state: Mapping[str, object]
    batches: list[Batch]
    routing: list[Routing] | None = None  # one a micro-batch
    chosen_at: int = 0  # the step whose parameters chose

    @property
    def age(self) -> int:
        """By how many steps the choice is older than its use."""
        return self.plan.step - self.chosen_at


class Fetch(Protocol):
    """Fetch the batches of the step after the newest one fetched, None at the end of the run."""

    def __call__(self) -> Work | None: ...


class Choose(Protocol):
    """Choose the experts of a step's batches with the parameters as they are."""

    def __call__(self, work: Work) -> list[Routing]: ...


class Anticipation:
    """The queue. ``active_until``: the last step that uses choices of the past."""

    def __init__(self, stale_steps: int) -> None:
        self.stale_steps = stale_steps
        self.active_from, self.active_until = 0, 0
        self.waiting: deque[Work] = deque()

    def is_active(self, step: int) -> bool:
        return self.active_from <= step <= self.active_until

    def activate(self, first_step: int, num_steps: int) -> None:
        """Be on for these steps; where it is on already, stay on until their end.

        If it was off, whatever still waits from an earlier time is chosen for anew.
        """
        if not self.is_active(first_step):
            self.active_from = first_step
            self.waiting = deque(replace(work, routing=None) for work in self.waiting)
        self.active_until = first_step + num_steps - 1

    def next(self, step: int, fetch: Fetch, choose: Choose) -> Work | None:
        """Return the work of ``step``, fetching ahead while active."""
        if not self.is_active(step):
            work = self.waiting.popleft() if self.waiting else fetch()
            return None if work is None else replace(work, routing=None)
        while len(self.waiting) <= self.stale_steps:
            work = fetch()
            if work is None:
                break
            self.waiting.append(work)
        self._choose(step, choose)
        if not self.waiting:
            return None
        work = self.waiting.popleft()
        assert work.plan.step == step, f"step {step} was given the work of step {work.plan.step}"
        assert work.routing is not None
        expected = min(self.stale_steps, step - self.active_from)
        assert work.age == expected, f"the routing of step {step} is {work.age} steps old; expected {expected}"
        return work

    def _choose(self, step: int, choose: Choose) -> None:
        """Give every waiting step that has none its choice, by the parameters before ``step``."""
        for i, work in enumerate(self.waiting):
            if work.routing is None:
                chosen = choose(work)
                self.waiting[i] = replace(work, routing=chosen, chosen_at=step)

    # ---- what a checkpoint holds ----

    def state(self) -> dict[str, object]:
        """Steps and ages; the batches are fetched again from the loader state of the first."""
        return {
            "active_from": self.active_from,
            "active_until": self.active_until,
            "chosen_at": [work.chosen_at if work.routing is not None else None for work in self.waiting],
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"routing.{i}.{micro}.{layer}": chosen
            for i, work in enumerate(self.waiting)
            for micro, routing in enumerate(work.routing or [])
            for layer, chosen in enumerate(routing)
        }

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], fetch: Fetch) -> None:
        """Fill the queue as it was; ``fetch`` must stand where the first waiting batch was fetched."""
        self.active_from, self.active_until = int(state["active_from"]), int(state["active_until"])
        self.waiting.clear()
        chosen_at = state["chosen_at"]
        assert isinstance(chosen_at, list)
        for i, at in enumerate(chosen_at):
            work = fetch()
            assert work is not None
            if at is not None:
                work = replace(work, routing=_routing(tensors, i, len(work.batches)), chosen_at=at)
            self.waiting.append(work)


def _routing(tensors: Mapping[str, torch.Tensor], i: int, num_batches: int) -> list[Routing]:
    result = []
    for micro in range(num_batches):
        prefix, layer, routing = f"routing.{i}.{micro}.", 0, []
        while prefix + str(layer) in tensors:
            routing.append(tensors[prefix + str(layer)])
            layer += 1
        result.append(routing)
    return result
