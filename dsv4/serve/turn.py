"""One turn of a conversation, which the request of every protocol becomes, and what is told of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv4.config.sampling import Sampling
from dsv4.engine.sample import LogProbabilities
from dsv4.text.events import CallArguments, CallEnd, Content, Note, Reasoning
from dsv4.text.message import Message, Tool

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """Whether the answer may call tools: ``auto``, ``none``, ``required``, or the tool of this ``name``."""

    kind: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """What the content of the answer must be: ``text``, any ``json_object``, or JSON of a ``schema``."""

    kind: Literal["text", "json_object", "json_schema"] = "text"
    schema: Mapping[str, Any] = field(default_factory=dict)


AUTO, ANY = ToolChoice(), AnswerFormat()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What is asked. stop: strings before which the content ends; they do not end the thinking.

    effort: as the client says it; the checkpoint's table says what it means. user: prefixes are shared among the turns
    of one user alone. one_call: the answer ends after its first tool call. An assistant message at the end, with
    ``wo_eos``, is gone on with.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = AUTO
    one_call: bool = False
    thinking: bool = True
    effort: str = "high"
    answer: AnswerFormat = ANY
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    user: str = ""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a turn; ``num_cached`` of the prompt were found, ``num_reasoning`` of the output were thinking."""

    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    num_reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Of several answers to one prompt, which counts once."""
        return Usage(
            num_prompt=max(self.num_prompt, other.num_prompt), num_cached=max(self.num_cached, other.num_cached),
            num_output=self.num_output + other.num_output, num_reasoning=self.num_reasoning + other.num_reasoning,
        )  # fmt: skip


@dataclass(frozen=True)
class CallBegun:
    """A tool call begins. id: the server's name for it, by which its result comes back."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of the tokens that follow, if they were asked for."""

    tokens: tuple[tuple[int, LogProbabilities], ...]
    is_reasoning: bool


@dataclass(frozen=True)
class Ended:
    """The answer is whole. stop: the string that ended it, if one did."""

    reason: Reason
    usage: Usage
    stop: str | None = None


Told = Reasoning | Content | CallBegun | CallArguments | CallEnd | Note | Scored | Ended
