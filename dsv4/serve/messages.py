"""``/v1/messages``: the protocol of Anthropic, which Claude Code speaks.

An answer is blocks: thinking, text, calls of tools. A stream tells the same blocks part by part. ``input_tokens`` are
the tokens of the prompt that had to be read; ``cache_read_input_tokens`` are the others, which the first event of a
stream cannot know yet and the last does.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from dsv4.serve.answer_text import collect
from dsv4.serve.errors import ApiError
from dsv4.serve.messages_request import CountRequest, MessagesRequest, prompt_turn
from dsv4.serve.respond import event
from dsv4.serve.service import Prepared, Service
from dsv4.serve.turn import CallBegun, Ended, Reason, Told, Usage
from dsv4.text.events import CallArguments, CallEnd, Content, Reasoning

Json = dict[str, Any]

STOP_REASONS: Mapping[Reason, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def count_tokens(service: Service, request: CountRequest) -> Json:
    """How many tokens the prompt of a request has, though it may be too long to be answered."""
    return {"input_tokens": len(service.prompt_ids(prompt_turn(request)))}


def signature_of(thinking: str) -> str:
    """What stands for a signature, which clients want, keep and send back: always the same for the same thinking."""
    return b64encode(sha256(b"thinking\n" + thinking.encode(errors="surrogatepass")).digest()).decode()


class MessageAnswer:
    """The answer to one request, whole or as it comes."""

    silence = event({"type": "ping"}, "ping")

    def __init__(self, service: Service, request: MessagesRequest, prepared: Prepared, *, key: str, id: str) -> None:
        self._service, self._prepared, self._key = service, prepared, key
        service.admission.check(key)
        self._shows_thinking = request.thinking is None or request.thinking.display != "omitted"
        self._head = {"id": id, "type": "message", "role": "assistant", "model": request.model}

    def _answer(self) -> AsyncIterator[Sequence[Told]]:
        return self._service.answer(self._prepared, self._key, call_prefix="toolu_")

    async def whole(self) -> Json:
        """The answer as one object. A call that was cut off is left out: half of its input is none."""
        found = await collect(self._answer())
        content: list[Json] = []
        if found.reasoning:
            thinking = found.reasoning if self._shows_thinking else ""
            content.append({"type": "thinking", "thinking": thinking, "signature": signature_of(found.reasoning)})
        if found.content:
            content.append({"type": "text", "text": found.content})
        for call in found.calls:
            given = _input(call.arguments)
            if given is not None:
                content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
        return {**self._head, "content": content, **stop_of(found.reason, found.stop), "usage": usage_of(found.usage)}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        usage = usage_of(Usage(num_prompt=len(self._prepared.prompt_ids)))
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message=message)
        yield self.silence
        blocks = Blocks(shows_thinking=self._shows_thinking)
        async for news in self._answer():
            yield b"".join(chunk for told in news for chunk in blocks.take(told))
        yield _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        """The event that tells what went wrong after the first."""
        return event(error.body("anthropic"), "error")


class Blocks:
    """Events of an answer's blocks, as they come. One block is open at a time."""

    def __init__(self, *, shows_thinking: bool) -> None:
        self._shows_thinking = shows_thinking
        self._index, self._open = -1, ""
        self._thinking: list[str] = []

    def take(self, told: Told) -> Iterator[bytes]:
        """Yield the events that this makes."""
        match told:
            case Reasoning(text) if text:
                yield from self._begin("thinking", thinking="", signature="")
                self._thinking.append(text)
                if self._shows_thinking:
                    yield self._delta("thinking_delta", thinking=text)
            case Content(text) if text:
                yield from self._begin("text", text="")
                yield self._delta("text_delta", text=text)
            case CallBegun():
                yield from self._end()
                yield from self._begin("tool_use", id=told.id, name=told.name, input={})
            case CallArguments() if told.text:
                yield self._delta("input_json_delta", partial_json=told.text)
            case CallEnd():
                yield from self._end()
            case Ended():
                yield from self._end()
                yield _event("message_delta", delta=stop_of(told.reason, told.stop), usage=usage_of(told.usage))
            case _:
                pass

    def _begin(self, kind: str, **block: Any) -> Iterator[bytes]:
        """Open a block of this kind, unless one is open."""
        if self._open == kind:
            return
        yield from self._end()
        self._index, self._open = self._index + 1, kind
        yield _event("content_block_start", index=self._index, content_block={"type": kind, **block})

    def _end(self) -> Iterator[bytes]:
        if not self._open:
            return
        if self._open == "thinking":
            yield self._delta("signature_delta", signature=signature_of("".join(self._thinking)))
            self._thinking.clear()
        self._open = ""
        yield _event("content_block_stop", index=self._index)

    def _delta(self, kind: str, **given: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **given})


def stop_of(reason: Reason, stop: str | None) -> Json:
    """Why an answer ended, in Anthropic's words."""
    return {"stop_reason": STOP_REASONS[reason] if stop is None else "stop_sequence", "stop_sequence": stop}


def usage_of(usage: Usage) -> Json:
    """Tokens as Anthropic counts them."""
    return {
        "input_tokens": usage.num_prompt - usage.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.num_output,
        "output_tokens_details": {"thinking_tokens": usage.num_reasoning},
    }


def _event(kind: str, **data: Any) -> bytes:
    return event({"type": kind, **data}, kind)


def _input(arguments: str) -> Json | None:
    """The input of a call; None if the call was cut off in it."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
