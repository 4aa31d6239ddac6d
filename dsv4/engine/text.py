"""Text from tokens as they come: whole characters only, up to the first stop string.

A token of a byte-level BPE is a run of bytes, and a character may begin in one token and end in another; a stop string
may begin in the middle of a token and end in the middle of one. So bytes are held until they make a character, and
characters while they may be the beginning of a stop string. What comes out does not depend on how the tokens are
grouped.

Of several stop strings the one that ends first counts, and of those that end at the same character the longest. So no
token is made only to see whether a longer one would follow, and the text ends at the same character whatever the
tokens are: of ``b`` and ``abc``, the text ``abc`` is cut before its ``b``.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Tokenizer, decoders

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))
}
"""The byte that each character of a byte-level token stands for: itself if it can be printed, else one past 255."""


@lru_cache(maxsize=2**17)
def spelling(token: str) -> bytes:
    """The bytes of a byte-level token, which may be part of a character; of an added token, its name as it is."""
    if all(character in BYTES for character in token):
        return bytes(BYTES[character] for character in token)
    return token.encode()


class Detokenizer:
    """The text of tokens that come one by one or many at a time."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Take a byte-level tokenizer; raise ``ValueError`` for any other.

        skip_special_tokens: leave out those the tokenizer marks as special, as ``tokenizer.decode`` does.
        """
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise ValueError(f"the tokenizer's decoder is {tokenizer.decoder}; expected ByteLevel")
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skipped: set[int] = set()
        if skip_special_tokens:
            added = tokenizer.get_added_tokens_decoder()
            self._skipped = {token_id for token_id, token in added.items() if token.special}

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens complete; bytes of an unfinished character are held.

        All that is returned, with ``flush`` at the end, is ``tokenizer.decode`` of all tokens. Bytes that can not
        become a character are U+FFFD, and ids that the tokenizer does not know are no text.
        """
        return self._decoder.decode(b"".join(map(self._bytes, token_ids)))

    def flush(self) -> str:
        """Return what is held: U+FFFD for a character that was begun, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        return b"" if token is None else spelling(token)


class StopFinder:
    """The text before the first stop string, of a text that comes in parts."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Take the stop strings, any number of them; raise ``ValueError`` for an empty one."""
        if "" in stops:
            raise ValueError(f"stop is {tuple(stops)!r}; expected no empty string")
        self.found: str | None = None
        """The stop string that ended the text."""
        self._matches = [_Match(stop) for stop in stops]
        self._held = ""  # no longer than what a stop string has matched of the end of the text

    def push(self, text: str) -> str:
        """Return what can not be part of a stop string any more; nothing once one is found."""
        if self.found is not None:
            return ""
        text, begin = self._held + text, len(self._held)
        for index in range(begin, len(text)):
            complete = [match.stop for match in self._matches if match.advance(text[index])]
            if complete:
                self.found = max(complete, key=len)
                self._held = ""
                return text[: index + 1 - len(self.found)]
        safe = len(text) - max((match.length for match in self._matches), default=0)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """Return what is held: the text has ended, and no stop string with it."""
        text, self._held = self._held, ""
        return text


class Piece(NamedTuple):
    """What some tokens add to a text."""

    text: str
    stop: str | None
    """The stop string that ended the text, which is not part of it."""
    num_tokens: int
    """How many of the tokens given belong to the output: all of them, or those up to where the stop string ends."""


class TextStream:
    """The text of a request's tokens, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._finder = StopFinder(stops)

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Return what these tokens add. After a stop string: nothing, of no token."""
        text, num_tokens = "", 0
        for token_id in token_ids:
            if self._finder.found is not None:
                break
            text += self._finder.push(self._detokenizer.push([token_id]))
            num_tokens += 1
        return Piece(text, self._finder.found, num_tokens)

    def finish(self) -> Piece:
        """Return what is held, once no more tokens come; with a stop string already found, nothing."""
        if self._finder.found is not None:
            return Piece("", self._finder.found, 0)
        text = self._finder.push(self._detokenizer.flush())
        return Piece(text + self._finder.flush(), self._finder.found, 0)


class _Match:
    """How many characters of a stop string the end of a text is, at most (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._shorter = [0, 0]  # by length: the longest proper end of stop[:length] that is also its beginning
        for character in stop[1:]:
            self._shorter.append(self._next(self._shorter[-1], character))

    def advance(self, character: str) -> bool:
        """Add a character to the text; return whether the stop string ends with it."""
        self.length = self._next(self.length, character)
        return self.length == len(self.stop)

    def _next(self, length: int, character: str) -> int:
        while length and self.stop[length] != character:
            length = self._shorter[length]
        return length + (self.stop[length] == character)
