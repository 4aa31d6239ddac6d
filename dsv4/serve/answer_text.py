"""An answer that is wanted whole: everything that was told of it, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dsv4.serve.turn import CallBegun, Ended, Reason, Scored, Told, Usage
from dsv4.text.events import CallArguments, Content, Reasoning
from dsv4.text.message import ToolCall

Result = TypeVar("Result")


@dataclass(kw_only=True)
class Collected:
    """A whole answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    reason: Reason = "stop"
    stop: str | None = None
    usage: Usage = field(default_factory=Usage)


async def collect(answer: AsyncIterator[Sequence[Told]]) -> Collected:
    """Put an answer together as it comes."""
    return gather([told async for news in answer for told in news])


def gather(told: Iterable[Told]) -> Collected:
    """Put an answer together."""
    found = Collected()
    reasoning, content = [], []
    names: list[tuple[str, str]] = []
    arguments: list[list[str]] = []
    for one in told:
        if isinstance(one, Reasoning):
            reasoning.append(one.text)
        elif isinstance(one, Content):
            content.append(one.text)
        elif isinstance(one, CallBegun):
            names.append((one.id, one.name))
            arguments.append([])
        elif isinstance(one, CallArguments):
            arguments[one.index].append(one.text)
        elif isinstance(one, Scored):
            found.scored.append(one)
        elif isinstance(one, Ended):
            found.reason, found.stop, found.usage = one.reason, one.stop, one.usage
    found.reasoning, found.content = "".join(reasoning), "".join(content)
    found.calls = [
        ToolCall(id=id, name=name, arguments="".join(parts)) for (id, name), parts in zip(names, arguments, strict=True)
    ]
    return found


async def all_of(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Do several things at once. The first that fails ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
