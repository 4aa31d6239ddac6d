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

NUM_FIRST = 3200
"""So many conversations of training come first, most of them words to say again. Who cannot copy yet learns
little from a look-up: three in a hundred of its tokens are copied, forty of an echo's."""


class Stage(NamedTuple):
    """Shares of the kinds, and of the conversations that show thinking."""

    kinds: Mapping[Kind, float]
    thinking: float


FIRST = Stage({"arithmetic": 0.22, "tools": 0.02, "json": 0.05, "echo": 0.66, "talk": 0.05}, thinking=0.2)
REST = Stage({"arithmetic": 0.55, "tools": 0.11, "json": 0.15, "echo": 0.1, "talk": 0.09}, thinking=0.5)
MAX_EFFORT = 0.15  # share of those with thinking
HARD = 0.6  # share of hard sums, which are asked for with thinking alone
NEW_TURN = 0.5  # the chance that a conversation goes on after a turn
MOST_TURNS = 4
MOST_SUMS = 8
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
    talk = _MAKERS[kind](draw, thinking)
    return Conversation(
        kind=kind, thinking=thinking, effort=effort, messages=tuple(talk.messages), values=tuple(talk.values)
    )


class _Talk:
    """Messages so far. Thoughts begin by saying the question again: what is needed is then near, and in words."""

    def __init__(self, draw: Draw, thinking: bool, *first: Message) -> None:
        self.draw, self.thinking = draw, thinking
        self.messages, self.values = list(first), list[str]()
        self.num_calls = 0

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

    def sum(self, *, is_hard: bool = False) -> None:
        asked = arithmetic.draw_sum(self.draw, is_hard=is_hard)
        reason = f"{asked.text}: {arithmetic.reasoning(asked)}"
        self.user(arithmetic.question(self.draw, asked))
        self.assistant(str(asked.value), reason, str(asked.value))

    def small(self, *, other: bool = True) -> None:
        said = draw_talk(self.draw, other=other)
        self.user(said.question)
        self.assistant(said.answer, f"{said.question} {said.reason}", said.answer)

    def echo(self) -> None:
        echo = draw_echo(self.draw)
        self.user(echo.question)
        self.assistant(echo.answer, echo.reason, echo.answer)

    def goes_on(self, turn: int) -> bool:
        return turn == 0 or (turn < MOST_TURNS and self.draw.chance(NEW_TURN))


def _kind(draw: Draw, stage: Stage) -> Kind:
    at = draw.share()
    for kind, share in stage.kinds.items():
        if at < share:
            return kind
        at -= share
    return next(iter(stage.kinds))  # shares add up to one but for rounding


def _system(draw: Draw) -> tuple[Message, ...]:
    return (Message(role="system", content=draw.choice(SYSTEMS)),) if draw.chance(0.4) else ()


def _arithmetic(draw: Draw, thinking: bool) -> _Talk:
    """Of thinking only the last turn's stays in a conversation: sums before it are answered at once, and easy."""
    talk = _Talk(draw, thinking, *_system(draw))
    for _ in range(draw.below(MOST_SUMS)):
        talk.sum()
    talk.sum(is_hard=draw.chance(HARD) and thinking)
    return talk


def _tools(draw: Draw, thinking: bool) -> _Talk:
    tools = draw_toolbox(draw)
    system = draw.choice(SYSTEMS) if draw.chance(0.5) else ""
    talk, turn = _Talk(draw, thinking, Message(role="system", content=system, tools=tools)), 0
    while talk.goes_on(turn):
        if draw.chance(0.15):
            talk.small(other=False)
        else:
            talk.use(draw_use(draw, tools))
        turn += 1
    return talk


def _json(draw: Draw, thinking: bool) -> _Talk:
    asked = draw_object(draw)
    if asked.schema is None:
        system = _system(draw)
    else:
        content = draw.choice(SYSTEMS) if draw.chance(0.4) else ""
        system = (Message(role="system", content=content, response_format=asked.schema),)
    talk = _Talk(draw, thinking, *system)
    talk.user(asked.question)
    talk.assistant(asked.answer, f"{asked.question} So: {asked.reason}.")
    return talk


def _echo(draw: Draw, thinking: bool) -> _Talk:
    talk, turn = _Talk(draw, thinking, *_system(draw)), 0
    while talk.goes_on(turn):
        talk.echo()
        turn += 1
    return talk


def _small(draw: Draw, thinking: bool) -> _Talk:
    talk, turn = _Talk(draw, thinking, *_system(draw)), 0
    while talk.goes_on(turn):
        talk.small()
        turn += 1
    return talk


_MAKERS: dict[Kind, Callable[[Draw, bool], _Talk]] = {
    "arithmetic": _arithmetic,
    "tools": _tools,
    "json": _json,
    "echo": _echo,
    "talk": _small,
}
