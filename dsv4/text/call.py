"""One call of a completion, from its beginning to its end: parameters, and what stands between them."""

from __future__ import annotations

from collections.abc import Callable

from dsv4.text.arguments import Arguments
from dsv4.text.events import CallArguments, CallBegin, CallEnd, Event, Note
from dsv4.text.markup import Tag
from dsv4.text.message import Tool


class Call:
    """Takes the text and the tags inside a call and appends to ``events``. ``tool`` is None if it is not known.

    ``piece`` makes the event of a text that is none of the call's.

    Text between parameters is kept until the end: it may be the arguments as JSON, and is content otherwise.
    """

    def __init__(
        self, events: list[Event], index: int, name: str, tool: Tool | None, piece: Callable[[str], Event]
    ) -> None:
        self.in_value = False
        self.has_ended = False
        self._events, self._index, self._name, self._piece = events, index, name, piece
        self._between: list[str] = []
        self._is_fresh = True  # nothing but spaces so far
        self._strays: list[str] = []
        self._arguments = Arguments(tool, self._emit, self._note)
        events.append(CallBegin(index, name))

    def take_text(self, text: str) -> None:
        if self.in_value:
            self._arguments.write(text)
        else:
            self._between.append(text)
            self._is_fresh = self._is_fresh and text.isspace()

    def take_tag(self, breaks: str, tag: Tag) -> bool:
        """Take a tag and the line breaks before it; False if the tag is for what is around the call, now at its end."""
        return self._tag_in_value(breaks, tag) if self.in_value else self._tag_between(tag)

    def stop(self, *, is_cut: bool) -> None:
        """The text has ended in this call. That is its end if it has all that the tool requires."""
        is_whole = not self.in_value and not "".join(self._between).strip() and self._arguments.is_whole()
        if is_whole and not is_cut:
            self._note(f"call {self._name} has no end")
            self._end()
        else:
            self._note(f"the text ended in call {self._name}")
            self._set_aside()
            self._deliver_strays()

    def _tag_in_value(self, breaks: str, tag: Tag) -> bool:
        arguments = self._arguments
        if tag.kind == "think":
            arguments.write(breaks + tag.text)
        elif tag.closes and tag.kind in ("parameter", "unknown"):
            if not tag.is_exact:
                self._note(f"{tag.text} taken for the end of a parameter")
            arguments.write(breaks)
            self._end_value()
        elif tag.kind == "parameter" and arguments.is_at(tag.name) and arguments.is_fresh:
            self._note(f"{tag.text} is repeated")
        elif tag.closes or tag.kind in ("parameter", "call"):
            self._note(f"a parameter has no end before {tag.text}")
            self._end_value()
            return self._tag_between(tag)
        else:
            self._note(f"{tag.text} is out of place in a parameter; left out")
            arguments.write(breaks)
        return True

    def _tag_between(self, tag: Tag) -> bool:
        if tag.kind == "parameter" and not tag.closes:
            if not tag.is_exact:
                self._note(f"{tag.text} taken for a parameter")
            self._set_aside()
            self._is_fresh = False
            self._arguments.begin(tag.name, tag.is_string)
            self.in_value = True
        elif tag.kind == "call" and tag.closes:
            self._end()
        elif tag.kind == "call" and tag.name == self._name and self._is_fresh:
            self._note(f"{tag.text} is repeated")
        elif tag.kind == "call" or (tag.kind == "block" and tag.closes):
            self._note(f"call {self._name} has no end before {tag.text}")
            self._end()
            return False
        elif tag.kind == "think":
            self.take_text(tag.text)
        elif tag.kind == "unknown" and not tag.closes:
            self._set_aside()  # so that it is in no JSON
            self.take_text(tag.text)
            self._set_aside()
        else:
            self._note(f"{tag.text} is out of place in a call; left out")
        return True

    def _end_value(self) -> None:
        self._arguments.end()
        self.in_value = False

    def _end(self) -> None:
        text = "".join(self._between).strip()
        if self._arguments.close(text):
            self._between.clear()
        self._events.append(CallEnd(self._index))
        self.has_ended = True
        self._set_aside()
        self._deliver_strays()

    def _set_aside(self) -> None:
        text = "".join(self._between)
        self._between.clear()
        if text.strip():
            self._strays.append(text)

    def _deliver_strays(self) -> None:
        for text in self._strays:
            self._note(f"text stood between the parameters of call {self._name}")
            self._events.append(self._piece(text))

    def _emit(self, text: str) -> None:
        self._events.append(CallArguments(self._index, text))

    def _note(self, text: str) -> None:
        self._events.append(Note(text))
