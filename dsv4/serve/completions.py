"""``/completions``: a prompt that is gone on with as it is, and the gap between a prompt and a suffix."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from dsv4.config.sampling import Sampling
from dsv4.engine.outputs import Piece
from dsv4.engine.sample import LogProbabilities
from dsv4.serve.answer_text import all_of
from dsv4.serve.chat_completions import usage_of
from dsv4.serve.errors import ApiError
from dsv4.serve.respond import event
from dsv4.serve.schema import (
    OpenAIRequest,
)  # fmt: skip
from dsv4.serve.service import Service
from dsv4.serve.token_text import token_text
from dsv4.serve.turn import Ended, Usage
from dsv4.text.tokens import BOS, FIM_BEGIN, FIM_END, FIM_HOLE

DEFAULT_TOKENS = 16  # as OpenAI has it
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(OpenAIRequest):
    """suffix: what comes after the text that is wanted. echo: give the prompt back before it."""

    prompt: str | list[str] | Annotated[list[TokenId], Field(min_length=1)]
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False


@dataclass(kw_only=True)
class Continued:
    """One continuation."""

    text: str
    tokens: list[int] = field(default_factory=list)
    scored: list[LogProbabilities] = field(default_factory=list)
    finish: str = "stop"
    usage: Usage = field(default_factory=Usage)


class CompletionAnswer:
    """The continuations of one request, whole or as they come."""

    def __init__(self, service: Service, request: CompletionRequest, *, key: str, id: str, created: int) -> None:
        self._service, self._request, self._key = service, request, key
        self._user = request.owner
        sampling = request.sampling(
            max_tokens=request.max_tokens or DEFAULT_TOKENS, logprobs=request.logprobs, stop=request.stops
        )  # fmt: skip
        self._prompts = self._texts(request.prompt)
        ids = [self._ids(prompt) for prompt in self._prompts]
        self._parts = [
            (prompt, prompt_ids, self._seeded(service.check_prompt(prompt_ids, sampling), i))
            for prompt, prompt_ids in zip(self._prompts, ids, strict=True)
            for i in range(request.n)
        ]
        service.admission.check(key, len(self._parts))
        self._head = {
            "id": id, "object": "text_completion", "created": created, "model": request.model,
            "system_fingerprint": service.fingerprint,
        }  # fmt: skip

    @staticmethod
    def _texts(prompt: str | Sequence[str] | Sequence[int]) -> list[str | list[int]]:
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise ApiError(400, "prompt is empty; expected at least one", param="prompt")
        texts = [one for one in prompt if isinstance(one, str)]
        return list(texts) if texts else [[one for one in prompt if isinstance(one, int)]]

    def _seeded(self, sampling: Sampling, index: int) -> Sampling:
        return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + index) % 2**63)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        suffix = self._request.suffix
        if not isinstance(prompt, str):
            if suffix is not None:
                raise ApiError(400, "suffix is given with a prompt of token ids; expected text", param="suffix")
            size = self._service.engine.model.config.vocab_size
            wrong = next((token for token in prompt if token >= size), None)
            if wrong is not None:
                raise ApiError(400, f"prompt holds {wrong}; expected ids below {size}", param="prompt")
            return prompt
        plain = self._service.plain_tokenizer
        ids, special = plain.encode(prompt).ids, self._service.prompts.special
        if suffix is None:
            return [special(BOS), *ids]
        return [
            special(BOS), special(FIM_BEGIN), *ids, special(FIM_HOLE), *plain.encode(suffix).ids, special(FIM_END),
        ]  # fmt: skip

    def _echo(self, prompt: str | list[int]) -> str:
        if not self._request.echo:
            return ""
        return prompt if isinstance(prompt, str) else self._service.tokenizer.decode(prompt)

    async def whole(self) -> dict[str, Any]:
        """All continuations as one object."""
        found = await all_of([self._one(*part) for part in self._parts])
        usage = sum((one.usage for one in found), Usage())
        choices = [
            {"index": i, "text": one.text, "finish_reason": one.finish, "logprobs": self._logprobs(one)}
            for i, one in enumerate(found)
        ]
        return {**self._head, "choices": choices, "usage": usage_of(usage)}

    async def _one(self, prompt: str | list[int], prompt_ids: list[int], sampling: Sampling) -> Continued:
        found = Continued(text=self._echo(prompt))
        async for piece, num_cached in self._run(prompt_ids, sampling):
            found.text += piece.text
            found.tokens += piece.token_ids
            found.scored += piece.logprobs
            if piece.finish is not None:
                found.finish, found.usage = self._ended(piece, prompt_ids, len(found.tokens), num_cached)
        return found

    def _run(self, prompt_ids: list[int], sampling: Sampling) -> AsyncIterator[tuple[Piece, int]]:
        return self._service.complete(prompt_ids, sampling, key=self._key, user=self._user)

    def _ended(self, piece: Piece, prompt_ids: list[int], num_output: int, num_cached: int) -> tuple[str, Usage]:
        usage = Usage(num_prompt=len(prompt_ids), num_cached=num_cached, num_output=num_output)
        finish = "length" if piece.finish == "length" else "stop"
        self._service.note(Ended(finish, usage))
        return finish, usage

    def _logprobs(self, found: Continued) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        tokenizer = self._service.tokenizer

        def spell(token: int) -> str:
            return token_text(tokenizer, token).decode(errors="replace")

        texts = [spell(token) for token in found.tokens]
        offsets, place = [], 0
        for text in texts:
            offsets.append(place)
            place += len(text)
        return {
            "tokens": texts, "token_logprobs": [max(one.chosen, -9999.0) for one in found.scored],
            "top_logprobs": [{spell(token): max(value, -9999.0) for token, value in one.top} for one in found.scored],
            "text_offset": offsets,
        }  # fmt: skip

    async def chunks(self) -> AsyncIterator[bytes]:
        """The continuations as server-sent events, one after the other."""
        options, usage = self._request.stream_options, Usage()
        for index, (prompt, prompt_ids, sampling) in enumerate(self._parts):
            begun, num_output = self._echo(prompt), 0
            if begun:
                yield self._chunk(index, begun, None, None)
            async for piece, num_cached in self._run(prompt_ids, sampling):
                num_output += len(piece.token_ids)
                part = Continued(text="", tokens=list(piece.token_ids), scored=list(piece.logprobs))
                finish = None
                if piece.finish is not None:
                    finish, one = self._ended(piece, prompt_ids, num_output, num_cached)
                    usage = usage + one
                if piece.text or finish or piece.logprobs:
                    yield self._chunk(index, piece.text, finish, self._logprobs(part))
        if options is not None and options.include_usage:
            yield event({**self._head, "choices": [], "usage": usage_of(usage)})
        yield b"data: [DONE]\n\n"

    def _chunk(self, index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> bytes:
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
        return event({**self._head, "choices": [choice]})

    def failed(self, error: ApiError) -> bytes:
        """The event that tells what went wrong after the first."""
        return event(error.body("openai"))
