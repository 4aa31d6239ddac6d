"""``/chat/completions``: the protocol of OpenAI and DeepSeek, whose thinking is ``reasoning_content``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

from pydantic import Field, JsonValue

from dsv4.engine.sample import LogProbabilities
from dsv4.serve.answer_text import Collected, all_of, collect
from dsv4.serve.errors import ApiError
from dsv4.serve.respond import dumps, event
from dsv4.serve.schema import (
    Count,
    Function,
    FunctionTool,
    Loose,
    OpenAIRequest,
    check_choice,
    json_schema_format,
    num_logprobs,
    tools_of,
)  # fmt: skip
from dsv4.serve.service import Prepared, Service
from dsv4.serve.token_text import token_text
from dsv4.serve.turn import (
    AnswerFormat,
    CallBegun,
    Ended,
    Scored,
    Told,
    ToolChoice,
    Turn,
    Usage,
)  # fmt: skip
from dsv4.text.events import CallArguments, Content, Reasoning
from dsv4.text.message import Message, Role, ToolCall

Item = tuple[int, Sequence[Told]]


class CalledFunction(Loose):
    name: str
    arguments: str = "{}"


class Called(Loose):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Part(Loose):
    type: str
    text: str | None = None


class ChatMessage(Loose):
    """reasoning: another name of ``reasoning_content``. prefix: an assistant message that is to be gone on with."""

    role: Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None
    prefix: bool = False
    task: Literal["action", "query", "authority", "domain", "title", "read_url"] | None = None


class Thinking(Loose):
    type: Literal["enabled", "disabled"] = "enabled"


class TemplateOptions(Loose):
    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


class JsonSchema(Loose):
    name: str = "answer"
    schema_: Annotated[dict[str, JsonValue] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Loose):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class NamedFunction(Loose):
    name: str


class NamedTool(Loose):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(OpenAIRequest):
    """A chat request. ``thinking``, ``reasoning_effort`` and ``chat_template_kwargs`` say whether and how it thinks."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    thinking: Thinking | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def turn_of(request: ChatRequest, *, thinks_by_default: bool = True) -> Turn:
    """What a chat request asks for."""
    thinking, effort = _thinking(request, thinks_by_default)
    functions: Sequence[Function] = [tool.function for tool in request.tools or ()]
    tools = tools_of(functions)
    return Turn(
        messages=tuple(_message(one, i == len(request.messages) - 1) for i, one in enumerate(request.messages)),
        tools=tools, tool_choice=check_choice(_choice(request), tools), thinking=thinking, effort=effort,
        one_call=not request.parallel_tool_calls,
        answer=_format(request.response_format), stop=request.stops,
        user=request.owner,
        sampling=request.sampling(
            max_tokens=request.max_completion_tokens or request.max_tokens,
            logprobs=num_logprobs(request.logprobs, request.top_logprobs),
        ),
    )  # fmt: skip


def _thinking(request: ChatRequest, by_default: bool) -> tuple[bool, str]:
    """Whether to think and how hard: the request's own fields before those of the template."""
    options = request.chat_template_kwargs or TemplateOptions()
    asked = options.thinking if options.thinking is not None else options.enable_thinking
    thinking = by_default if asked is None else asked
    effort = request.reasoning_effort or options.reasoning_effort
    if effort is not None:
        thinking = effort != "none"
    if request.thinking is not None:
        thinking = request.thinking.type == "enabled"
    return thinking, effort if effort not in (None, "none") else "high"


def _message(message: ChatMessage, is_last: bool) -> Message:
    if message.role == "developer":  # OpenAI's newer word for system; the release's developer is not for clients
        message = message.model_copy(update={"role": "system"})
    if message.role == "assistant" and message.content is None and not message.tool_calls:
        raise ApiError(400, "an assistant message has neither content nor tool_calls; expected one", param="messages")
    if message.prefix and not (is_last and message.role == "assistant"):
        raise ApiError(400, "prefix is for an assistant message at the end; expected it nowhere else", param="messages")
    content = message.content
    if isinstance(content, list):
        content = tuple(part.model_dump() for part in content)
    calls = tuple(
        ToolCall(name=call.function.name, arguments=call.function.arguments, id=call.id)
        for call in message.tool_calls or ()
    )
    is_assistant = message.role == "assistant"
    try:
        return Message(
            role=cast("Role", message.role), content=content, task=message.task,
            reasoning=(message.reasoning_content or message.reasoning) if is_assistant else None,
            tool_calls=calls if is_assistant else (),
            tool_call_id=message.tool_call_id if message.role == "tool" else None,
            wo_eos=message.prefix,
        )  # fmt: skip
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error


def _choice(request: ChatRequest) -> ToolChoice:
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        return ToolChoice(kind="named", name=choice.function.name)
    return ToolChoice(kind=choice or "auto")


def _format(wanted: ResponseFormat | None) -> AnswerFormat:
    if wanted is None or wanted.type == "text":
        return AnswerFormat()
    if wanted.type == "json_object":
        return AnswerFormat(kind="json_object")
    return json_schema_format(None if wanted.json_schema is None else wanted.json_schema.schema_)


# ---- answers ----


class ChatAnswer:
    """The answers to one chat request, ``n`` of them, whole or as they come."""

    def __init__(
        self, service: Service, request: ChatRequest, prepared: Prepared, *, key: str, id: str, created: int
    ) -> None:
        self._service, self._request, self._prepared, self._key = service, request, prepared, key
        service.admission.check(key, request.n)
        self._head = {"id": id, "created": created, "model": request.model, "system_fingerprint": service.fingerprint}
        chunk = dumps({**self._head, "object": "chat.completion.chunk"})  # all chunks begin so
        self._begin = b"data: " + chunk.removesuffix(b"}") + b',"choices":['

    def _parts(self) -> list[Prepared]:
        """One for each choice: with a seed of its own, counted from the request's."""
        one, seed = self._prepared, self._prepared.sampling.seed
        if self._request.n == 1:
            return [one]
        seeds = [None if seed is None else (seed + i) % 2**63 for i in range(self._request.n)]
        return [replace(one, sampling=replace(one.sampling, seed=seed)) for seed in seeds]

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = await all_of([collect(self._service.answer(part, self._key)) for part in self._parts()])
        usage = sum((choice.usage for choice in choices), Usage())
        return {
            **self._head, "object": "chat.completion", "usage": usage_of(usage),
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
        }  # fmt: skip

    def _choice(self, index: int, found: Collected) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": found.content}
        if found.reasoning:
            message |= {"reasoning_content": found.reasoning, "reasoning": found.reasoning}
        if found.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in found.calls
            ]
            message["content"] = found.content or None
        return {
            "index": index, "message": message, "finish_reason": found.reason,
            "logprobs": self._logprobs(found.scored) if self._request.logprobs else None,
        }  # fmt: skip

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        found: dict[str, Any] = {"content": []}
        for part in scored:
            name = "reasoning_content" if part.is_reasoning else "content"
            found.setdefault(name, []).extend(self._scored(token, one) for token, one in part.tokens)
        return found

    def _scored(self, token: int, found: LogProbabilities) -> dict[str, Any]:
        top = [self._named(other, value) for other, value in found.top]
        return {**self._named(token, found.chosen), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = token_text(self._service.tokenizer, token)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        options = self._request.stream_options
        usage, parts = Usage(), self._parts()
        for index in range(len(parts)):
            yield self._chunk(index, {"role": "assistant", "content": "", "reasoning_content": ""})
        async for index, news in _merged([self._service.answer(part, self._key) for part in parts]):
            yield b"".join(self._told(index, told) for told in news)
            if isinstance(news[-1], Ended):
                usage = usage + news[-1].usage
        if options is not None and options.include_usage:
            yield self._begin + b'],"usage":' + dumps(usage_of(usage)) + b"}\n\n"
        yield b"data: [DONE]\n\n"

    def _told(self, index: int, told: Told) -> bytes:
        delta = _delta(told)
        if delta is not None:
            return self._chunk(index, delta)
        if isinstance(told, Scored):
            return self._chunk(index, {}, logprobs=self._logprobs([told]))
        return self._chunk(index, {}, finish=told.reason) if isinstance(told, Ended) else b""

    def _chunk(self, index: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._begin + dumps(choice) + b"]}\n\n"

    def failed(self, error: ApiError) -> bytes:
        """The event that tells what went wrong after the first."""
        return event(error.body("openai"))


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens as OpenAI and DeepSeek count them."""
    return {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_output,
        "total_tokens": usage.num_prompt + usage.num_output,
        "prompt_cache_hit_tokens": usage.num_cached,
        "prompt_cache_miss_tokens": usage.num_prompt - usage.num_cached,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached},
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning},
    }


def _delta(told: Told) -> dict[str, Any] | None:
    if isinstance(told, Content):
        return {"content": told.text}
    if isinstance(told, Reasoning):
        return {"reasoning_content": told.text, "reasoning": told.text}
    if isinstance(told, CallBegun):
        function = {"name": told.name, "arguments": ""}
        return {"tool_calls": [{"index": told.index, "id": told.id, "type": "function", "function": function}]}
    if isinstance(told, CallArguments):
        return {"tool_calls": [{"index": told.index, "function": {"arguments": told.text}}]}
    return None


async def _merged(sources: Sequence[AsyncIterator[Sequence[Told]]]) -> AsyncIterator[Item]:
    """What several answers tell, as it comes, each with its number."""
    if len(sources) == 1:
        async for news in sources[0]:
            yield 0, news
        return
    queue: asyncio.Queue[Item | None] = asyncio.Queue()

    async def fill(index: int, source: AsyncIterator[Sequence[Told]]) -> None:
        async for news in source:
            queue.put_nowait((index, news))

    tasks = [asyncio.create_task(fill(i, source)) for i, source in enumerate(sources)]
    for task in tasks:
        task.add_done_callback(lambda _: queue.put_nowait(None))
    num_left = len(tasks)
    try:
        while num_left:
            item = await queue.get()
            if item is not None:
                yield item
                continue
            num_left -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
