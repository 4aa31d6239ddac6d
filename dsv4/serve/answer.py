"""The tokens of an answer, as they come, into what is told of it: thinking, content, calls, and the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dsv4.engine.outputs import Piece
from dsv4.engine.text import Detokenizer, StopFinder
from dsv4.serve.turn import CallBegun, Ended, Reason, Scored, Told, Usage
from dsv4.text.events import CallBegin, CallEnd, Content, Event, Reasoning
from dsv4.text.message import Tool
from dsv4.text.parse import Parser


class AnswerReader:
    """Reads the pieces of one answer.

    thinking: the prompt has opened the thinking. end_think: the token that ends it. stop: strings before which the
    content ends. one_call: end after the first call. num_prompt: tokens of the prompt. new_id: makes names for calls.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        thinking: bool,
        end_think: int,
        eos: int,
        tools: Sequence[Tool],
        stop: Sequence[str],
        one_call: bool,
        num_prompt: int,
        new_id: Callable[[], str],
    ) -> None:
        self._detokenizer, self._parser = detokenizer, Parser(thinking=thinking, tools=tools or None)
        self._is_thinking, self._end_think, self._eos = thinking, end_think, eos
        self._stop, self._stops = stop, StopFinder(stop) if stop else None
        self._one_call = one_call
        self._new_id, self._num_prompt = new_id, num_prompt
        self._num_output = self._num_reasoning = 0
        self._reasoning: list[str] = []
        self.call_ids: list[str] = []
        self._has_called = False  # a call is whole
        self.is_done = False

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def read(self, piece: Piece, num_cached: int) -> list[Told]:
        """Return what a piece tells. After ``Ended``, ``is_done``: what the engine still gives is not wanted."""
        return list(self._read(piece, num_cached))

    def _read(self, piece: Piece, num_cached: int) -> Iterator[Told]:
        yield from self._count(piece)
        text = self._detokenizer.push(token for token in piece.token_ids if token != self._eos)
        events = self._parser.push(text) if text else []
        if piece.finish is not None:
            held = self._detokenizer.flush()
            events = [*events, *(self._parser.push(held) if held else [])]
            events += self._parser.finish(cut=piece.finish == "length")
        for event in events:
            yield from self._tell(event)
            if self._stops is not None and self._stops.found is not None:
                yield self._ended("stop", num_cached, self._stops.found)
                return
            if self._one_call and isinstance(event, CallEnd):
                yield self._ended("tool_calls", num_cached, None)
                return
        if piece.finish is not None:
            if self._stops is not None and (rest := self._stops.flush()):
                yield Content(rest)
            reason: Reason = "length" if piece.finish == "length" else "tool_calls" if self._has_called else "stop"
            yield self._ended(reason, num_cached, None)

    def _count(self, piece: Piece) -> Iterator[Scored]:
        """Count the tokens, and yield their log-probabilities apart for thinking and content."""
        ids = piece.token_ids
        num_thinking = 0
        if self._is_thinking:
            ends = self._end_think in ids
            num_thinking = ids.index(self._end_think) + 1 if ends else len(ids)
            self._is_thinking = not ends
        self._num_output += len(ids)
        self._num_reasoning += num_thinking
        if piece.logprobs:
            scored = tuple(zip(ids, piece.logprobs, strict=True))
            for part, is_reasoning in ((scored[:num_thinking], True), (scored[num_thinking:], False)):
                if part:
                    yield Scored(part, is_reasoning)

    def _tell(self, event: Event) -> Iterator[Told]:
        if isinstance(event, CallBegin):
            if self._stops is not None:  # no stop string goes across a call
                if held := self._stops.flush():
                    yield Content(held)
                self._stops = StopFinder(self._stop)
            self.call_ids.append(self._new_id())
            yield CallBegun(event.index, self.call_ids[-1], event.name)
        elif isinstance(event, Content) and self._stops is not None:
            text = self._stops.push(event.text)
            if text:
                yield Content(text)
        else:
            if isinstance(event, Reasoning):
                self._reasoning.append(event.text)
            self._has_called |= isinstance(event, CallEnd)
            yield event

    def _ended(self, reason: Reason, num_cached: int, stop: str | None) -> Ended:
        self.is_done = True
        usage = Usage(
            num_prompt=self._num_prompt, num_cached=num_cached, num_output=self._num_output,
            num_reasoning=self._num_reasoning,
        )  # fmt: skip
        return Ended(reason, usage, stop)
