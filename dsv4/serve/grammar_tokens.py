"""A vocabulary as masks see it: which tokens are text and of which bytes, and which would spell a mark.

A mark of the markup is a token of its own, but a model may also write its characters one by one. What reads the answer
reads text, and could not tell: so the token that would complete a spelled mark is not allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from dsv4.data.tokenizer import num_ids, plain_text
from dsv4.engine.text import BYTES
from dsv4.text.tokens import DSML, END_THINK

MARKS = tuple(mark.encode() for mark in (DSML, END_THINK))
ANSWER_MARKS = MARKS[:1]
"""Once the thinking has ended, the text that its end is spelled with means nothing."""
LONGEST = max(map(len, MARKS))


class Vocabulary:
    """The tokens of a byte-level tokenizer, and of a model with as many ids or more."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        """Raise ``ValueError`` if the tokenizer has more ids than the model, or the end of text is none of them."""
        if num_ids(tokenizer) > vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}; expected at least the tokenizer's {num_ids(tokenizer)} ids")
        special = tokenizer.get_added_tokens_decoder()
        if eos_token_id not in special:
            raise ValueError(f"eos_token_id is {eos_token_id}; expected one of the tokenizer's special tokens")
        self.size, self.eos = vocab_size, eos_token_id
        self.dsml = tokenizer.token_to_id(DSML)
        self.bytes = [b""] * vocab_size
        """Of a token that is text; those of a special token are its name, which is no text."""
        for token, index in tokenizer.get_vocab().items():
            self.bytes[index] = token.encode() if index in special else bytes(map(BYTES.__getitem__, token))
        self.is_text = np.array([bool(text) for text in self.bytes])
        """[V] bool: neither a special token nor an id without a token."""
        self.is_text[list(special)] = False
        self._find_marks()
        self._library = LLTokenizer(
            TokenizerWrapper(_Source(self, plain_text(tokenizer), special)), n_vocab=vocab_size, eos_token=eos_token_id
        )

    def matcher(self, grammar: str, name: str) -> LLMatcher:
        """Compile a grammar; raise ``ValueError`` for what it cannot enforce of ``name``."""
        matcher = LLMatcher(self._library, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise ValueError(f"{name} cannot be enforced: {_plain(matcher.get_error())}")
        if not any(matcher.compute_bitmask()) or matcher.is_error():
            raise ValueError(f"{name} cannot be enforced: nothing fits it; expected one that something fits")
        return matcher

    def allowed(self, matcher: LLMatcher) -> np.ndarray:
        """What a grammar allows next, [V] bool; raise ``ValueError`` where it cannot say."""
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(f"the grammar goes no further: {_plain(matcher.get_error())}")
        packed = np.frombuffer(bits, np.uint8)  # whole words of 32 bits
        return np.unpackbits(packed, count=self.size, bitorder="little").view(bool)

    def spelling(self, output_ids: Sequence[int], marks: Sequence[bytes]) -> np.ndarray:
        """Ids of the tokens that would complete one of ``marks`` spelled by text at the end of the output: int64."""
        end = b""
        for token in reversed(output_ids):
            if len(end) >= LONGEST or not self.is_text[token]:
                break
            end = self.bytes[token] + end
        found = []
        for mark in marks:
            found += [self._ends[mark, n] for n in range(len(mark)) if end.endswith(mark[:n])]
        return np.concatenate(found)

    def _find_marks(self) -> None:
        """Find the tokens that end each mark after its first n bytes, or that hold it whole: after none."""
        ends = {(mark, n): [] for mark in MARKS for n in range(len(mark))}
        first = tuple(mark[n:] for mark, n in ends if n)
        for index in np.flatnonzero(self.is_text).tolist():
            text = self.bytes[index]
            for mark in MARKS:
                if mark in text:
                    ends[mark, 0].append(index)
            if text.startswith(first):
                for (mark, n), ids in ends.items():
                    if n and text.startswith(mark[n:]):
                        ids.append(index)
        self._ends = {place: np.array(ids, np.int64) for place, ids in ends.items()}


class _Source:
    """What the library asks of a tokenizer. Texts are encoded as text: one that spells a token is not that token."""

    def __init__(self, vocabulary: Vocabulary, plain: Tokenizer, special: Iterable[int]) -> None:
        self.eos_token_id, self.bos_token_id = vocabulary.eos, None
        self.tokens = vocabulary.bytes
        self.special_token_ids = sorted(special)  # not the ids without a token, which would be taken for any of these
        self._plain = plain

    def __call__(self, text: bytes) -> list[int]:
        return self._plain.encode(text.decode()).ids


def _plain(problem: str) -> str:
    """The library's message without the lines of a grammar that its reader has not written, and the parser's state."""
    problem = re.split(r"\n\s+\d+ \||\s*<state>", problem)[0]
    return " ".join(problem.rpartition("failed to compile JSON schema: ")[2].split())
