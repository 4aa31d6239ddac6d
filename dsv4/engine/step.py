"""What a step is, and what becomes of requests: the values the scheduler hands to the engine."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.engine.prefix import Restore
from dsv4.engine.request import Request


@dataclass(frozen=True)
class Admitted:
    """A request has a slot. Before the step, bring about the state that ``restore`` says.

    state: what was kept at ``restore.from_boundary``; None where that is 0: empty the slot.
    """

    request: Request
    restore: Restore
    state: object | None


@dataclass(frozen=True)
class Preempted:
    """A request has lost its slot, which holds its state until the step, and waits again."""

    request: Request
    slot: int


@dataclass(frozen=True)
class Finished:
    """A request has ended, as ``request.finish`` says. slot: the one it had, which holds its state until the step."""

    request: Request
    slot: int | None


@dataclass(frozen=True)
class Refused:
    """A request can never run."""

    request: Request
    reason: str


@dataclass(frozen=True)
class Filled:
    """All entries of the request's page number ``index`` are there. They stay until the next plan, at least."""

    request: Request
    index: int
    page: int
    digest: bytes


@dataclass(frozen=True)
class KeepState:
    """The state after the first ``position`` tokens is wanted, in memory, in the folder, or both.

    ``slot`` holds it until the next step, also if the request has ended with this one: it stands at
    ``request.num_computed``, which is ``position`` or past it by no more than accepted drafts.
    """

    request: Request
    slot: int
    position: int
    digest: bytes
    in_memory: bool
    in_folder: bool


Event = Admitted | Preempted | Finished | Refused | Filled | KeepState


@dataclass(frozen=True)
class Entry:
    """The tokens of one request in a step: positions ``begin`` to ``end`` - 1, the last ``num_drafts`` of them drafts.

    Entries before ``request.writes_from`` are not written; none of a step's tokens are before and others after it.
    """

    request: Request
    begin: int
    num_tokens: int
    num_drafts: int = 0

    @property
    def end(self) -> int:
        return self.begin + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether it reaches the last known token, so that its logits give the next one. Ask before ``advance``."""
        return self.end - self.num_drafts == self.request.num_tokens

    @property
    def is_last_of_prompt(self) -> bool:
        """Whether the first token of output comes of it."""
        return self.samples and not self.request.output_ids


@dataclass(frozen=True)
class StepPlan:
    """Act on the events, in order, then run the entries, then ``advance`` each."""

    entries: tuple[Entry, ...]
    events: tuple[Event, ...]

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)
