"""Schedulers, requests and steps in a line each, without a model: every entry that samples gives one token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsv4.config.engine import Limits, PrefixLimits
from dsv4.config.sampling import Sampling
from dsv4.engine.pages import PagePool
from dsv4.engine.prefix import PrefixIndex
from dsv4.engine.request import Request
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.step import Event, StepPlan

WINDOW, DEPTH = 9, 3  # 24 tokens back, rounded to a page


def make(
    num_pages: int = 16,
    *,
    max_requests: int = 2,
    step_tokens: int = 64,
    max_context: int = 4096,
    draft_tokens: int = 0,
    prefix: PrefixLimits | None = None,
    window: int = WINDOW,
    depth: int = DEPTH,
) -> Scheduler:
    """A scheduler that knows prefixes only if it is asked to."""
    limits = Limits(
        max_requests=max_requests,
        step_tokens=step_tokens,
        draft_tokens=draft_tokens,
        prefix=prefix or PrefixLimits(memory=False),
    )
    pool = PagePool(num_pages)
    index = PrefixIndex(pool, state_bytes=limits.prefix.state_bytes) if prefix else None
    return Scheduler(limits, pool, index, max_context=max_context, window=window, depth=depth)


def ask(
    scheduler: Scheduler,
    name: str,
    prompt: int | list[int],
    max_tokens: int = 100,
    salt: bytes = b"",
    output_ids: Sequence[int] = (),
) -> Request:
    """Add a request of so many tokens, or of these."""
    ids = [(sum(name.encode()) + i * i) % 1000 for i in range(prompt)] if isinstance(prompt, int) else prompt
    request = Request(
        id=name, prompt_ids=ids, sampling=Sampling(max_tokens=max_tokens), seed=0, salt=salt, output_ids=[*output_ids]
    )
    assert scheduler.add(request) is None
    return request


def tokens_of(plan: StepPlan) -> dict[str, tuple[int, int]]:
    return {entry.request.id: (entry.begin, entry.num_tokens) for entry in plan.entries}


def advance(scheduler: Scheduler, plan: StepPlan) -> list[Event]:
    """Every entry that samples gives one token."""
    return [e for entry in plan.entries for e in scheduler.advance(entry, [7] if entry.samples else [])]


def step(scheduler: Scheduler) -> tuple[dict[str, tuple[int, int]], list[Event]]:
    plan = scheduler.plan()
    tokens = tokens_of(plan)
    return tokens, [*plan.events, *advance(scheduler, plan)]


def run(scheduler: Scheduler, until: Callable[[], bool], limit: int = 1000) -> list[Event]:
    """Step until a condition holds; returns the events."""
    events = []
    for _ in range(limit):
        if until():
            return events
        events += step(scheduler)[1]
    raise AssertionError(f"{limit} steps were not enough")


def names(events: list[Event] | tuple[Event, ...], kind: type) -> list[str]:
    return [event.request.id for event in events if isinstance(event, kind)]
