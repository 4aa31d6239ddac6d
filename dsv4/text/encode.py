"""A conversation as the prompt that the released models read.

    encode(messages, ...) = BOS + effort + message 0 + transition 0 + message 1 + ...

A message is its text around a few special tokens. A transition stands after a message that the assistant is to answer:
the assistant's token, then ``<think>``, or ``</think>`` where it is not to think (or where its earlier thoughts were
dropped). Before that three passes: tool results become part of a user's turn, results are put in the order of their
calls, and earlier thoughts are dropped unless tools are on offer.

A prompt keeps special tokens apart from text. What people and tools say never becomes a special token, whatever it
spells; roles, tags and the fixed passages do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsv4.text.message import Message, ToolCall
from dsv4.text.passages import RESPONSE_MARK, TOOLS_MARK, Passages
from dsv4.text.tokens import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    EXTRACTED_URL,
    LATEST_REMINDER,
    SPECIAL_TOKENS,
    TASKS,
    THINK,
    USER,
)

KEPT = ("user", "system", "latest_reminder", "direct_search_results")
"""Roles whose messages stay as they are when earlier thoughts are dropped."""

SPECIALS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


@dataclass(frozen=True)
class Special:
    """A special token, by its text."""

    text: str


@dataclass(frozen=True)
class Prompt:
    """Texts and special tokens in order, no two texts next to each other and none empty.

    Each text is to be turned into ids as plain text, each special token into its id; for ordinary text that gives the
    ids of the whole prompt read at once.
    """

    parts: tuple[str | Special, ...]

    @property
    def text(self) -> str:
        """The prompt as one text, special tokens spelled out."""
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A message after the passes: a user's turn holds the text and the tool results that were merged into it."""

    message: Message
    blocks: tuple[Message, ...] = ()

    @property
    def role(self) -> str:
        return self.message.role


@dataclass
class _Writer:
    """Collects parts; texts that follow one another become one."""

    parts: list[str | Special] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)

    def text(self, text: str) -> None:
        if text:
            self.pending.append(text)

    def special(self, token: str) -> None:
        self._flush()
        self.parts.append(Special(token))

    def passage(self, text: str) -> None:
        """Add a fixed text, whose special tokens are meant."""
        start = 0
        for match in SPECIALS.finditer(text):
            self.text(text[start : match.start()])
            self.special(match.group())
            start = match.end()
        self.text(text[start:])

    def template(self, template: str, mark: str, inserted: str) -> None:
        """Add a passage with ``inserted``, which is plain text, at each place that says ``mark``."""
        first, *rest = template.split(mark)
        self.passage(first)
        for passage in rest:
            self.text(inserted)
            self.passage(passage)

    def tag(self, before: str, after: str) -> None:
        self.text(before)
        self.special(DSML)
        self.text(after)

    def prompt(self) -> Prompt:
        self._flush()
        return Prompt(tuple(self.parts))

    def _flush(self) -> None:
        if self.pending:
            self.parts.append("".join(self.pending))
            self.pending.clear()


def encode(
    messages: Sequence[Message],
    *,
    thinking: bool,
    effort: str = "high",
    passages: Passages,
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> Prompt:
    """Write a conversation as a prompt, which ends where the assistant is to go on.

    ``effort`` is a word of ``passages.mapping``; it matters only while thinking. ``drop_thinking`` leaves out what the
    assistant thought before the last user's turn, and developer messages before it; no thought is dropped where a
    message offers tools. A user's message right after a user's or a tool's joins it (and brings its task along).
    Raises ``ValueError`` for an effort without a level, a role that no prompt can hold, or an empty developer message.
    """
    prefix = passages.effort_prefix(effort)
    dropping = drop_thinking and not any(message.tools for message in messages)
    turns = _order_results(_merge(messages))
    if thinking and dropping:
        turns = _drop_thoughts(turns)
    asked = _last_question(turns)
    writer = _Writer()
    if add_bos:
        writer.special(BOS)
    if thinking and turns:
        writer.passage(prefix)
    for i, turn in enumerate(turns):
        # A turn that answers a task has no thoughts; one whose thoughts were dropped looks as if it never had any.
        before_task = i > 0 and turns[i - 1].message.task is not None
        thinks = thinking and (not dropping or i > asked) and not before_task
        _write(writer, turn, passages, thinks=thinks)
        if i + 1 == len(turns) or turns[i + 1].role in ("assistant", "latest_reminder"):
            _write_transition(writer, turn.message, thinking=thinking, opens=thinking and (not dropping or i >= asked))
    return writer.prompt()


def assistant_text(message: Message, *, thinking: bool) -> Prompt:
    """What a model has to write for an assistant's message: from after ``<think>`` or ``</think>`` to EOS, included.

    Raises ``ValueError`` if the message is not the assistant's.
    """
    if message.role != "assistant":
        raise ValueError(f"the message's role is {message.role}; expected assistant")
    writer = _Writer()
    _write_assistant(writer, message, thinks=thinking)
    return writer.prompt()


def to_json(value: object) -> str:
    """JSON as prompts have it: one line, a blank after ``,`` and ``:``, letters of all scripts as they are."""
    return json.dumps(value, ensure_ascii=False)


def _merge(messages: Sequence[Message]) -> list[_Turn]:
    turns: list[_Turn] = []
    for message in messages:
        last = turns[-1] if turns else None
        if message.role not in ("user", "tool"):
            turns.append(_Turn(message=message))
        elif last is not None and last.role == "user" and (message.role == "tool" or last.message.task is None):
            whole = replace(last.message, task=last.message.task or message.task)
            turns[-1] = _Turn(message=whole, blocks=(*last.blocks, message))
        else:
            turns.append(_Turn(message=Message(role="user", task=message.task), blocks=(message,)))
    return turns


def _order_results(turns: list[_Turn]) -> list[_Turn]:
    """Put tool results in the order of the latest calls; a result whose id is not among them counts as the first."""
    ordered, places = [], {}
    for turn in turns:
        if turn.message.tool_calls:
            places = {call.id: place for place, call in enumerate(turn.message.tool_calls) if call.id}
        if places and turn.blocks:
            results = [block for block in turn.blocks if block.role == "tool"]
            results = iter(sorted(results, key=lambda block: places.get(block.tool_call_id or "", 0)))
            blocks = tuple(next(results) if block.role == "tool" else block for block in turn.blocks)
            turn = replace(turn, blocks=blocks)
        ordered.append(turn)
    return ordered


def _drop_thoughts(turns: list[_Turn]) -> list[_Turn]:
    asked = _last_question(turns)
    return [turn for i, turn in enumerate(turns) if i >= asked or turn.role in (*KEPT, "assistant")]


def _last_question(turns: Sequence[_Turn]) -> int:
    """The last turn that is answered, or -1."""
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _write(writer: _Writer, turn: _Turn, passages: Passages, *, thinks: bool) -> None:
    message = turn.message
    match message.role:
        case "system":
            writer.text(message.text)
            _write_offers(writer, message, passages)
        case "developer":
            if not message.text:
                raise ValueError("content of a developer message is empty; expected a text")
            writer.special(USER)
            writer.text(message.text)
            _write_offers(writer, message, passages)
        case "user":
            writer.special(USER)
            _write_blocks(writer, turn)
        case "latest_reminder":
            writer.special(LATEST_REMINDER)
            writer.text(message.text)
        case "assistant":
            _write_assistant(writer, message, thinks=thinks)
        case role:
            raise ValueError(f"role is {role}; expected one that a prompt has a place for")


def _write_offers(writer: _Writer, message: Message, passages: Passages) -> None:
    if message.tools:
        writer.text("\n\n")
        schemas = "\n".join(to_json(tool.function) for tool in message.tools)
        writer.template(passages.tools, TOOLS_MARK, schemas)
    if message.response_format:
        writer.text("\n\n")
        writer.template(passages.response_format, RESPONSE_MARK, to_json(message.response_format))


def _write_blocks(writer: _Writer, turn: _Turn) -> None:
    for i, block in enumerate(turn.blocks):
        writer.text("\n\n" if i else "")
        if block.role == "tool":
            writer.text(f"<tool_result>{block.text}</tool_result>")
        elif block.task == "read_url" and EXTRACTED_URL in block.text:
            # The task's own mark before the address: the last one, as whoever asks for the task appends it.
            text, _, address = block.text.rpartition(EXTRACTED_URL)
            writer.text(text)
            writer.special(EXTRACTED_URL)
            writer.text(address)
        else:
            writer.text(block.text)


def _write_assistant(writer: _Writer, message: Message, *, thinks: bool) -> None:
    if thinks:
        writer.text(message.reasoning or "")
        writer.special(END_THINK)
    writer.text(message.text)
    if message.tool_calls:
        writer.tag("\n\n<", "tool_calls>\n")
        for i, call in enumerate(message.tool_calls):
            writer.text("\n" if i else "")
            _write_call(writer, call)
        writer.tag("\n</", "tool_calls>")
    if not message.wo_eos:
        writer.special(EOS)


def _write_call(writer: _Writer, call: ToolCall) -> None:
    writer.tag("<", f'invoke name="{call.name}">\n')
    for i, (key, value) in enumerate(_arguments(call).items()):
        is_string = isinstance(value, str)
        writer.tag("\n<" if i else "<", f'parameter name="{key}" string="{"true" if is_string else "false"}">')
        writer.text(value if isinstance(value, str) else to_json(value))
        writer.tag("</", "parameter>")
    writer.tag("\n</", "invoke>")


def _arguments(call: ToolCall) -> Mapping[str, Any]:
    """The arguments by name. What is no JSON object becomes one parameter of the name ``arguments``."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"arguments": call.arguments}


def _write_transition(writer: _Writer, message: Message, *, thinking: bool, opens: bool) -> None:
    if message.task == "action":
        writer.special(ASSISTANT)
        writer.special(THINK if thinking else END_THINK)
        writer.special(TASKS["action"])
    elif message.task is not None:
        writer.special(TASKS[message.task])
    elif message.role in ("user", "developer"):
        writer.special(ASSISTANT)
        writer.special(THINK if opens else END_THINK)
