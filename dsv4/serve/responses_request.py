"""What a request of the Responses protocol may say, and the turn that it becomes.

The conversation comes whole with every request, as a list of items. What the assistant thought, said and called are
items of their own; those that follow one another are one message of the prompt. Items and tools of kinds that only the
hosted models have are ignored. ``user`` and ``safety_identifier`` keep prefixes of users apart; ``prompt_cache_key``
does not, since it is a hint, and prefixes are found without one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag

from dsv4.serve.errors import ApiError
from dsv4.serve.schema import (
    Count,
    Function,
    Loose,
    Seed,
    Share,
    Temperature,
    ToolName,
    User,
    check_choice,
    json_schema_format,
    kind_of,
    sampling_of,
    tools_of,
)  # fmt: skip
from dsv4.serve.turn import AnswerFormat, ToolChoice, Turn
from dsv4.text.message import Message, Tool, ToolCall

CUSTOM_INPUT = "input"
"""The one parameter of a custom tool, as the model sees it."""

TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


# ---- items of the conversation ----


class Part(Loose):
    type: str
    text: str | None = None
    refusal: str | None = None


def _parts(content: object) -> object:
    """A text stands for one part, and nothing for none."""
    if content is None:
        return []
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[list[Part], BeforeValidator(_parts)]


class MessageItem(Loose):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class ReasoningItem(Loose):
    """content: what was thought; where a client has the summary alone, that stands for it."""

    type: Literal["reasoning"]
    content: Parts = Field(default_factory=list)
    summary: Parts = Field(default_factory=list)


class CallItem(Loose):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = ""


class CustomCallItem(Loose):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str = ""


class OutputItem(Loose):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Parts


class ReferenceItem(Loose):
    """A place in a conversation that the hosted service keeps, and this one does not."""

    type: Literal["item_reference"]


class OtherItem(Loose):
    type: str


ITEMS = {
    "message": "message", "reasoning": "reasoning", "function_call": "call", "custom_tool_call": "custom_call",
    "function_call_output": "output", "custom_tool_call_output": "output", "item_reference": "reference",
}  # fmt: skip


def _item_kind(item: Any) -> str:
    kind = kind_of(item)
    if kind is None and isinstance(item, dict) and "role" in item:
        return "message"
    return ITEMS.get(kind, "other") if isinstance(kind, str) else "other"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CallItem, Tag("call")]
    | Annotated[CustomCallItem, Tag("custom_call")]
    | Annotated[OutputItem, Tag("output")]
    | Annotated[ReferenceItem, Tag("reference")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_item_kind),
]


def _items(given: object) -> object:
    return [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given


# ---- tools ----


class FunctionTool(Function):
    """A function, whose fields are beside its type."""

    type: Literal["function"]


class CustomFormat(Loose):
    type: str = "text"
    syntax: str | None = None
    definition: str | None = None


class CustomTool(Loose):
    """A tool that takes one text, as it is."""

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


class OtherTool(Loose):
    type: str


def _tool_kind(tool: Any) -> str:
    kind = kind_of(tool)
    return kind if kind in ("function", "custom") else "other"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[OtherTool, Tag("other")],
    Discriminator(_tool_kind),
]


class AllowedTool(Loose):
    type: str
    name: str = ""


class Choice(Loose):
    """A word; or one tool that must be called, or several of which it may be."""

    type: Literal["auto", "none", "required", "function", "custom", "allowed_tools"]
    name: str = ""
    mode: Literal["auto", "required"] = "auto"
    tools: list[AllowedTool] = Field(default_factory=list)

    @property
    def echo(self) -> str | dict[str, JsonValue]:
        """The choice as it was written."""
        is_word = self.type in ("auto", "none", "required")
        return self.type if is_word else self.model_dump(mode="json", exclude_unset=True)


def _choice(given: object) -> object:
    return {"type": given} if isinstance(given, str) else given


# ---- the request ----


class Reasoning(Loose):
    effort: str | None = None
    summary: str | None = None


class Format(Loose):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Annotated[dict[str, JsonValue] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Loose):
    format: Format | None = None


class ResponsesRequest(Loose):
    """A request. ``background``: answer it for later; ``seed`` is not in OpenAI's protocol."""

    model: str
    input: Annotated[list[Item], BeforeValidator(_items)]
    instructions: str | None = None
    tools: list[AnyTool] | None = None
    tool_choice: Annotated[Choice | None, BeforeValidator(_choice)] = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    seed: Seed | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None
    user: User | None = None
    safety_identifier: User | None = None
    prompt_cache_key: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = None
    conversation: JsonValue = None


def custom_tools(request: ResponsesRequest) -> frozenset[str]:
    """The names of the tools that take a text."""
    return frozenset(tool.name for tool in request.tools or () if isinstance(tool, CustomTool))


def turn_of(request: ResponsesRequest, *, thinks_by_default: bool = True) -> Turn:
    """What a request asks for; an ``ApiError`` for what cannot be had here."""
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name) is not None:
            raise ApiError(
                400, f"{name} is given, but no conversations are kept here; expected all of it in input", param=name
            )
    tools, choice = _offer(tools_of([_function(tool) for tool in request.tools or () if _is_own(tool)]), request)
    effort = None if request.reasoning is None else request.reasoning.effort
    return Turn(
        messages=_messages(request), tools=tools, tool_choice=check_choice(choice, tools),
        one_call=request.parallel_tool_calls is False,
        thinking=thinks_by_default if effort is None else effort != "none",
        effort=effort if effort not in (None, "none") else "high", answer=_format(request.text),
        user=request.safety_identifier or request.user or "",
        sampling=sampling_of(
            max_tokens=request.max_output_tokens, temperature=request.temperature, top_p=request.top_p,
            seed=request.seed,
        ),
    )  # fmt: skip


def _is_own(tool: FunctionTool | CustomTool | OtherTool) -> bool:
    return not isinstance(tool, OtherTool)


def _function(tool: FunctionTool | CustomTool | OtherTool) -> Function:
    """A tool as the prompt shows it."""
    if isinstance(tool, FunctionTool):
        return Function.model_validate(tool.model_dump(exclude_unset=True, exclude={"type"}))
    assert isinstance(tool, CustomTool), f"the tool's type is {tool.type}; expected function or custom"
    wanted, described = tool.format, [tool.description] if tool.description else []
    if wanted is not None and wanted.definition:
        described.append(f"The {CUSTOM_INPUT} follows this {wanted.syntax or 'formal'} grammar:\n{wanted.definition}")
    text: JsonValue = {"type": "string", "description": "The whole input of the tool, as it is."}
    return Function(
        name=tool.name, description="\n\n".join(described),
        parameters={"type": "object", "properties": {CUSTOM_INPUT: text}, "required": [CUSTOM_INPUT]},
    )  # fmt: skip


def _offer(tools: tuple[Tool, ...], request: ResponsesRequest) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that may be called, and whether they must."""
    choice = request.tool_choice
    if choice is None:
        return tools, ToolChoice()
    if choice.type in ("function", "custom"):
        return tools, ToolChoice(kind="named", name=choice.name)
    if choice.type != "allowed_tools":
        return tools, ToolChoice(kind=choice.type)
    allowed = [tool.name for tool in choice.tools if tool.type in ("function", "custom")]
    for name in allowed:
        check_choice(ToolChoice(kind="named", name=name), tools)
    return tuple(tool for tool in tools if tool.name in allowed), ToolChoice(kind=choice.mode)


def _format(options: TextOptions | None) -> AnswerFormat:
    wanted = None if options is None else options.format
    if wanted is None or wanted.type == "text":
        return AnswerFormat()
    if wanted.type == "json_object":
        return AnswerFormat(kind="json_object")
    if wanted.schema_ is None:
        raise ApiError(400, "text.format has no schema; expected a JSON schema", param="text.format")
    return json_schema_format(wanted.schema_)


# ---- items into messages ----


def _messages(request: ResponsesRequest) -> tuple[Message, ...]:
    """The messages of a prompt: items of the assistant, and those of the system, that follow one another are one."""
    given = [message for item in request.input if (message := _message(item)) is not None]
    if not given or given[-1].role == "assistant":
        ends = "has no message" if not given else "ends with what the assistant said"
        raise ApiError(400, f"input {ends}; expected a message or the output of a call at its end", param="input")
    if given[-1].role == "system":  # a prompt is answered after a user's message
        given[-1] = replace(given[-1], role="user")
    found = [Message(role="system", content=request.instructions)] if request.instructions else []
    for message in given:
        if found and message.role == found[-1].role and message.role in ("system", "assistant"):
            found[-1] = _joined(found[-1], message)
        else:
            found.append(message)
    return tuple(found)


def _message(item: Item) -> Message | None:
    """What an item adds to a conversation; None for nothing."""
    if isinstance(item, MessageItem):
        role = "system" if item.role == "developer" else item.role  # the release's developer is not for clients
        return Message(role=role, content=_content(item.content))
    if isinstance(item, ReasoningItem):
        text = _text(item.content) or _text(item.summary)
        return Message(role="assistant", reasoning=text) if text else None
    if isinstance(item, CallItem):
        call = ToolCall(name=item.name, arguments=item.arguments or "{}", id=item.call_id)
        return Message(role="assistant", tool_calls=(call,))
    if isinstance(item, CustomCallItem):
        arguments = json.dumps({CUSTOM_INPUT: item.input}, ensure_ascii=False)
        return Message(role="assistant", tool_calls=(ToolCall(name=item.name, arguments=arguments, id=item.call_id),))
    if isinstance(item, OutputItem):
        return Message(role="tool", content=_content(item.output), tool_call_id=item.call_id)
    if isinstance(item, ReferenceItem):
        raise ApiError(
            400, "input has an item_reference, but no items are kept here; expected the item itself", param="input"
        )
    return None


def _joined(first: Message, second: Message) -> Message:
    return replace(
        first, content=_blocks(first) + _blocks(second), tool_calls=first.tool_calls + second.tool_calls,
        reasoning="\n\n".join(text for text in (first.reasoning, second.reasoning) if text) or None,
    )  # fmt: skip


def _blocks(message: Message) -> tuple[Mapping[str, Any], ...]:
    content = message.content
    if not content or not isinstance(content, str):
        return content or ()
    return ({"type": "text", "text": content},)


def _content(parts: Sequence[Part]) -> tuple[Mapping[str, Any], ...]:
    """Parts as blocks of a message, which marks those that are no text."""
    return tuple(
        {"type": "text", "text": part.text or ""} if part.type in TEXTS
        else {"type": "text", "text": part.refusal or ""} if part.type == "refusal"
        else {"type": part.type}
        for part in parts
    )  # fmt: skip


def _text(parts: Iterable[Part]) -> str:
    return "\n\n".join(part.text for part in parts if part.text)
