"""Masks for structured output: which tokens may come next, for an answer that is JSON or calls tools without a fault.

The grammars are those of ``grammar.py``; llguidance follows them, token by token. While the model thinks it writes what
it likes, but cannot evade an answer that is demanded by ending the text before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher
from tokenizers import Tokenizer

from dsv4.serve.grammar import json_grammar, tools_grammar
from dsv4.serve.grammar_tokens import ANSWER_MARKS, MARKS, Vocabulary
from dsv4.text.message import Tool
from dsv4.text.tokens import DSML

LOOK_BACK = 64
"""Tokens at the end of an output that may be others when it is shown again: drafts, of which there are fewer."""

NUM_KEPT = 256
"""Compiled grammars, of which each tool of a conversation needs one."""


@dataclass(frozen=True, eq=False)
class Grammar:
    """What an answer may be. Made by ``Grammars``; many requests can use one."""

    text: str
    vocabulary: Vocabulary
    start: LLMatcher

    @property
    def is_demanding(self) -> bool:
        """Whether the answer cannot be empty."""
        return not self.start.is_accepting()


class _Compiled:
    """A grammar that is compiled when it is first wanted, and once: who wants it meanwhile waits for it."""

    def __init__(self, vocabulary: Vocabulary, text: str, name: str) -> None:
        self._vocabulary, self._text, self._name = vocabulary, text, name
        self._lock, self._matcher = Lock(), None

    def matcher(self) -> LLMatcher:
        with self._lock:
            if self._matcher is None:
                self._matcher = self._vocabulary.matcher(self._text, self._name)
            return self._matcher


class Grammars:
    """Makes grammars for the tokens of one model: one for a server, since it takes a second to build.

    Several threads may make grammars at once.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        """Take the model's tokenizer, byte-level, its number of ids, and the token that ends a text.

        Raises ``ValueError`` if the tokenizer has more ids, or no such special token.
        """
        self._vocabulary = Vocabulary(tokenizer, vocab_size, eos_token_id)
        self._kept = lru_cache(NUM_KEPT)(_Compiled)  # the turns of an agent bring the same tools
        self._lock = Lock()

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON of this schema, then the end; properties come in the schema's order.

        Raises ``ValueError`` naming what the schema has that cannot be enforced.
        """
        return self._grammar(json_grammar(schema), "schema")

    def tool_calls(
        self,
        tools: Sequence[Tool],
        *,
        choice: Literal["auto", "required"] | str,
        answer: Mapping[str, Any] | None = None,
    ) -> Grammar | None:
        """An answer with tools at hand; None if nothing limits it.

        choice: ``auto``: text as it likes, and calls after it if it likes; ``required``: at least one call and nothing
        else; any other word is the name of the tool that is called once. A call is of one of the tools. Its arguments
        are free if the tool is not strict: text, or any JSON; else they are those of its schema. After the calls the
        text ends. answer: with ``auto``, the schema of an answer without a call, which is then JSON with no text
        before or after it; with a call demanded there is no such answer.

        Raises ``ValueError`` for a schema that cannot be enforced, a name that cannot be written or that two tools
        share, and a call demanded where there is no such tool, or no token for the markup.
        """
        if not tools and choice == "auto":
            return None if answer is None else self.json_schema(answer)
        if not tools:
            raise ValueError(f"tools has none, and the tool to call is {choice!r}; expected tools")
        if self._vocabulary.dsml is None:
            raise ValueError(f"the tokenizer has no token {DSML}; expected it, to call tools")
        for tool in tools:
            if tool.is_strict:  # as a whole first: what is wrong with it is told by its own name
                name = f"the schema of tool {tool.name!r}"
                self._grammar(json_grammar(tool.parameters, name), name)
        if answer is not None:
            self.json_schema(answer)
        return self._grammar(tools_grammar(tools, choice, answer, self._vocabulary.dsml), "the form of the answer")

    def _grammar(self, text: str, name: str) -> Grammar:
        with self._lock:  # two that miss at once must not both make one
            compiled = self._kept(self._vocabulary, text, name)
        return Grammar(text, self._vocabulary, compiled.matcher())


class OutputMask:
    """The mask of one request: a ``dsv4.engine.running.Mask``."""

    def __init__(self, grammar: Grammar, *, after: int | None) -> None:
        """after: the special token after which the grammar begins, that which ends the thinking; None: at once."""
        vocabulary = grammar.vocabulary
        if after is not None and not 0 <= after < vocabulary.size:
            raise ValueError(f"after is {after}; expected a token id from 0 to {vocabulary.size - 1}, or None")
        self._vocabulary, self._after = vocabulary, after
        self._matcher = grammar.start.deep_copy()
        self._thinking = vocabulary.is_text
        if after is not None:
            self._thinking = self._thinking.copy()
            self._thinking[[after] if grammar.is_demanding else [after, vocabulary.eos]] = True
        self._tokens: list[int] = []
        """The output as it was shown last."""
        self._begin = 0 if after is None else None
        """Where in it the grammar begins."""
        self._end: int | None = None
        """Where the text ends in it."""

    def __call__(self, output_ids: Sequence[int]) -> np.ndarray | None:
        """Return the tokens allowed after this output, [V] bool; None after the end of the text: all, and none counts.

        The output may be longer or shorter than at the call before, and other in its last ``LOOK_BACK`` tokens. Work
        is for what has changed. Raises ``ValueError`` for an output that does not follow the grammar.
        """
        self._follow(output_ids)
        if self._end is not None:
            return None
        if self._begin is None:
            allowed, marks = self._thinking.copy(), MARKS
        else:
            allowed, marks = self._vocabulary.allowed(self._matcher), ANSWER_MARKS
        allowed[self._vocabulary.spelling(self._tokens, marks)] = False
        return allowed

    def _follow(self, output_ids: Sequence[int]) -> None:
        known, shared = self._tokens, min(len(self._tokens), len(output_ids))
        start = max(0, shared - LOOK_BACK)
        same = zip(known[start:shared], output_ids[start:shared], strict=True)
        keep = next((start + index for index, (old, new) in enumerate(same) if old != new), shared)
        if keep < len(known):
            self._rewind(keep)
        self._extend(output_ids[keep:])

    def _rewind(self, keep: int) -> None:
        """Forget all but the first ``keep`` tokens."""
        if self._begin is not None:
            taken = (len(self._tokens) if self._end is None else self._end) - max(self._begin, keep)
            if taken > 0:
                assert self._matcher.rollback(taken), f"the grammar went back {taken} tokens; expected that it can"
        if self._after is not None and self._begin is not None and self._begin > keep:
            self._begin = None
        if self._end is not None and self._end >= keep:
            self._end = None
        del self._tokens[keep:]

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            place = len(self._tokens)
            if self._end is not None:
                pass
            elif token == self._vocabulary.eos:
                self._end = place
            elif self._begin is None:
                if token == self._after:
                    self._begin = place + 1
            elif self._matcher.try_consume_tokens([token]) != 1:
                raise ValueError(f"token {token} of the output, at place {place}, does not follow the grammar")
            self._tokens.append(token)
