"""A completion back to a message, while it is written and though it may be malformed.

    [reasoning </think>] content [blank line <|DSML|tool_calls> calls </|DSML|tool_calls>] [EOS]

The text comes in pieces of any size, even bytes inside a letter, and the events are the same for every way to cut it:
what may be the beginning of a mark waits until it is known to be one. Nothing is read twice, so the time is linear.

What is repaired, with a note: other names of tags, beginnings or ends that are missing or repeated where the next tag
says what was meant, a think tag before anything is said, calls without a block around them, JSON in place of
parameters, arguments wrapped once more, and a tool block in thoughts that never end. Tags never enter an argument.
Everything else that is out of place is delivered as text, with a note. A call that the text ends in has no end, unless
the tool is known and has all it requires.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Literal

from dsv4.text.call import Call
from dsv4.text.events import Content, Event, Note, Reasoning, message_of
from dsv4.text.markup import Tag, find_mark, read_tag
from dsv4.text.message import Message, Tool
from dsv4.text.tokens import EOS

State = Literal["reasoning", "held", "content", "opening", "block", "call", "rest"]


def parse(text: str, *, thinking: bool, tools: Sequence[Tool] = ()) -> Message:
    """The message that a whole completion is; see ``Parser``."""
    parser = Parser(thinking=thinking, tools=tools)
    return message_of([*parser.push(text), *parser.finish()])


class Parser:
    """Turns the pieces of one completion into events.

    ``thinking`` says that the prompt ended with ``<think>``. ``tools`` are those on offer; if none are given names are
    not checked and wrapped arguments stay wrapped, and with None there are no calls, only text. For a prompt that
    already holds the beginning of the completion, push that first. Consecutive events of a kind belong together and may
    be cut anywhere.
    """

    def __init__(self, *, thinking: bool, tools: Sequence[Tool] | None = ()) -> None:
        self._tools, self._reads_calls = {tool.name: tool for tool in tools or ()}, tools is not None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._had_bytes = False
        self._tail = ""  # what may be EOS, at the end of all text so far
        self._text, self._at = "", 0  # the text that is not dealt with begins at _at
        self._is_all = False
        self._events: list[Event] = []
        self._state: State = "reasoning" if thinking else "content"
        self._is_blank = True  # nothing but spaces since thinking or a block began or ended
        self._spaces: list[str] = []
        self._is_after_block = False
        self._held: list[str] = []  # a tool block in thoughts, or the beginning of one that may be text
        self._is_recovering = False
        self._is_stray = False  # in text between calls
        self._opening: Tag | None = None
        self._call: Call | None = None
        self._num_calls = 0

    def push(self, piece: str | bytes) -> list[Event]:
        """Take the next piece of the completion. Raises ``ValueError`` after ``finish``."""
        if self._is_all:
            raise ValueError(f"push({piece!r}) after finish; expected a new parser")
        if isinstance(piece, str):  # bytes that wait for the rest of a letter wait in vain
            if self._is_plain(piece):
                return [self._piece(piece)]
            text = self._decoder.decode(b"", final=True) + piece
        else:
            text = self._decoder.decode(piece)
            self._had_bytes = True
        return self._take(self._before_eos(text))

    def finish(self, *, cut: bool = False) -> list[Event]:
        """Deliver what was held. The model has stopped; or its text was ``cut``, then nothing missing is guessed."""
        rest = self._tail + self._decoder.decode(b"", final=True)
        self._is_all = True
        events = self._take("" if rest == EOS else rest)
        if self._state == "held" and not cut:
            self._note("a tool block stands in thoughts that do not end")
            self._is_recovering, self._is_blank, self._state = True, False, "content"
            events += self._take("".join(self._held))
        self._finish_state(cut)
        return events + self._flush()

    def _is_plain(self, piece: str) -> bool:
        """Whether a piece is said at once, as most are: nothing waits before it, and it holds no part of a mark."""
        is_free = not (self._had_bytes or self._tail or self._is_blank or self._at < len(self._text))
        is_said = self._state in ("content", "reasoning")
        return is_free and is_said and piece != "" and "<" not in piece and "\n" not in piece

    def _before_eos(self, piece: str) -> str:
        """Hold back what may be EOS at the very end."""
        text = self._tail + piece
        start = text.rfind("<", max(0, len(text) - len(EOS)))
        if start < 0 or not EOS.startswith(text[start:]):
            start = len(text)
        self._tail = text[start:]
        return text[:start]

    def _take(self, text: str) -> list[Event]:
        self._text, self._at = self._text[self._at :] + text, 0
        while found := self._next_tag():
            ON_TAG[self._state](self, *found)
        return self._flush()

    def _num_kept_breaks(self) -> int:
        """How many line breaks before a tag may belong to it: the blank line of a block, the break of a lacking end."""
        if self._state == "call":
            assert self._call
            return 1 if self._call.in_value else 0
        return 2 if self._state in ("reasoning", "content") else 0

    def _flush(self) -> list[Event]:
        events = self._events.copy()
        self._events.clear()
        return events

    def _next_tag(self) -> tuple[str, Tag] | None:
        """Deal with the text before the next tag; that tag and the line breaks kept back before it, or None."""
        while True:
            state = self._state
            start, found = find_mark(self._text, self._at)
            if self._is_all and not found:
                start = stop = len(self._text)
            else:
                stop = start
                num_kept = self._num_kept_breaks()
                while stop > self._at and start - stop < num_kept and self._text[stop - 1] == "\n":
                    stop -= 1
            text = self._text[self._at : stop]
            self._at = stop
            if text:
                self._on_text(text)
            if self._state != state:
                continue
            tag = read_tag(self._text, start, is_all=self._is_all) if found else None
            if tag is None:
                return None
            self._at = start + len(tag.text)
            return self._text[stop:start], tag

    def _on_text(self, text: str) -> None:
        match self._state:
            case "reasoning" | "content":
                self._say(text)
            case "held":
                self._held.append(text)
            case "rest":
                self._events.append(Reasoning(text))
            case "call":
                assert self._call
                self._call.take_text(text)
            case "opening":
                rest = text.lstrip()
                self._held.append(text[: len(text) - len(rest)])
                if rest:
                    self._no_block(rest)
            case "block":
                text = text if self._is_stray else text.lstrip()
                if text and not self._is_stray:
                    self._is_stray = True
                    self._note("text stands between calls")
                if text:
                    self._events.append(self._piece(text))

    def _say(self, text: str) -> None:
        """Deliver thoughts or content; spaces at the beginning wait for what follows them."""
        if not text:
            return
        if self._is_blank and text.isspace():
            self._spaces.append(text)
            return
        if self._is_blank and self._is_after_block:
            self._note("text follows the tool block")
        self._is_blank = False
        self._pour()
        self._events.append(self._piece(text))

    def _pour(self) -> None:
        self._events += [self._piece(space) for space in self._spaces]
        self._spaces.clear()

    def _piece(self, text: str) -> Reasoning | Content:
        return Reasoning(text) if self._state == "reasoning" or self._is_recovering else Content(text)

    def _note(self, text: str) -> None:
        self._events.append(Note(text))

    def _put_back(self, text: str) -> None:
        self._at -= len(text)

    def _begin_content(self, *, is_after_block: bool = False) -> None:
        self._state, self._is_blank, self._is_after_block = "content", True, is_after_block
        self._spaces.clear()

    def _may_open(self, tag: Tag) -> bool:
        """Whether the tag begins a block, or a call of a tool that may exist."""
        is_call = tag.kind == "call" and (not self._tools or tag.name in self._tools)
        return self._reads_calls and not tag.closes and (tag.kind == "block" or is_call)

    def _tag_in_reasoning(self, breaks: str, tag: Tag) -> None:
        if tag.kind == "think" and tag.closes:
            self._say(breaks)
            self._pour()
            self._begin_content()
        elif tag.kind == "think" and self._is_blank:
            self._note("thinking began twice")
            self._spaces.clear()
        elif self._may_open(tag) and (tag.kind == "block" or self._tools):
            self._pour()
            self._held, self._state = [breaks, tag.text], "held"
        else:
            self._say(breaks + tag.text)

    def _tag_in_held(self, _: str, tag: Tag) -> None:
        if tag.kind == "think" and tag.closes:  # so the block was a thought, too
            self._events.append(Reasoning("".join(self._held)))
            self._begin_content()
        else:
            self._held.append(tag.text)

    def _tag_in_content(self, breaks: str, tag: Tag) -> None:
        is_nothing_said = self._is_blank and not self._is_recovering
        if self._may_open(tag):
            if not self._is_after_block:
                self._pour()
            self._spaces.clear()
            if tag.kind == "block":
                self._held, self._state = [breaks, tag.text], "opening"
                self._opening = tag
            else:
                self._note("a call has no tool block around it")
                self._begin_block(tag)
        elif tag.kind == "think" and is_nothing_said:
            self._note("thinking ended twice" if tag.closes else "thinking began after its end")
            self._spaces.clear()
            self._state = "content" if tag.closes else "reasoning"
        elif tag.closes and is_nothing_said and self._is_after_block:
            self._note(f"{tag.text} ends nothing")
        else:
            self._note(f"{tag.text} is out of place; delivered as text")
            self._say(breaks + tag.text)

    def _no_block(self, rest: str) -> None:
        """Take a block's beginning for text, since it is no call that follows, and go on with ``rest``."""
        self._put_back(rest)
        self._note("a tool block begins without a call; delivered as text")
        self._state = "content"
        self._say("".join(self._held))

    def _begin_block(self, tag: Tag) -> None:
        """Enter a block at the tag of a call."""
        self._put_back(tag.text)
        self._state, self._is_stray = "block", False

    def _tag_in_opening(self, _: str, tag: Tag) -> None:
        if tag.kind == "call" and not tag.closes:
            assert self._opening
            self._note_name(self._opening)
            self._begin_block(tag)
        elif tag.kind == "block" and tag.closes:
            self._note("a tool block has no calls")
            self._end_block()
        elif tag.kind == "block":
            self._note("a tool block begins twice")
            self._held.append(tag.text)
        else:
            self._no_block(tag.text)

    def _tag_in_block(self, _: str, tag: Tag) -> None:
        self._is_stray = False
        if tag.kind == "call" and not tag.closes:
            tool = self._tools.get(tag.name)
            if self._tools and tool is None:
                self._note(f"there is no tool {tag.name}")
            self._call = Call(self._events, self._num_calls, tag.name, tool, self._piece)
            self._num_calls += 1
            self._state = "call"
        elif tag.kind == "block" and tag.closes:
            self._note_name(tag)
            self._end_block()
        elif tag.kind in ("parameter", "unknown") and not tag.closes:
            self._note(f"{tag.text} is out of place; delivered as text")
            self._events.append(self._piece(tag.text))
        else:
            self._note(f"{tag.text} is out of place; left out")

    def _tag_in_call(self, breaks: str, tag: Tag) -> None:
        assert self._call
        if not self._call.take_tag(breaks, tag):
            self._put_back(tag.text)
        if self._call.has_ended:
            self._call, self._state, self._is_stray = None, "block", False

    def _tag_in_rest(self, _: str, tag: Tag) -> None:
        self._events.append(Reasoning(tag.text))

    def _end_block(self) -> None:
        if self._is_recovering:  # once; what follows is a thought
            self._state = "rest"
        else:
            self._begin_content(is_after_block=True)

    def _finish_state(self, cut: bool) -> None:
        match self._state:
            case "reasoning":
                self._pour()
                self._note("the text ended in thoughts")
            case "held":
                self._events.append(Reasoning("".join(self._held)))
                self._note("the text ended in thoughts")
            case "content":
                if not self._is_after_block:
                    self._pour()
            case "opening":
                self._no_block("")
                self._pour()
            case "call":
                assert self._call
                self._call.stop(is_cut=cut)
            case "block":
                self._note("a tool block has no end")

    def _note_name(self, tag: Tag) -> None:
        if not tag.is_exact:
            self._note(f"{tag.text} is no name of a {tag.kind}")


ON_TAG: dict[State, Callable[[Parser, str, Tag], None]] = {
    "reasoning": Parser._tag_in_reasoning,
    "held": Parser._tag_in_held,
    "content": Parser._tag_in_content,
    "opening": Parser._tag_in_opening,
    "block": Parser._tag_in_block,
    "call": Parser._tag_in_call,
    "rest": Parser._tag_in_rest,
}
