"""What a parser reports while a model writes, and the message that all of it makes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsv4.text.message import Message, ToolCall


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of what the model says."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """The model calls the tool ``name``; ``index`` counts the calls of a completion from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A call is whole: the pieces of its arguments make a JSON object. A call that was cut off has no end."""

    index: int


@dataclass(frozen=True)
class Note:
    """A warning: what was wrong with the completion, and what was made of it."""

    text: str


Event = Reasoning | Content | CallBegin | CallArguments | CallEnd | Note


def message_of(events: Iterable[Event]) -> Message:
    """The assistant's message that a parser's events make: pieces joined, notes and calls without an end left out."""
    reasoning, content = [], []
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    calls = []
    for event in events:
        match event:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case CallBegin(index, name):
                names[index], arguments[index] = name, []
            case CallArguments(index, text):
                arguments[index].append(text)
            case CallEnd(index):
                calls.append(ToolCall(name=names[index], arguments="".join(arguments[index])))
            case Note():
                pass
    return Message(
        role="assistant", content="".join(content), reasoning="".join(reasoning) or None, tool_calls=tuple(calls)
    )
