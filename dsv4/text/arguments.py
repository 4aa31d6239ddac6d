"""The arguments of a call as JSON text that grows while the model writes its parameters.

A text is written as it comes. Any other value waits for its end and then stands as the model wrote it, because only
then is it known to be JSON; if it is not, it becomes a text. Of two parameters with one name the first counts, since
the second comes when the first is already delivered.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from dsv4.text.encode import to_json
from dsv4.text.message import Tool

WRAPPERS = ("arguments", "input", "parameters")
"""Names under which models wrap all arguments once more."""

PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class Arguments:
    """Writes one call's arguments to ``emit``; what is wrong goes to ``note``. ``tool`` is None if it is not known.

    Between ``begin`` and ``end`` of a parameter come any number of ``write``. After ``close`` the texts given to
    ``emit`` make a JSON object.
    """

    def __init__(self, tool: Tool | None, emit: Callable[[str], None], note: Callable[[str], None]) -> None:
        self.tool = tool
        self.names: set[str] = set()
        self._emit = emit
        self._note = note
        self._key = ""
        self._kind: Literal["string", "json", "either", "wrapper", "repeated"] = "string"
        self._pieces: list[str] = []
        self._has_text = False
        self._is_string: bool | None = None
        self._wrapped: tuple[str, bool | None, str] | None = None  # a parameter that may wrap all arguments
        self._num_written = 0

    def begin(self, key: str, is_string: bool | None) -> None:
        """Begin a parameter; ``is_string`` is None if the model did not say."""
        self._release()
        if is_string is None:
            schema = self.tool.properties.get(key) if self.tool else None
            is_string = True if isinstance(schema, dict) and schema.get("type") == "string" else None
            self._note(f"parameter {key} does not say whether it is a string")
        self._is_string, self._pieces, self._has_text = is_string, [], False
        if key in self.names:
            self._note(f"parameter {key} is given twice; the first counts")
            self._kind = "repeated"
        elif not self.names and key in WRAPPERS and self.tool and key not in self.tool.properties:
            self._kind = "wrapper"
        else:
            self._start(key, is_string)
        self._key = key
        self.names.add(key)

    @property
    def is_fresh(self) -> bool:
        """Whether the parameter has no text so far."""
        return not self._has_text

    def is_at(self, key: str) -> bool:
        """Whether the parameter is of this name."""
        return self._key == key

    def write(self, text: str) -> None:
        if not text:
            return
        self._has_text = True
        if self._kind == "string":
            self._emit(to_json(text)[1:-1])
        elif self._kind != "repeated":
            self._pieces.append(text)

    def end(self) -> None:
        if self._kind == "string":
            self._emit('"')
        elif self._kind == "wrapper":
            self._wrapped = self._key, self._is_string, "".join(self._pieces)
        elif self._kind != "repeated":
            self._emit(self._json("".join(self._pieces), is_json=self._kind == "json"))

    def close(self, instead: str = "") -> bool:
        """End the object. ``instead`` is text that stood there in place of parameters; False if it was not used."""
        if instead and not self.names and (found := _object(instead)) is not None:
            inner = next(iter(found.values())) if len(found) == 1 and next(iter(found)) in WRAPPERS else None
            wraps = self._wraps(next(iter(found), ""), inner)
            self._note("the arguments stood as JSON in place of parameters")
            self._emit(to_json(inner) if wraps else instead.strip())
            return True
        if self._wrapped and len(self.names) == 1:
            key, _, text = self._wrapped
            if self._wraps(key, _object(text)):
                self._note(f"the arguments were wrapped once more in {key}")
                self._emit(text.strip())
                return not instead
        self._release()
        self._emit("}" if self._num_written else "{}")
        return not instead

    def is_whole(self) -> bool:
        """Whether the tool is known and no parameter it requires is missing."""
        required = self.tool.parameters.get("required", []) if self.tool else None
        return isinstance(required, list) and all(name in self.names for name in required)

    def _wraps(self, key: str, inner: Any) -> bool:
        """Whether it is certain that ``key`` was not meant: the tool has no such parameter, but all that are inside."""
        declared = self.tool.properties if self.tool else {}
        return key not in declared and isinstance(inner, dict) and bool(declared) and declared.keys() >= inner.keys()

    def _release(self) -> None:
        if self._wrapped:
            key, is_string, text = self._wrapped
            self._wrapped = None
            self._start(key, is_string)
            self._pieces = []
            self.write(text)
            self.end()

    def _start(self, key: str, is_string: bool | None) -> None:
        self._key = key
        self._kind = "string" if is_string else "either" if is_string is None else "json"
        lead = ", " if self._num_written else "{"
        self._emit(f"{lead}{to_json(key)}: " + ('"' if is_string else ""))
        self._num_written += 1

    def _json(self, text: str, *, is_json: bool) -> str:
        if _is_json(text):
            return text
        word = PYTHON_WORDS.get(text.strip())
        if word is not None:
            self._note(f"parameter {self._key} is {text.strip()}, which JSON writes {word}")
            return word
        if is_json:
            self._note(f"parameter {self._key} is no JSON; delivered as a string")
        return to_json(text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(word: str) -> None:
    raise ValueError(f"a number is {word}; expected one that JSON has")
