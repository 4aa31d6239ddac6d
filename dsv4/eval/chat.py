"""What an instruction-tuned model gets right in conversations it was not trained on.

Every message of the assistant is asked for by itself, after the conversation as it should have been until then. So a
look-up is right where its call is right and the answer to the call's result is right. Answers may be worded freely, as
long as they hold what was to be said; calls and JSON are compared as values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dsv4.text.encode import Prompt, encode
from dsv4.text.message import Message, Tool
from dsv4.text.passages import Passages

Part = Literal["answer", "call", "no call", "object"]
"""What is asked for: words or a number, a tool's call, words though there are tools, a JSON object."""

JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


class Conversation(Protocol):
    """A conversation whose last message is the assistant's.

    values: for each message of the assistant, what its content must hold; empty where calls or JSON are compared.
    """

    @property
    def kind(self) -> str: ...
    @property
    def thinking(self) -> bool: ...
    @property
    def effort(self) -> str: ...
    @property
    def messages(self) -> Sequence[Message]: ...
    @property
    def values(self) -> Sequence[str]: ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """One message of the assistant to be asked for. before: what was said until then."""

    kind: str
    part: Part
    thinking: bool
    effort: str
    before: tuple[Message, ...]
    wanted: Message
    value: str

    def prompt(self, passages: Passages) -> Prompt:
        """What the model goes on from."""
        return encode(self.before, thinking=self.thinking, effort=self.effort, passages=passages)

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Those that are offered."""
        return tuple(tool for message in self.before for tool in message.tools)

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """Of the answer, if it is to be JSON."""
        return next((m.response_format for m in self.before if m.response_format is not None), None)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How an answer is. is_valid: it has the form that was asked for, right or wrong."""

    is_valid: bool
    is_right: bool


@dataclass(kw_only=True)
class Score:
    """How many answers of one sort there were, had the form asked for, and were right."""

    count: int = 0
    valid: int = 0
    right: int = 0

    def add(self, mark: Mark) -> None:
        self.count += 1
        self.valid += mark.is_valid
        self.right += mark.is_right


def questions(conversations: Iterable[Conversation]) -> list[Question]:
    """Every message of the assistant in these conversations, as a question."""
    return [question for each in conversations for question in _questions(each)]


def mark(question: Question, answer: Message) -> Mark:
    """Compare an answer to the one that was wanted."""
    if question.part == "call":
        is_valid = len(answer.tool_calls) == len(question.wanted.tool_calls)
        return Mark(is_valid=is_valid, is_right=_calls(answer) == _calls(question.wanted))
    if answer.tool_calls:
        return Mark(is_valid=False, is_right=False)
    if question.part == "object":
        found = _json(answer.text)
        is_valid = isinstance(found, dict) and fits(found, question.schema or {"type": "object"})
        return Mark(is_valid=is_valid, is_right=is_valid and _same(found, _json(question.wanted.text)))
    is_right = re.search(rf"(?<!\w){re.escape(question.value)}(?!\w)", answer.text) is not None
    return Mark(is_valid=bool(answer.text), is_right=is_right)


def scores(marked: Iterable[tuple[Question, Mark]]) -> dict[tuple[str, Part, bool], Score]:
    """Add marks up by kind, part and thinking, in the order in which they first come."""
    result: dict[tuple[str, Part, bool], Score] = {}
    for question, its_mark in marked:
        result.setdefault((question.kind, question.part, question.thinking), Score()).add(its_mark)
    return result


def fits(value: object, schema: Mapping[str, Any]) -> bool:
    """Whether a value has a schema's type and properties: the part of JSON Schema that the conversations use."""
    kinds = JSON_TYPES.get(schema.get("type", ""))
    if kinds is not None and not (isinstance(value, kinds) and isinstance(value, bool) == (kinds == (bool,))):
        return False
    if not isinstance(value, dict):
        return True
    properties = schema.get("properties", {})
    if not all(name in value for name in schema.get("required", ())):
        return False
    if schema.get("additionalProperties") is False and not value.keys() <= properties.keys():
        return False
    return all(fits(value[name], inner) for name, inner in properties.items() if name in value)


def _questions(each: Conversation) -> Iterable[Question]:
    places = [place for place, message in enumerate(each.messages) if message.role == "assistant"]
    for place, value in zip(places, each.values, strict=True):
        before, wanted = tuple(each.messages[:place]), each.messages[place]
        yield Question(
            kind=each.kind, part=_part(before, wanted, value), thinking=each.thinking, effort=each.effort,
            before=before, wanted=wanted, value=value,
        )  # fmt: skip


def _part(before: Sequence[Message], wanted: Message, value: str) -> Part:
    if wanted.tool_calls:
        return "call"
    if not value:
        return "object"
    has_tools = any(message.tools for message in before)
    return "no call" if has_tools and before[-1].role != "tool" else "answer"


def _calls(message: Message) -> list[tuple[str, object]]:
    return [(call.name, _json(call.arguments)) for call in message.tool_calls]


def _json(text: str) -> object:
    """The value that a text spells, or the text itself in a tuple, which equals no value of JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return (text,)


def _same(one: object, other: object) -> bool:
    """Equal as JSON: true is not 1, and the order of properties does not matter."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
