"""Messages of a conversation: who speaks, what is said and thought, which tools are offered and called.

These are the values that ``encode`` writes into a prompt and that ``parse`` reads out of a completion. Nothing here
knows how a message is spelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from dsv4.text.tokens import TASKS

Role = Literal["system", "developer", "user", "assistant", "tool", "latest_reminder", "direct_search_results"]

ROLES: tuple[str, ...] = get_args(Role)
TASK_ROLES = ("user", "developer", "assistant")
KEYS = ("role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id", "tools", "response_format",
        "task", "wo_eos", "mask")  # fmt: skip
"""Keys of a released message; ``mask`` is about training and has no place in a prompt."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call: the tool's name, its arguments as JSON text just as they were given, and the id its result answers."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool on offer: the ``function`` object of the OpenAI format, which the prompt shows as it is.

    Raises ``ValueError`` if it has no name, or parameters that are no mapping.
    """

    function: Mapping[str, Any]

    def __post_init__(self) -> None:
        name = self.function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"a tool's name is {name!r}; expected a text that is not empty")
        if not isinstance(self.function.get("parameters") or {}, Mapping):
            raise ValueError(f"parameters of tool {name} are {self.function['parameters']!r}; expected a JSON schema")

    @property
    def name(self) -> str:
        return self.function["name"]

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The JSON schema of the arguments, empty if the tool has none."""
        return self.function.get("parameters") or {}

    @property
    def is_strict(self) -> bool:
        """Whether the caller asks for arguments that fit the schema without fail."""
        return self.function.get("strict") is True

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schemas of the single parameters by name, empty if the schema lists none."""
        properties = self.parameters.get("properties")
        return properties if isinstance(properties, Mapping) else {}


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one speaker adds to a conversation. Raises ``ValueError`` for a field that its role cannot have.

    ``content`` is a text or blocks such as ``{"type": "text", "text": ...}``. ``reasoning`` and ``tool_calls`` belong
    to the assistant, ``tool_call_id`` to a tool, ``tools`` and ``response_format`` (a JSON schema) to system and
    developer. ``task`` asks for a quick instruction. ``wo_eos`` leaves an assistant message open, for the model to go
    on with.
    """

    role: Role
    content: str | tuple[Mapping[str, Any], ...] | None = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    tools: tuple[Tool, ...] = ()
    response_format: Mapping[str, Any] | None = None
    task: str | None = None
    wo_eos: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role is {self.role!r}; expected one of {', '.join(ROLES)}")
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        for field, roles in (
            ("reasoning", ("assistant",)),
            ("tool_calls", ("assistant",)),
            ("tool_call_id", ("tool",)),
            ("tools", ("system", "developer")),
            ("response_format", ("system", "developer")),
            ("task", TASK_ROLES),
            ("wo_eos", ("assistant",)),
        ):
            if getattr(self, field) and self.role not in roles:
                raise ValueError(f"{field} of a message with role {self.role}; expected only for {', '.join(roles)}")

    @property
    def text(self) -> str:
        """The content as one text: blocks joined by blank lines, and a mark for those that are no text."""
        return content_text(self.content)


def content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """Join the text blocks by blank lines; other blocks leave ``[Unsupported TYPE]``."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(
        block.get("text") or "" if block.get("type") == "text" else f"[Unsupported {block.get('type')}]"
        for block in content
    )


def message_from_released(released: Mapping[str, Any]) -> Message:
    """Read one message of the released format: OpenAI's, with ``reasoning_content``, ``task`` and the like.

    Raises ``ValueError`` for a key that is not part of it, and for what ``Message`` and ``Tool`` refuse.
    """
    unknown = [key for key in released if key not in KEYS]
    if unknown:
        raise ValueError(f"a message has {', '.join(unknown)}; expected only {', '.join(KEYS)}")
    content = released.get("content")
    return Message(
        role=cast(Role, released.get("role")),
        content=tuple(content) if isinstance(content, list) else content,
        reasoning=released.get("reasoning_content", released.get("reasoning")),
        tool_calls=tuple(_call(call) for call in released.get("tool_calls") or ()),
        tool_call_id=released.get("tool_call_id"),
        tools=tuple(Tool(function=_function(tool)) for tool in released.get("tools") or ()),
        response_format=released.get("response_format"),
        task=released.get("task"),
        wo_eos=bool(released.get("wo_eos")),
    )


def _call(call: Mapping[str, Any]) -> ToolCall:
    function = _function(call)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise ValueError(f"a tool call has name {name!r} and arguments {arguments!r}; expected two texts")
    return ToolCall(name=name, arguments=arguments, id=call.get("id") or "")


def _function(item: Mapping[str, Any]) -> Mapping[str, Any]:
    function = item.get("function")
    if not isinstance(function, Mapping):
        raise ValueError(f"function of a tool or tool call is {function!r}; expected an object")
    return function
