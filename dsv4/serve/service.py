"""Turns in, answers out: what every protocol shares, between the engine and the web.

A turn is encoded with the checkpoint's passages, checked against context and queue, and run; its text is parsed as it
comes. One service has one engine, which steps in a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from tokenizers import Tokenizer

from dsv4.config.sampling import Sampling
from dsv4.config.serve import ServeOptions
from dsv4.data.prompt import PromptTokenizer
from dsv4.data.tokenizer import plain_text
from dsv4.engine.engine import Engine
from dsv4.engine.outputs import Piece
from dsv4.engine.running import Mask
from dsv4.engine.streams import StepError
from dsv4.engine.text import Detokenizer
from dsv4.serve.admission import Admission
from dsv4.serve.answer import AnswerReader
from dsv4.serve.errors import ApiError, too_long
from dsv4.serve.masks import Grammar, Grammars, OutputMask
from dsv4.serve.memory import ReasoningMemory
from dsv4.serve.metrics import Metrics
from dsv4.serve.turn import Ended, Told, Turn
from dsv4.text.encode import Prompt, encode
from dsv4.text.message import Message, Tool
from dsv4.text.passages import Passages
from dsv4.text.tokens import END_THINK

log = logging.getLogger("dsv4.serve")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A turn that can run: its prompt, how its tokens are chosen, and what they may be."""

    turn: Turn
    prompt_ids: list[int]
    sampling: Sampling
    mask: Mask | None
    is_thinking: bool
    """The prompt ends where the model begins to think."""


class Service:
    """A model that answers. name: what clients call it."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        passages: Passages,
        options: ServeOptions,
        *,
        name: str,
        created: int,
    ) -> None:
        self.engine, self.tokenizer, self.passages, self.options = engine, tokenizer, passages, options
        self.name, self.created = name, created
        self.fingerprint = f"dsv4-{version('dsv4')}"
        self.max_context = engine.max_context
        self.admission = Admission(engine.limits.max_requests + options.max_waiting, options.max_per_key)
        self.metrics, self.memory = Metrics(), ReasoningMemory()
        self.prompts, self.plain_tokenizer = PromptTokenizer(tokenizer), plain_text(tokenizer)
        config = engine.model.config
        self.eos = config.eos_token_id
        self.grammars = Grammars(tokenizer, config.vocab_size, self.eos)
        self._end_think = self.prompts.special(END_THINK)

    # ---- a turn ----

    async def prepare(self, turn: Turn) -> Prepared:
        """Encode a turn and check it; raise an ``ApiError`` for one that cannot run."""
        goes_on = bool(turn.messages) and turn.messages[-1].role == "assistant"
        is_thinking = turn.thinking and not goes_on
        prompt_ids = self.prompt_ids(turn)
        sampling = self.check_prompt(prompt_ids, turn.sampling)
        try:
            grammar = await self._grammar(turn)
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        mask = None if grammar is None else self._mask(grammar, is_thinking=is_thinking)
        return Prepared(turn=turn, prompt_ids=prompt_ids, sampling=sampling, mask=mask, is_thinking=is_thinking)

    def prompt_ids(self, turn: Turn) -> list[int]:
        """Encode a turn, however long it is; raise an ``ApiError`` for one that no prompt can hold."""
        try:
            return self.prompts.ids(self._encode(turn))
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from error

    def _encode(self, turn: Turn) -> Prompt:
        messages = self.memory.repair(turn.user, turn.messages)
        tools = offered(turn)
        schema = _shown_schema(turn)
        if tools or schema is not None:
            messages = _with_system(messages, tools, schema)
        return encode(messages, thinking=turn.thinking, effort=turn.effort, passages=self.passages)

    async def _grammar(self, turn: Turn) -> Grammar | None:
        """What the answer may be, if that is limited. Made in a thread: a new grammar takes long to compile."""
        choice, schema = turn.tool_choice, _schema_of(turn)
        if turn.tools and choice.kind != "none":
            named = choice.name if choice.kind == "named" else choice.kind
            return await asyncio.to_thread(self.grammars.tool_calls, turn.tools, choice=named, answer=schema)
        return None if schema is None else await asyncio.to_thread(self.grammars.json_schema, schema)

    def _mask(self, grammar: Grammar, *, is_thinking: bool) -> Mask:
        return OutputMask(grammar, after=self._end_think if is_thinking else None)

    async def answer(self, prepared: Prepared, key: str, *, call_prefix: str = "call_") -> AsyncIterator[list[Told]]:
        """Run a turn, and tell its answer as it comes, what comes at once in one list; the last is ``Ended``.

        Leaving early cancels it.

        call_prefix: how the ids of tool calls begin.
        """
        turn = prepared.turn
        reader = self.reader(prepared, call_prefix=call_prefix)
        pieces = self.engine.stream(prepared.prompt_ids, prepared.sampling, salt=salt_of(turn.user), mask=prepared.mask)
        async with aclosing(self._run(pieces, key, prepared.prompt_ids)) as run:
            async for piece, num_cached in run:
                news = reader.read(piece, num_cached)
                if isinstance(ended := news[-1] if news else None, Ended):
                    self.note(ended)
                    self.memory.keep(turn.user, reader.call_ids, reader.reasoning)
                if news:
                    yield news
                if reader.is_done:
                    return

    def reader(self, prepared: Prepared, *, call_prefix: str = "call_") -> AnswerReader:
        """What turns the tokens of this turn's answer into what is told of it."""
        turn = prepared.turn
        return AnswerReader(
            Detokenizer(self.tokenizer, skip_special_tokens=False), thinking=prepared.is_thinking,
            end_think=self._end_think, eos=self.eos, tools=offered(turn), stop=turn.stop,
            one_call=turn.one_call, num_prompt=len(prepared.prompt_ids), new_id=partial(new_call_id, call_prefix),
        )  # fmt: skip

    # ---- plain completions ----

    def check_prompt(self, prompt_ids: list[int], sampling: Sampling) -> Sampling:
        """Return the sampling of a prompt, cut to the context; an ``ApiError`` if there is no room."""
        room = self.max_context - len(prompt_ids)
        if room < 1:
            raise too_long(len(prompt_ids), 0, self.max_context)
        return replace(sampling, max_tokens=min(sampling.max_tokens, room))

    async def complete(
        self, prompt_ids: list[int], sampling: Sampling, *, key: str, user: str
    ) -> AsyncIterator[tuple[Piece, int]]:
        """Run a prompt that is no turn; yield its pieces, each with the tokens of the prompt that were found."""
        pieces = self.engine.stream(prompt_ids, sampling, salt=salt_of(user))
        async for found in self._run(pieces, key, prompt_ids):
            yield found

    async def follow(self, add: Callable[[], str], key: str) -> AsyncIterator[Piece]:
        """Yield the pieces of a request that was let in and outlives who asked; see ``Engine.follow``."""
        async for piece, _ in self._run(self.engine.follow(add), key, (), is_let_in=True):
            yield piece

    async def _run(
        self, pieces: AsyncGenerator[Piece, None], key: str, prompt_ids: Sequence[int], *, is_let_in: bool = False
    ) -> AsyncGenerator[tuple[Piece, int], None]:
        begun, num_cached = time.monotonic(), 0
        first = last = begun
        num_first = num_tokens = 0  # of the first piece, and of all
        self._log("asked", prompt_ids)
        with self.admission.enter(key, is_let_in=is_let_in):
            try:
                async for piece in pieces:
                    last = time.monotonic()
                    num_tokens += len(piece.token_ids)
                    if not num_first and num_tokens:
                        first, num_first = last, num_tokens
                        num_cached = self.engine.completion(piece.id).num_cached
                        self.metrics.first_token_s.observe(first - begun)
                    if self.options.logs_prompts:
                        self._log("gave", piece.token_ids)
                    if piece.finish == "error":
                        raise ApiError(500, f"no token can follow: {piece.error}", code="no_token")
                    yield piece, num_cached
            except StepError as error:
                raise ApiError(500, f"the engine has stopped: {error.__cause__}", code="engine_error") from error
            except ValueError as error:
                raise ApiError(400, str(error), code="invalid_value") from error
            finally:
                await pieces.aclose()
                if num_tokens > num_first:
                    self.metrics.token_s.observe((last - first) / (num_tokens - num_first))
                self.admission.took(time.monotonic() - begun)

    def _log(self, what: str, token_ids: Sequence[int]) -> None:
        if self.options.logs_prompts and token_ids:
            log.info("%s %r", what, self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def note(self, ended: Ended) -> None:
        """Count an answer that is whole."""
        usage = ended.usage
        self.metrics.finished.labels(ended.reason).inc()
        self.metrics.prompt_tokens.inc(usage.num_prompt)
        self.metrics.cached_tokens.inc(usage.num_cached)
        self.metrics.output_tokens.inc(usage.num_output)


def offered(turn: Turn) -> tuple[Tool, ...]:
    """The tools that the answer may call."""
    return turn.tools if turn.tool_choice.kind != "none" else ()


def salt_of(user: str) -> bytes:
    """What keeps the prefixes of a user apart from those of others."""
    return sha256(user.encode()).digest() if user else b""


def new_call_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def _with_system(
    messages: tuple[Message, ...], tools: tuple[Tool, ...], response_format: Mapping[str, Any] | None
) -> tuple[Message, ...]:
    """Put tools and format into the first message, which is a system message or becomes one."""
    if messages and messages[0].role == "system":
        return (replace(messages[0], tools=tools, response_format=response_format), *messages[1:])
    return (Message(role="system", tools=tools, response_format=response_format), *messages)


def _shown_schema(turn: Turn) -> Mapping[str, Any] | None:
    """The schema that the prompt shows; JSON of any form has none to show."""
    return turn.answer.schema if turn.answer.kind == "json_schema" else None


def _schema_of(turn: Turn) -> Mapping[str, Any] | None:
    """What content that is no call must be: None for text, a schema for JSON."""
    if turn.answer.kind == "text":
        return None
    return turn.answer.schema if turn.answer.kind == "json_schema" else {"type": "object"}
