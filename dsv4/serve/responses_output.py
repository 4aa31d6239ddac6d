"""What is told of an answer, as the items and the events of the Responses protocol.

An item is added, grows by deltas, and is done. A call that the end of the answer cut off is never done: clients run
calls when they are, and this one is not whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Set
from typing import Any, Literal

from dsv4.serve.responses_request import CUSTOM_INPUT
from dsv4.serve.service import new_call_id
from dsv4.serve.turn import CallBegun, Told
from dsv4.text.events import CallArguments, CallEnd, Content, Reasoning

Json = dict[str, Any]
Status = Literal["completed", "incomplete"]

INPUT_START = re.compile(rf'\s*\{{\s*"{CUSTOM_INPUT}"\s*:\s*"')
WHOLE = re.compile(
    r'(?:[^"\\]|\\(?:["\\/bfnrt]|u(?![dD][89abAB])[0-9a-fA-F]{4}|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))*'
)
"""What may stand in a JSON string: letters and escapes, of which halves of a pair come together."""


class Output:
    """The items of one answer, while it is told. custom: the names of tools that take a text."""

    def __init__(self, custom: Set[str]) -> None:
        self._custom = custom
        self.items: list[Json] = []
        self._open: _Text | _Call | None = None

    def tell(self, told: Told) -> Iterator[Json]:
        """Yield the events of what is told."""
        if isinstance(told, Reasoning):
            yield from self._say(told.text, is_reasoning=True)
        elif isinstance(told, Content):
            yield from self._say(told.text, is_reasoning=False)
        elif isinstance(told, CallBegun):
            yield from self.close("completed")
            self._open = _Call(told, len(self.items), is_custom=told.name in self._custom)
            yield from self._add(self._open)
        elif isinstance(told, CallArguments) and isinstance(self._open, _Call):
            yield from self._open.grow(told.text)
        elif isinstance(told, CallEnd) and isinstance(self._open, _Call):
            yield from self._open.done()
            self._open = None

    def close(self, status: Status) -> Iterator[Json]:
        """Yield the events of the end of what is open."""
        if isinstance(self._open, _Text):
            yield from self._open.done(status)
        elif self._open is not None:
            self._open.cut()
        self._open = None

    def _say(self, text: str, *, is_reasoning: bool) -> Iterator[Json]:
        if not isinstance(self._open, _Text) or self._open.is_reasoning != is_reasoning:
            yield from self.close("completed")
            self._open = _Text(len(self.items), is_reasoning=is_reasoning)
            yield from self._add(self._open)
        yield from self._open.grow(text)

    def _add(self, opened: _Text | _Call) -> Iterator[Json]:
        self.items.append(opened.item)
        yield from opened.begin()


class _Text:
    """Thoughts or content: an item of one part."""

    def __init__(self, index: int, *, is_reasoning: bool) -> None:
        self.is_reasoning = is_reasoning
        self._kind = "reasoning_text" if is_reasoning else "output_text"
        id = new_call_id("rs_" if is_reasoning else "msg_")
        self.item: Json = {"id": id, "type": "reasoning" if is_reasoning else "message", "status": "in_progress"}
        self.item |= {"summary": []} if is_reasoning else {"role": "assistant"}
        self.item |= {"content": []}
        self._texts: list[str] = []
        self._place = {"item_id": id, "output_index": index, "content_index": 0}
        self._logprobs = {} if is_reasoning else {"logprobs": []}

    def begin(self) -> Iterator[Json]:
        yield _added(self.item, self._place["output_index"])
        yield {"type": "response.content_part.added", **self._place, "part": self._part("")}

    def grow(self, text: str) -> Iterator[Json]:
        self._texts.append(text)
        yield {"type": f"response.{self._kind}.delta", **self._place, "delta": text, **self._logprobs}

    def done(self, status: Status) -> Iterator[Json]:
        text = "".join(self._texts)
        part = self._part(text)
        self.item |= {"status": status, "content": [part]}
        yield {"type": f"response.{self._kind}.done", **self._place, "text": text, **self._logprobs}
        yield {"type": "response.content_part.done", **self._place, "part": part}
        yield _done(self.item, self._place["output_index"])

    def _part(self, text: str) -> Json:
        part = {"type": self._kind, "text": text}
        return part if self.is_reasoning else {**part, "annotations": [], "logprobs": []}


class _Call:
    """A call of a function, or of a tool that takes a text."""

    def __init__(self, begun: CallBegun, index: int, *, is_custom: bool) -> None:
        self._is_custom, self._index = is_custom, index
        id = new_call_id("ctc_" if is_custom else "fc_")
        kind, self._field = ("custom_tool_call", "input") if is_custom else ("function_call", "arguments")
        self.item: Json = {
            "id": id, "type": kind, "status": "in_progress", "call_id": begun.id, "name": begun.name, self._field: "",
        }  # fmt: skip
        self._event = "custom_tool_call_input" if is_custom else "function_call_arguments"
        self._place = {"item_id": id, "output_index": index}
        self._pieces: list[str] = []
        self._input = InputReader()

    def begin(self) -> Iterator[Json]:
        yield _added(self.item, self._index)

    def grow(self, text: str) -> Iterator[Json]:
        self._pieces.append(text)
        yield from self._grown(self._input.push(text) if self._is_custom else text)

    def _grown(self, delta: str) -> Iterator[Json]:
        if delta:
            yield {"type": f"response.{self._event}.delta", **self._place, "delta": delta}

    def done(self) -> Iterator[Json]:
        value = "".join(self._pieces)
        if self._is_custom:
            value = _custom_input(value)
            if value.startswith(self._input.text):
                yield from self._grown(value[len(self._input.text) :])
        self.item |= {"status": "completed", self._field: value}
        yield {"type": f"response.{self._event}.done", **self._place, self._field: value}
        yield _done(self.item, self._index)

    def cut(self) -> None:
        value = self._input.text if self._is_custom else "".join(self._pieces)
        self.item |= {"status": "incomplete", self._field: value}


class InputReader:
    """The text of a custom tool's input, out of the pieces of the JSON that it is in; as far as that has its form."""

    def __init__(self) -> None:
        self._rest, self._is_begun = "", False
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def push(self, piece: str) -> str:
        """Return what a piece adds to the text."""
        self._rest += piece
        if not self._is_begun:
            start = INPUT_START.match(self._rest)
            if start is None:
                return ""
            self._is_begun, self._rest = True, self._rest[start.end() :]
        whole = WHOLE.match(self._rest)
        assert whole is not None, "the pattern matches nothing; expected that it matches the empty text"
        self._rest = self._rest[whole.end() :]  # begins with the end of the string, or an escape that is not whole
        self._texts.append(json.loads(f'"{whole[0]}"', strict=False))
        return self._texts[-1]


def _custom_input(arguments: str) -> str:
    """The text that a call of a custom tool has for it; its arguments as they are if they have another form."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    value = found.get(CUSTOM_INPUT, "" if not found else None) if isinstance(found, dict) else None
    return value if isinstance(value, str) else arguments


def _added(item: Json, index: int) -> Json:
    return {"type": "response.output_item.added", "output_index": index, "item": dict(item)}


def _done(item: Json, index: int) -> Json:
    return {"type": "response.output_item.done", "output_index": index, "item": dict(item)}
