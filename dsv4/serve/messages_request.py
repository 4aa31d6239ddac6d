"""What clients of Anthropic's Messages API ask, and the turn that it becomes.

Conversations come as blocks. What a message says is the text of its blocks with blank lines between them; tool results
go before the text of the same message. Pictures, files and whatever else the model cannot read leave a mark; what other
servers did on their own side (their searches, thinking that is encrypted) is left out, and so are tools of that kind.
System messages in the middle of a conversation are text of the user's.

Whoever does not ask for thinking gets none, under every model name: that is what these clients expect, who often allow
an answer only a few tokens. (DeepSeek's own endpoint thinks by default.) How much to think is ``output_config.effort``;
``budget_tokens`` says nothing to this model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from dsv4.serve.errors import ApiError
from dsv4.serve.schema import (
    MAX_STOPS,
    Count,
    Function,
    Loose,
    Share,
    Temperature,
    Text,
    ToolName,
    User,
    check_choice,
    json_schema_format,
    kind_of,
    sampling_of,
    tools_of,
)  # fmt: skip
from dsv4.serve.turn import AnswerFormat, ToolChoice, Turn
from dsv4.text.message import Message, ToolCall, content_text

IGNORED = frozenset({
    "anthropic_beta", "anthropic_version", "betas", "billing_policy", "cache_control", "compaction", "container",
    "context_management", "diagnostics", "fallback_credit_token", "fallbacks", "inference_geo", "mcp_servers",
    "service_tier", "speed", "thread", "user_profile_id", "workspace_id",
})  # fmt: skip
"""Fields about a hosted service, which this server has no use for. Others that it does not know are refused."""

BILLING = "x-anthropic-billing-header:"
"""How a block begins that Claude Code puts first into the system prompt, for its maker's billing. It changes with every
request; left in, no two prompts would begin alike."""


class TextBlock(Loose):
    type: Literal["text"]
    text: str


class ThinkingBlock(Loose):
    """The signature is not looked at: the conversation may have begun at another server."""

    type: Literal["thinking"]
    thinking: str


class ToolUse(Loose):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, JsonValue]


class Source(Loose):
    type: str
    data: str = ""


class Document(Loose):
    """Only plain text can be read."""

    type: Literal["document"]
    source: Source
    title: str | None = None


class SearchResult(Loose):
    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]


class OtherBlock(Loose):
    type: str


def _kind(block: Any) -> str:
    kind = kind_of(block)
    return kind if kind in KINDS else "other"


def _as_blocks(content: Any) -> Any:
    """A text stands for one block."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_result(content: Any) -> Any:
    return [] if content is None else _as_blocks(content)


Shown = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[Document, Tag("document")]
    | Annotated[SearchResult, Tag("search_result")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(lambda block: "other" if _kind(block) in ("thinking", "tool_use", "tool_result") else _kind(block)),
]


class ToolResult(Loose):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: Annotated[list[Shown], BeforeValidator(_as_result), Field(default_factory=list)]
    is_error: bool | None = None


KINDS = ("text", "thinking", "tool_use", "tool_result", "document", "search_result")
Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUse, Tag("tool_use")]
    | Annotated[ToolResult, Tag("tool_result")]
    | Annotated[Document, Tag("document")]
    | Annotated[SearchResult, Tag("search_result")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(_kind),
]


class InputMessage(Loose):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_as_blocks)]


class ClientTool(Loose):
    name: ToolName
    description: str | None = None
    input_schema: dict[str, JsonValue]
    strict: bool | None = None


def _client_tools(tools: Any) -> Any:
    """Leave out tools that a hosted server runs or a hosted model was trained on: their ``type`` says all there is."""
    if not isinstance(tools, list):
        return tools
    return [tool for tool in tools if not isinstance(tool, Mapping) or tool.get("type") in (None, "custom")]


class Choice(Loose):
    """disable_parallel_tool_use: the answer ends after its first tool call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Loose):
    """Any type but ``disabled`` lets the model think. display: ``omitted`` keeps its thoughts from the client."""

    type: Literal["enabled", "disabled", "adaptive", "auto", "between_tools"]
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Loose):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, JsonValue], Field(alias="schema")]


class OutputConfig(Loose):
    effort: str | None = None
    format: OutputFormat | None = None


class Metadata(Loose):
    user_id: User | None = None


class CountRequest(BaseModel):
    """What a prompt is made of. output_format: an older place of ``output_config.format``."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: Annotated[list[TextBlock] | None, BeforeValidator(_as_blocks)] = None
    tools: Annotated[list[ClientTool] | None, BeforeValidator(_client_tools)] = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    metadata: Metadata | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, given: Any) -> Any:
        return {key: given[key] for key in given if key not in IGNORED} if isinstance(given, dict) else given


class MessagesRequest(CountRequest):
    """A message that is to be answered, in ``max_tokens`` tokens with the thinking."""

    max_tokens: Count
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None


def turn_of(request: MessagesRequest) -> Turn:
    """What a request asks for."""
    return replace(
        prompt_turn(request), stop=tuple(request.stop_sequences or ()),
        sampling=sampling_of(
            max_tokens=request.max_tokens, temperature=request.temperature, top_p=request.top_p, top_k=request.top_k
        ),
    )  # fmt: skip


def prompt_turn(request: CountRequest) -> Turn:
    """The turn whose prompt is to be counted: all but how its tokens are chosen. An ``ApiError`` if it is none."""
    choice, config = request.tool_choice, request.output_config or OutputConfig()
    tools = tools_of([_function(tool) for tool in request.tools or ()])
    wanted = config.format or request.output_format
    answer = AnswerFormat() if wanted is None else json_schema_format(wanted.schema_)
    messages = _messages(request)
    if messages[-1].role == "assistant" and wanted is not None:
        raise ApiError(400, "messages: the last is the assistant's, which JSON cannot go on from; expected the user's")
    return Turn(
        messages=messages, tools=tools, tool_choice=check_choice(_choice(choice), tools), answer=answer,
        thinking=request.thinking is not None and request.thinking.type != "disabled", effort=config.effort or "high",
        one_call=choice is not None and choice.disable_parallel_tool_use,
        user=(request.metadata and request.metadata.user_id) or "",
    )  # fmt: skip


def _function(tool: ClientTool) -> Function:
    given = tool.model_dump(exclude_unset=True)
    given["parameters"] = given.pop("input_schema")
    return Function.model_validate({key: given[key] for key in Function.model_fields if key in given})


def _choice(choice: Choice | None) -> ToolChoice:
    if choice is None or choice.type in ("auto", "none"):
        return ToolChoice(kind="none" if choice is not None and choice.type == "none" else "auto")
    if choice.type == "any":
        return ToolChoice(kind="required")
    if not choice.name:
        raise ApiError(400, "tool_choice.name: Field required")
    return ToolChoice(kind="named", name=choice.name)


def _messages(request: CountRequest) -> tuple[Message, ...]:
    """The conversation: the system's message if there is one, then turns, each of which makes one or more."""
    turns = _merged(request.messages)
    system = [*(request.system or ()), *(turns.pop(0)[2] if turns and turns[0][1] == "system" else ())]
    said = tuple(_shown(block) for block in system if not _is_billing(block))
    found = [Message(role="system", content=said)] if said else []
    for i, (place, role, blocks) in enumerate(turns):
        if role == "assistant":
            found += _assistant(place, blocks, is_last=i == len(turns) - 1)
        else:
            found += _user(place, blocks)
    if not found or found[-1].role == "system":
        raise ApiError(400, "messages has none of the user; expected one")
    return tuple(found)


def _merged(messages: Sequence[InputMessage]) -> list[tuple[int, str, list[Block]]]:
    """Messages with their places and roles; those of the assistant that follow one another are one."""
    merged: list[tuple[int, str, list[Block]]] = []
    for place, message in enumerate(messages):
        role = message.role if message.role != "system" or all(one[1] == "system" for one in merged) else "user"
        if merged and role != "user" and merged[-1][1] == role:
            merged[-1][2].extend(message.content)
        else:
            merged.append((place, role, list(message.content)))
    return merged


def _assistant(place: int, blocks: Sequence[Block], *, is_last: bool) -> list[Message]:
    """The assistant's message. The last of a conversation is gone on with, and is none if it is empty."""
    calls, thoughts, texts = [], [], []
    for block in blocks:
        match block:
            case ToolUse():
                arguments = json.dumps(block.input, ensure_ascii=False)
                calls.append(ToolCall(name=block.name, arguments=arguments, id=block.id))
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case TextBlock():
                texts.append(_shown(block))
            case ToolResult():
                raise ApiError(400, f"messages.{place}: a tool_result is the assistant's; expected it from the user")
            case _:  # what another server did
                pass
    if is_last and calls:
        raise ApiError(400, f"messages.{place}: a tool_use is the end; expected its tool_result after it")
    if is_last and not texts:
        return []
    reasoning = "\n\n".join(thoughts) or None
    return [
        Message(role="assistant", content=tuple(texts), reasoning=reasoning, tool_calls=tuple(calls), wo_eos=is_last)
    ]


def _user(place: int, blocks: Sequence[Block]) -> list[Message]:
    """The user's message, after a message for each result of a tool in it."""
    results, said = [], []
    for block in blocks:
        match block:
            case ToolResult():
                text = content_text([_shown(part) for part in block.content])
                text = f"Error: {text}" if block.is_error else text
                results.append(Message(role="tool", tool_call_id=block.tool_use_id, content=text))
            case ToolUse():
                raise ApiError(400, f"messages.{place}: a tool_use is the user's; expected it from the assistant")
            case _:
                said.append(_shown(block))
    if not results and not said:
        raise ApiError(400, f"messages.{place}: user messages must have non-empty content")
    return [*results, *([Message(role="user", content=tuple(said))] if said else [])]


def _shown(block: Block) -> Mapping[str, Any]:
    """A block as prompts have it: its text, or what it is if it cannot be read."""
    match block:
        case TextBlock():
            text = block.text
        case Document() if block.source.type == "text":
            text = block.source.data if block.title is None else f"{block.title}\n\n{block.source.data}"
        case SearchResult():
            text = "\n\n".join([f"{block.title} ({block.source})", *(part.text for part in block.content)])
        case _:
            return {"type": block.type}
    return {"type": "text", "text": text}


def _is_billing(block: Block) -> bool:
    return isinstance(block, TextBlock) and block.text.startswith(BILLING)
