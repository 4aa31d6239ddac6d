"""Conversations the project makes itself: arithmetic, look-ups with tools, strict JSON, small talk. No torch.

A conversation is a function of (side, index). What the side ``validation`` asks for, numbers, names and names of
tools, no conversation of the side ``train`` shows (``draw``): they share the tables of one digit, and small talk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from dsv4.data.conversations import arithmetic
from dsv4.data.conversations.draw import Draw
from dsv4.data.conversations.echo import draw_echo
from dsv4.data.conversations.objects import draw_object
from dsv4.data.conversations.talk import draw_talk
from dsv4.data.conversations.tools import Use, draw_toolbox, draw_use
from dsv4.data.split import Split
from dsv4.text.message import Message, ToolCall

Kind = Literal["arithmetic", "tools", "json", "echo", "talk"]
KINDS: tuple[Kind, ...] = get_args(Kind)

VERSION = 1  # of the conversations: a change of any of them raises it

NUM_FIRST = 3000
"""So many conversations of training come first, most of them one or two words to say again. Who cannot copy yet learns
little from a look-up: three in a hundred of its tokens are copied, forty of an echo's."""


class Stage(NamedTuple):
    """Shares of the kinds, and of the conversations that show thinking; words to say again at once, at most."""

    kinds: Mapping[Kind, float]
    thinking: float
    most_words: int


FIRST = Stage({"arithmetic": 0.08, "tools": 0.01, "json": 0.04, "echo": 0.83, "talk": 0.04}, thinking=0.1, most_words=2)
REST = Stage({"arithmetic": 0.58, "tools": 0.09, "json": 0.12, "echo": 0.12, "talk": 0.09}, thinking=0.5, most_words=6)
MAX_EFFORT = 0.15  # share of those with thinking
NEW_TURN = 0.5  # the chance that a conversation goes on after a turn
MOST_TURNS = 4
NO_CALL = 0.15  # share of turns that need no tool though there are some
SYSTEMS = ("You are a helpful assistant.", "You are dsv4, a small model.", "Answer in a few words.", "Be brief.")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """messages: the last is the assistant's. values: for each message of the assistant, what its content must hold;
    empty where that is not a matter of a word (tool calls, JSON).
    """

    kind: Kind
    thinking: bool
    effort: str
    messages: tuple[Message, ...]
    values: tuple[str, ...]


def conversation(
    side: Split, index: int, held_out: float, kind: Kind | None = None, *, thinking: bool | None = None
) -> Conversation:
    """Return a conversation. held_out: share of facts on the side ``validation``; kind, thinking: drawn, if None.

    Training is meant to see them in the order of their indices.

    Raises ``ValueError`` if ``held_out`` leaves one of the sides without facts.
    """
    draw = Draw(side, index, held_out)
    stage = FIRST if side == "train" and index < NUM_FIRST else REST
    kind = _kind(draw, stage) if kind is None else kind
    # Drawn in any case, so that what is asked is the same with thinking and without.
    thinks, hard = draw.chance(stage.thinking), draw.chance(MAX_EFFORT)
    thinking = thinks if thinking is None else thinking
    effort = "max" if thinking and hard else "high"
    talk = _Talk(draw, thinking, stage.most_words)
    _MAKERS[kind](talk)
    return Conversation(
        kind=kind, thinking=thinking, effort=effort, messages=tuple(talk.messages), values=tuple(talk.values)
    )


class _Talk:
    """Messages so far. Thoughts begin by saying the question again: what is needed is then near, and in words."""

    def __init__(self, draw: Draw, thinking: bool, most_words: int) -> None:
        self.draw, self.thinking, self.most_words = draw, thinking, most_words
        self.messages, self.values = list[Message](), list[str]()
        self.num_calls = 0

    def begin(self, *first: Message) -> None:
        self.messages += first

    def num_turns(self) -> int:
        turns = 1
        while turns < MOST_TURNS and self.draw.chance(NEW_TURN):
            turns += 1
        return turns

    def user(self, text: str) -> None:
        self.messages.append(Message(role="user", content=text))

    def assistant(self, text: str, reason: str, value: str = "", calls: tuple[ToolCall, ...] = ()) -> None:
        reasoning = reason if self.thinking else None
        self.messages.append(Message(role="assistant", content=text, reasoning=reasoning, tool_calls=calls))
        self.values.append(value)

    def use(self, use: Use) -> None:
        """Question, call, result, answer."""
        self.user(use.question)
        reason = " ".join([f"{use.question} {use.tool}:", *use.arguments.values()])
        call = ToolCall(name=use.tool, arguments=use.arguments_text, id=f"call_{self.num_calls}")
        self.num_calls += 1
        self.assistant("", f"{reason}.", calls=(call,))
        self.messages.append(Message(role="tool", content=use.result, tool_call_id=call.id))
        self.assistant(use.answer, f"It gives {use.result}.", use.value)

    def sum(self) -> None:
        """Of what is not in the tables the working is shown: as a thought, or without thinking in the answer."""
        asked = arithmetic.draw_sum(self.draw)
        working, result = arithmetic.working(asked), str(asked.value)
        self.user(arithmetic.question(self.draw, asked))
        if not self.thinking and not asked.is_table:
            result = f"{asked.text} = {result}"
            self.assistant(f"{working} {result}", working, result)
        else:
            self.assistant(result, working, result)

    def small(self, *, other: bool = True) -> None:
        said = draw_talk(self.draw, other=other)
        self.user(said.question)
        self.assistant(said.answer, f"{said.question} {said.reason}", said.answer)

    def echo(self) -> None:
        echo = draw_echo(self.draw, self.most_words)
        self.user(echo.question)
        self.assistant(echo.answer, echo.reason, echo.answer)


def _kind(draw: Draw, stage: Stage) -> Kind:
    at = draw.share()
    for kind, share in stage.kinds.items():
        if at < share:
            return kind
        at -= share
    return next(iter(stage.kinds))  # shares add up to one but for rounding


def _system(draw: Draw) -> tuple[Message, ...]:
    return (Message(role="system", content=draw.choice(SYSTEMS)),) if draw.chance(0.4) else ()


def _arithmetic(talk: _Talk) -> None:
    """With thinking a single sum: of earlier turns no thought would be left, and they would teach to guess."""
    talk.begin(*_system(talk.draw))
    for _ in range(1 if talk.thinking else talk.num_turns()):
        talk.sum()


def _tools(talk: _Talk) -> None:
    draw, tools = talk.draw, draw_toolbox(talk.draw)
    talk.begin(Message(role="system", content=draw.choice(SYSTEMS) if draw.chance(0.5) else "", tools=tools))
    for _ in range(talk.num_turns()):
        if draw.chance(NO_CALL):
            talk.small(other=False)
        else:
            talk.use(draw_use(draw, tools))


def _json(talk: _Talk) -> None:
    draw, asked = talk.draw, draw_object(talk.draw)
    if asked.schema is None:
        talk.begin(*_system(draw))
    else:
        content = draw.choice(SYSTEMS) if draw.chance(0.4) else ""
        talk.begin(Message(role="system", content=content, response_format=asked.schema))
    talk.user(asked.question)
    talk.assistant(asked.answer, f"{asked.question} So: {asked.reason}.")


def _echo(talk: _Talk) -> None:
    talk.begin(*_system(talk.draw))
    for _ in range(talk.num_turns()):
        talk.echo()


def _small(talk: _Talk) -> None:
    talk.begin(*_system(talk.draw))
    for _ in range(talk.num_turns()):
        talk.small()


_MAKERS: dict[Kind, Callable[[_Talk], None]] = {
    "arithmetic": _arithmetic,
    "tools": _tools,
    "json": _json,
    "echo": _echo,
    "talk": _small,
}
